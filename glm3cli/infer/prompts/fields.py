"""Reads what stands beside the prompt of a line: its own options, in our names and in OpenAI's."""

from collections.abc import Mapping
from typing import Any

from glm3cli.config.inference import SamplingOptions
from glm3cli.errors import ConfigError, DataError

HINT = (
    'write {"prompt": "..."}, a JSON string, or {"messages": [...]}; --on-error skip leaves it out'
)
# What OpenAI and others call our options.
_OTHER_NAMES = {
    "max_new_tokens": ("max_completion_tokens", "max_tokens"),
    "num_return_sequences": ("n",),
}
# What a batch asks for that is answered here.
_URLS = ("/v1/chat/completions", "/v1/completions")
# Fields of OpenAI's and vLLM's requests that change an answer unless they say what holds anyway.
_UNREAD = (
    "best_of",
    "echo",
    "function_call",
    "guided_json",
    "guided_regex",
    "logprobs",
    "reasoning_effort",
    "response_format",
    "stop_token_ids",
    "suffix",
    "tool_choice",
    "top_logprobs",
)
_PLAIN: tuple[Any, ...] = (None, False, 0, "", "auto", [], {"type": "text"})


class LineError(DataError):
    """A line that is no prompt."""


def body_of(row: Any) -> tuple[Mapping[str, Any], str | None]:
    """Returns the object that has the prompt of a row, and what a batch calls the row.

    Args:
        row: The row: the object itself, or a line of OpenAI's batches, which has it as `body`.

    Raises:
        LineError: It is no object, or of a batch that asks for something else than an answer.
    """
    if not isinstance(row, Mapping):
        raise LineError("has no prompt", HINT)
    body, name = row.get("body"), row.get("custom_id")
    if not isinstance(body, Mapping) or not {"prompt", "messages"}.isdisjoint(row):
        return row, None
    if row.get("url", _URLS[0]) not in _URLS:
        raise LineError(f"asks for {row['url']!r}", f"only {' and '.join(_URLS)} are answered")
    if not isinstance(name, str | None):
        raise LineError(f"has the custom_id {name!r}, which is no string", "mend the line")
    if name is not None and any(0xD800 <= ord(character) < 0xE000 for character in name):
        raise LineError("has half of a character (a lone surrogate) in its custom_id", "mend it")
    return body, name


def own_options(options: SamplingOptions, value: Mapping[str, Any]) -> SamplingOptions:
    """Returns the options with those that a line has for itself.

    Raises:
        LineError: One is wrong, or has two values under two names.
    """
    own = {}
    for name in SamplingOptions.model_fields.keys() - {"seed"}:
        given = [one for one in (name, *_OTHER_NAMES.get(name, ())) if value.get(one) is not None]
        if any(value[one] != value[given[0]] for one in given):
            raise LineError(f"has a wrong option: {' and '.join(given)} differ", "give one of them")
        if given:
            own[name] = value[given[0]]
    count = own.pop("num_return_sequences", 1)
    if count != 1:
        raise LineError(
            f"has a wrong option: {count!r} answers to one line", "repeat the line with other seeds"
        )
    if isinstance(own.get("stop"), str):
        own["stop"] = [own["stop"]]
    if isinstance(own.get("logit_bias"), Mapping):  # OpenAI's form
        own["logit_bias"] = [f"{token}:{number}" for token, number in own["logit_bias"].items()]
    try:
        return SamplingOptions.parse({**options.model_dump(), **own}) if own else options
    except ConfigError as error:
        raise LineError(f"has a wrong option: {error.message}", error.hint) from None


def own_seed(value: Mapping[str, Any], seed: int) -> int:
    """Returns the seed that a line has for itself, or else `seed`.

    Raises:
        LineError: The line's own is no whole number from 0.
    """
    own = value.get("seed")
    if own is None:
        return seed
    if not isinstance(own, int) or isinstance(own, bool) or own < 0:
        raise LineError(f"has a wrong option: seed {own!r} is no whole number from 0", HINT)
    return own


def unread_in(value: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the fields that would change the answer to a line, but aren't read."""
    return tuple(name for name in _UNREAD if value.get(name) not in _PLAIN)
