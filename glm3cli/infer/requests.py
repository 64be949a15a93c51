"""What is asked of the engine, and what it answers: token ids only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from glm3cli.infer.sampling import Sampling

# Returns whether a continuation ends with its last token, given all of its tokens.
IsEnd = Callable[[Sequence[int]], bool]


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
        prompt: The token ids of the prompt; at least one.
        sampling: The rule by which tokens are drawn.
        max_new_tokens: The number of tokens after which the continuation ends.
        stop_ids: The ids of the tokens that end the continuation; they are not part of it.
        seed: The seed of the request's own random generator.
        is_end: Ends the continuation with the token after which it is true, which stays part of
            it; None if nothing but the stop ids does. Must depend on the tokens alone, since every
            rank asks it.
        logprobs: The number of likeliest tokens whose log-probabilities are wanted beside that of
            each new token; None if not even those are.
    """

    prompt: Sequence[int]
    sampling: Sampling
    max_new_tokens: int
    stop_ids: Sequence[int] = ()
    seed: int = 0
    is_end: IsEnd | None = None
    logprobs: int | None = 0


@dataclass
class Generation:
    """The continuation of one prompt, complete or not.

    Attributes:
        token_ids: The ids of the new tokens; a stop token is not among them.
        logprobs: The log-probability (natural logarithm) of each new token, before the sampling
            rule changes it; empty if they aren't wanted.
        top_logprobs: The likeliest tokens at each place with their log-probabilities, if wanted.
        finish_reason: `stop` after a stop token or `Engine.end`, `stop_text` where `is_end` has
            ended it, else `length`.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
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
