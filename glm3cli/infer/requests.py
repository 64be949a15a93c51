"""What the engine is asked for, and what it answers: token ids alone, no text."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from glm3cli.infer.sampling import Sampling


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
        prompt: The token ids of the prompt; at least one.
        sampling: The rule by which tokens are drawn.
        max_new_tokens: The number of tokens after which the continuation ends.
        stop_ids: The ids of the tokens that end the continuation; they are not part of it.
        seed: The seed of the request's own random generator.
    """

    prompt: Sequence[int]
    sampling: Sampling
    max_new_tokens: int
    stop_ids: Sequence[int] = ()
    seed: int = 0


@dataclass
class Generation:
    """The continuation of one prompt, complete or not.

    Attributes:
        token_ids: The ids of the new tokens; a stop token is not among them.
        logprobs: The log-probability (natural logarithm) of each new token, before temperature,
            top-k and top-p.
        finish_reason: `stop` after a stop token or `Engine.end`, else `length`.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = "length"


@dataclass
class Timing:
    """The time that the continuation of some prompts took.

    Attributes:
        first_token: The seconds until each prompt had its first token.
        total: The seconds until the last token.
        num_tokens: The number of new tokens of all prompts together.
    """

    first_token: float = 0.0
    total: float = 0.0
    num_tokens: int = 0
