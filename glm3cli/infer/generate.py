"""The generate command, without --chat: continues prompts.

Nothing here imports torch before the settings and the prompts were checked.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from glm3cli.config.inference import GenerateConfig, SamplingOptions
from glm3cli.errors import DataError
from glm3cli.host.parsing import parse_json
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
    """Continues the prompts of the command line or of the file.

    Args:
        config: The settings.
        on_text: Called on rank 0 with the first prompt's text, piece by piece.

    Returns:
        The results, the same on every rank, and this rank's times; None in a process that has only
        started the ranks.

    Raises:
        Glm3Error: Any of its subclasses; message and hint say what is wrong, and what to do.
    """
    prompts = read_prompts(config)
    model = open_here(config)
    if model is None:
        return None
    from glm3cli.infer.requests import Timing

    timing = Timing()
    with model:
        completions = model.generate(
            prompts,
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


def read_prompts(config: GenerateConfig) -> list[str]:
    """Returns the prompts of the command line, or of --prompts-file.

    Raises:
        DataError: The file is missing or empty, or has a line without a prompt.
    """
    if config.prompts_file is None:
        return list(config.prompt)
    prompts = list(_lines(config.prompts_file))
    if not prompts:
        raise DataError(f"{config.prompts_file} holds no prompt", 'write {"prompt": "..."} lines')
    return prompts


def _lines(path: Path) -> Iterator[str]:
    """Yields the prompts of a file, in which each line is a JSON string or {"prompt": "..."}.

    Raises:
        DataError: The file can't be read, or a line has no prompt.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts-file {path}: {error}", "give a UTF-8 file") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value: Any = parse_json(line)
        except ValueError as error:
            raise DataError(
                f"{path}:{number} is not valid JSON: {error}", "mend the line"
            ) from None
        prompt = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(prompt, str):
            raise DataError(
                f"{path}:{number} has no prompt", 'write {"prompt": "..."} or a JSON string'
            )
        if any(0xD800 <= ord(character) < 0xE000 for character in prompt):
            raise DataError(
                f"{path}:{number} has half of a character (a lone surrogate) in its prompt",
                "mend the line",
            )
        yield prompt
