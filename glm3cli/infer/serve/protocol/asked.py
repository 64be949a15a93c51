"""`Reader`: makes of the bodies of requests what the engine is asked."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from glm3cli.config.inference import COLDEST, SamplingOptions
from glm3cli.data.preprocess import rows
from glm3cli.data.preprocess.fields import RowError
from glm3cli.data.tokens.chat import build_prompt
from glm3cli.data.tokens.formats.base import ChatFormat
from glm3cli.data.tokens.messages import Message
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.errors import ConfigError, DataError
from glm3cli.infer.decoding.grammar import from_lark, from_schema
from glm3cli.infer.decoding.rules import Decoding, to_decoding
from glm3cli.infer.serve.protocol.bodies import ChatBody, CompletionBody, SamplingBody
from glm3cli.infer.serve.protocol.called import (
    PLACE,
    call_grammar,
    chosen_name,
    functions_of,
)
from glm3cli.infer.serve.protocol.errors import ApiError

# The tokens of a completion unless its request says otherwise, as OpenAI has it.
_SHORT = 16


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it.

    Attributes:
        ids: The token ids, which begin with the tokenizer's prefix.
        num_hidden: How many of them the client hasn't given: a part of the prefix.
    """

    ids: list[int]
    num_hidden: int = 0


@dataclass(frozen=True)
class Asked:
    """What the engine is asked by one request.

    Attributes:
        prompts: The prompts.
        decodings: How each prompt is continued.
        num_choices: The number of continuations of each prompt.
        seed: The seed of the first continuation; those after it have the next ones.
        tools: The names of the tools that an answer may call.
        is_plain: Whether an answer is text from its first token on, not a turn of a chat.
        is_single: Whether an answer has one tool call at most.
        goes_on: Whether an answer goes on with the text of its prompt, and is no text of its own.
    """

    prompts: list[Prompt]
    decodings: list[Decoding]
    num_choices: int
    seed: int
    tools: frozenset[str] = frozenset()
    is_plain: bool = True
    is_single: bool = False
    goes_on: bool = False


class Reader:
    """Reads the bodies of requests for one model."""

    def __init__(
        self, tokenizer: Tokenizer, options: SamplingOptions, vocab_size: int, max_tokens: int
    ) -> None:
        """Prepares for a model.

        Args:
            tokenizer: The tokenizer of the model.
            options: The options that hold where a request says nothing.
            vocab_size: The number of token ids that the model knows.
            max_tokens: The most tokens of a prompt with its answer.
        """
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self._vocab_size = vocab_size
        self._general = to_decoding(options, None)
        self._draws = options.draws

    def completion(self, body: CompletionBody) -> Asked:
        """Reads what a completion is asked of.

        Raises:
            ApiError: A prompt is too long, or has ids that the model doesn't know.
        """
        prompts = [self._prompt(one) for one in body.prompt]
        wanted = _SHORT if body.max_tokens is None else body.max_tokens
        decoding = self._decoding(body, body.logprobs)
        # Prompts that are scored alone may fill all positions.
        rooms = [self._room(prompt, wanted, max(0, min(wanted, 1))) for prompt in prompts]
        return Asked(
            prompts,
            [replace(decoding, max_new_tokens=room) for room in rooms],
            body.n,
            _seed(body),
            goes_on=True,
        )

    def chat(self, body: ChatBody) -> Asked:
        """Reads what an answer in a chat is asked of.

        Raises:
            ApiError: The messages, the tools or the format make no sense, or are too long.
        """
        functions = functions_of(body.tools)
        ids = self.chat_ids(body.messages, body.tools if body.tool_choice != "none" else [])
        grammar, tools = None, frozenset(functions)
        is_plain = False
        if isinstance(body.tool_choice, Mapping):
            name = chosen_name(body.tool_choice, functions)
            grammar = _grammar_of_call({name: functions[name]}, self.tokenizer.chat)
        elif body.tool_choice == "required":
            grammar = _grammar_of_call(functions, self.tokenizer.chat)
        elif (grammar := _grammar_of_format(body.response_format)) or body.tool_choice == "none":
            is_plain, tools = True, frozenset()
            # An answer that is no call has an empty line where a call has the name of its tool.
            ids += self.tokenizer.chat.text_start(self.tokenizer)
        wanted = body.max_completion_tokens or body.max_tokens or self.max_tokens
        decoding = self._decoding(body, body.top_logprobs if body.logprobs else None)
        room = self._room(Prompt(ids), wanted, 1)
        decoding = replace(decoding, max_new_tokens=room, grammar=grammar)
        if grammar is not None:
            decoding = replace(decoding, ignores_ends=False, lookup=0)
        return Asked(
            [Prompt(ids)],
            [decoding],
            body.n,
            _seed(body),
            tools,
            is_plain,
            not body.parallel_tool_calls,
        )

    def chat_ids(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> list[int]:
        """Returns the token ids after which the model answers.

        Raises:
            ApiError: The messages have none of the forms that training reads, too.
        """
        row = {"messages": messages, "tools": list(tools)}
        try:
            turns: list[Message] = rows.openai(row)
        except RowError as error:
            raise ApiError(str(error), error.field.partition("[")[0] or None) from None
        try:
            return build_prompt(self.tokenizer, turns)
        except DataError as error:
            raise ApiError(f"{error.message}; {error.hint}", "messages") from None

    def _prompt(self, given: str | list[int]) -> Prompt:
        """Returns a prompt with the prefix, of which token ids may have a part already."""
        prefix = list(self.tokenizer.prefix)
        if isinstance(given, str):
            return Prompt([*prefix, *self.tokenizer.encode(given)], len(prefix))
        wrong = next((one for one in given if one >= self._vocab_size), None)
        if wrong is not None:
            raise ApiError(f"token id {wrong} is none of the model's {self._vocab_size}", "prompt")
        there = 0
        while there < min(len(given), len(prefix)) and given[there] == prefix[there]:
            there += 1
        return Prompt([*prefix, *given[there:]], len(prefix) - there)

    def _room(self, prompt: Prompt, wanted: int, least: int) -> int:
        """Returns how many tokens an answer may have.

        Raises:
            ApiError: There is no room for as many as it must have at least.
        """
        count = len(prompt.ids)
        if count + least > self.max_tokens:
            raise ApiError(
                f"the prompt has {count} tokens, and with an answer the model takes "
                f"{self.max_tokens}; give a shorter one",
                code="context_length_exceeded",
            )
        return min(wanted, self.max_tokens - count)

    def _decoding(self, body: SamplingBody, logprobs: int | None) -> Decoding:
        """Returns how answers are made, but for their length and their grammar.

        Raises:
            ApiError: A token that is to be likelier or less likely isn't one.
        """
        general = self._general.sampling
        temperature = body.temperature
        greedy = not self._draws if temperature is None else temperature < COLDEST
        given = {
            "temperature": None if greedy else temperature,
            "top_p": body.top_p or None,  # the mass of 0 is the likeliest token's
            "top_k": 1 if body.top_p == 0 else body.top_k if body.top_k != -1 else 0,
            "min_p": body.min_p,
            "repetition_penalty": body.repetition_penalty,
            "presence_penalty": body.presence_penalty,
            "frequency_penalty": body.frequency_penalty,
        }
        given = {name: value for name, value in given.items() if value is not None}
        biases = {**dict(general.logit_bias), **self._biases(body)}
        sampling = replace(
            general,
            greedy=greedy,
            logit_bias=tuple(biases.items()),
            **given,  # type: ignore[arg-type]
        )
        return replace(
            self._general,
            sampling=sampling,
            stops=tuple(stop for stop in body.stop if stop),
            ignores_ends=body.ignore_eos,
            logprobs=logprobs,
            lookup=self._general.lookup if greedy and not sampling.changes_logits else 0,
        )

    def _biases(self, body: SamplingBody) -> dict[int, float]:
        """Returns what is added to the logits of tokens, by their ids."""
        found = {}
        for text, number in body.logit_bias.items():
            if not (text.isascii() and text.isdigit() and int(text) < self._vocab_size):
                raise ApiError(
                    f"logit_bias {text!r} is no token id below {self._vocab_size}", "logit_bias"
                )
            found[int(text)] = number
        return found


def _seed(body: SamplingBody) -> int:
    """Returns the seed of a request, or one that nobody knows."""
    return secrets.randbits(62) if body.seed is None else body.seed % 2**62


def _grammar_of_call(functions: Mapping[str, Mapping[str, Any]], chat: ChatFormat) -> str:
    """Returns the grammar of a call of one of some functions, as a chat format writes it.

    Raises:
        ApiError: A parameter's schema has what llguidance doesn't know.
    """
    try:
        return from_lark(call_grammar(functions, chat.calls), "tools")
    except ConfigError as error:
        # References are named as the client has written them.
        raise ApiError(error.message.replace(PLACE.removeprefix("#"), ""), "tools") from None


def _grammar_of_format(given: Mapping[str, Any]) -> str | None:
    """Returns the grammar of `response_format`; None for plain text.

    Raises:
        ApiError: It is no format that is known, or its schema is wrong.
    """
    kind = given.get("type", "text")
    if kind == "text":
        return None
    schema: Any = {"type": "object"}
    if kind == "json_schema":
        about = given.get("json_schema")
        schema = about.get("schema", {}) if isinstance(about, Mapping) else None
    elif kind != "json_object":
        schema = None
    if not isinstance(schema, dict):
        raise ApiError(
            "response_format should have the type text, json_object, or json_schema with "
            '"json_schema": {"name": "...", "schema": {...}}',
            "response_format",
        )
    try:
        return from_schema(schema, "response_format")
    except ConfigError as error:
        raise ApiError(error.message, "response_format") from None
