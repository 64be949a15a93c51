"""`generate`: the prompts of `glm3 generate --prompt`, all of them together.

Nothing here imports torch before the settings were checked.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, NotRequired, TypedDict

from glm3cli.config.inference import GenerateConfig
from glm3cli.infer.decoding.grammar import read_grammar
from glm3cli.infer.defaults import with_defaults
from glm3cli.infer.opening import open_here
from glm3cli.parallel.launch import is_speaker

if TYPE_CHECKING:
    from glm3cli.infer.model import Completion

_log = logging.getLogger(__name__)


class TextResult(TypedDict):
    """The continuation of one prompt, as `generate --json` prints it.

    Attributes:
        prompt: The prompt as the user gave it.
        text: The new text.
        token_ids: The ids of the new tokens.
        finish_reason: `stop` where the model has ended its text, `stop_text` where a --stop has,
            `length` where the limit has.
        logprobs: The log-probability (natural logarithm) of each new token; null without
            --logprobs.
        index: The number of the continuation among those of its prompt, with several.
        top_logprobs: The likeliest tokens at each place, as pairs of id and log-probability; with
            --top-logprobs.
    """

    prompt: str
    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[float] | None
    index: NotRequired[int]
    top_logprobs: NotRequired[list[list[tuple[int, float]]]]


class GenerateResult(TypedDict):
    """The result of the command, as `generate --json` prints it.

    Attributes:
        results: The continuation of each prompt, in the order of the prompts.
        first_token_seconds: The seconds until each of this rank's prompts had its first token.
        tokens_per_second: The new tokens of this rank's prompts per second.
    """

    results: list[TextResult]
    first_token_seconds: float
    tokens_per_second: float


def generate(
    config: GenerateConfig, on_text: Callable[[str], None] | None = None
) -> GenerateResult | None:
    """Continues the prompts of the command line.

    Args:
        config: The settings.
        on_text: Called on rank 0 with the first prompt's text, piece by piece.

    Returns:
        The results, the same on every rank, and this rank's times; None in a process that has only
        started the ranks.

    Raises:
        Glm3Error: Any of its subclasses; message and hint say what is wrong, and what to do.
    """
    config = with_defaults(config)
    grammar = read_grammar(config.json_schema, config.regex)
    model = open_here(config)
    if model is None:
        return None
    from glm3cli.infer.decoding.rules import to_decoding
    from glm3cli.infer.requests import Timing

    wants_logprobs = config.logprobs or config.top_logprobs > 0
    timing = Timing()
    with model:
        model.engine.limit(config.max_batch_size)
        completions = model.decode(
            config.prompt,
            to_decoding(config, config.top_logprobs if wants_logprobs else None, grammar),
            seed=config.seed,
            answer=not config.raw,
            truncate=config.truncate,
            on_text=on_text,
            timing=timing,
        )
        if config.prompt_lookup and is_speaker():
            _log.warning("prompt lookup: %s", model.engine.accepted)
    return GenerateResult(
        results=[_result(completion, config) for completion in completions],
        first_token_seconds=timing.first_token,
        tokens_per_second=timing.num_tokens / timing.total if timing.total else 0.0,
    )


def _result(completion: "Completion", config: GenerateConfig) -> TextResult:
    """Returns a continuation as `--json` prints it."""
    result = TextResult(
        prompt=completion.prompt,
        text=completion.text,
        token_ids=completion.token_ids,
        finish_reason=completion.finish_reason,
        logprobs=completion.logprobs if config.logprobs else None,
    )
    if config.num_return_sequences > 1:
        result["index"] = completion.index
    if config.top_logprobs:
        result["top_logprobs"] = completion.top_logprobs
    return result
