"""`generate`: the prompts of `glm3 generate --prompt`, all of them together.

Nothing here imports torch before the settings were checked.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, TypedDict

from glm3cli.config.inference import GenerateConfig, SamplingOptions
from glm3cli.infer.opening import open_here

if TYPE_CHECKING:
    from glm3cli.infer.sampling import Sampling


class TextResult(TypedDict):
    """The continuation of one prompt, as `generate --json` prints it.

    Attributes:
        prompt: The prompt as the user gave it.
        text: The new text.
        token_ids: The ids of the new tokens.
        finish_reason: `stop` where the model has ended its text, `length` where the limit has.
        logprobs: The log-probability (natural logarithm) of each new token; null without
            --logprobs.
    """

    prompt: str
    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[float] | None


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
    model = open_here(config)
    if model is None:
        return None
    from glm3cli.infer.requests import Timing

    timing = Timing()
    with model:
        completions = model.generate(
            config.prompt,
            max_new_tokens=config.max_new_tokens,
            sampling=to_sampling(config),
            seed=config.seed,
            answer=not config.raw,
            on_text=on_text,
            timing=timing,
        )
    results = [TextResult(**asdict(completion)) for completion in completions]  # type: ignore[typeddict-item]
    for result in results:
        result["logprobs"] = result["logprobs"] if config.logprobs else None
    return GenerateResult(
        results=results,
        first_token_seconds=timing.first_token,
        tokens_per_second=timing.num_tokens / timing.total if timing.total else 0.0,
    )


def to_sampling(options: SamplingOptions) -> "Sampling":
    """Returns the rule by which tokens are drawn with these options."""
    from glm3cli.infer.sampling import Sampling

    return Sampling(options.greedy, options.temperature, options.top_k, options.top_p)
