"""The bodies of requests, with the fields that this server knows; others are ignored."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from glm3cli.infer.serve.protocol.errors import ApiError

_MOST_STOPS = 16
_MOST_CHOICES = 128
# The largest seeds of torch's generators.
_SEED = 2**63


def _listed(value: Any) -> Any:
    """Returns what may be a text or a list of texts as a list."""
    return [value] if isinstance(value, str) else value


Text = TypeVar("Text")
Texts = Annotated[list[str], BeforeValidator(_listed, json_schema_input_type=str | list[str])]
# Prompts as clients send them: one or several, as texts or as token ids.
Prompts = str | list[str] | list[int] | list[list[int]]
Whole = Annotated[int, Field(ge=-_SEED, lt=_SEED)]
Id = Annotated[int, Field(ge=0, lt=2**31)]


def _prompts(value: Any) -> list[str | list[int]]:
    """Returns prompts as a list of texts and lists of token ids.

    Raises:
        ValueError: They are something else.
    """
    if isinstance(value, str) or _are_ids(value, may_be_empty=False):
        return [value]
    is_list = isinstance(value, list) and value
    if is_list and (all(isinstance(one, str) for one in value) or all(map(_are_ids, value))):
        return list(value)
    raise ValueError("should be a text, a list of token ids, or a list of either")


def _are_ids(value: Any, may_be_empty: bool = True) -> bool:
    """Returns whether a value is a list of token ids."""
    if not isinstance(value, list) or not (value or may_be_empty):
        return False
    return all(type(one) is int and 0 <= one < 2**31 for one in value)


class Body(BaseModel):
    """The body of a request; a field that is null is one that isn't there."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {name: value for name, value in values.items() if value is not None}


class StreamOptions(Body):
    """What a stream has beside the answer.

    Attributes:
        include_usage: Whether a last chunk tells the numbers of tokens.
    """

    include_usage: bool = False


class SamplingBody(Body):
    """The fields that completions and chats share.

    Those that are None have the values of the server's own options.
    """

    model: str | None = None
    n: int = Field(default=1, ge=1, le=_MOST_CHOICES)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}
    max_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    seed: Whole | None = None
    stop: Texts = Field(default=[], max_length=_MOST_STOPS)
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if "stream_options" in self.model_fields_set and not self.stream:
            raise ValueError("stream_options goes with stream: true")
        return self


class CompletionBody(SamplingBody):
    """The body of /v1/completions."""

    prompt: Annotated[
        list[Any], BeforeValidator(_prompts, json_schema_input_type=Prompts), Field(min_length=1)
    ]
    best_of: int | None = Field(default=None, ge=1, le=_MOST_CHOICES)
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=20)
    suffix: str = ""

    @model_validator(mode="after")
    def _check_completion(self) -> Self:
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError("best_of can't be had; leave it out, or give the number n")
        if self.suffix:
            raise ValueError("suffix can't be had: the model continues texts, and fills in nothing")
        return self


class ToolsBody(Body):
    """The fields that bodies with the messages of a chat share.

    `functions` are what clients sent before there were `tools`, and become tools.
    """

    tools: list[dict[str, Any]] = []
    functions: list[dict[str, Any]] = []

    @model_validator(mode="before")
    @classmethod
    def _make_tools(cls, values: Any) -> Any:
        functions = values.get("functions") if isinstance(values, Mapping) else None
        if not isinstance(functions, list) or not functions:
            return values
        if values.get("tools"):
            raise ValueError("functions are tools in an older form; give one of both")
        return {**values, "tools": [{"type": "function", "function": one} for one in functions]}


class ChatBody(ToolsBody, SamplingBody):
    """The body of /v1/chat/completions.

    `function_call` goes with `functions`, of which an answer calls one at most.
    """

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    function_call: Literal["none", "auto"] | dict[str, Any] = "auto"
    response_format: dict[str, Any] = {}
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)

    @model_validator(mode="before")
    @classmethod
    def _make_choice(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not values.get("functions"):
            return values
        if values.get("tool_choice") is not None:
            raise ValueError("function_call goes with functions, and tool_choice with tools")
        choice = values.get("function_call") or "auto"
        if isinstance(choice, Mapping):
            choice = {"type": "function", "function": choice}
        return {**values, "tool_choice": choice, "parallel_tool_calls": False}

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true")
        if self.tool_choice not in ("auto", "none") and not self.tools:
            raise ValueError("tool_choice asks for a call, but there are no tools")
        if self.max_tokens == 0:
            raise ValueError("max_tokens should be at least 1")
        if self.function_call != "auto" and not self.functions:
            raise ValueError("function_call goes with functions")
        return self


class TokenizeBody(ToolsBody):
    """The body of /tokenize: a text, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] = []
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check_input(self) -> Self:
        if (self.prompt is None) == (not self.messages):
            raise ValueError("give one of prompt and messages")
        return self


class DetokenizeBody(Body):
    """The body of /detokenize."""

    model: str | None = None
    tokens: list[Id]


AnyBody = TypeVar("AnyBody", bound=Body)


def read_body(kind: type[AnyBody], value: Any) -> AnyBody:
    """Returns a body, checked.

    Args:
        kind: The class of the body.
        value: The JSON value that has come.

    Raises:
        ApiError: A field is missing or wrong; the error names the first one.
    """
    if not isinstance(value, dict):
        raise ApiError("the body should be a JSON object")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = problem["loc"]
        message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
        param = str(place[0]) if place else None
        raise ApiError(f"{_shown(place)}: {message}" if place else message, param) from None


def _shown(place: tuple[int | str, ...]) -> str:
    """Returns the place of a field as `messages[0].role`."""
    text = str(place[0])
    for part in place[1:]:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text
