"""What the HTTP side asks of the engine, and what it hears back: plain values without torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glm3cli.infer.decoding.rules import Decoding

# Token ids with their log-probabilities.
Likeliest = list[tuple[int, float]]


@dataclass(frozen=True)
class Begin:
    """Continue a prompt.

    Attributes:
        number: The number of the sequence, which its updates carry.
        prompt: The token ids; at least one.
        decoding: How the one continuation is made.
        seed: The seed of its random numbers.
        adapter: The name of the adapter that is computed with; None for the bare model.
    """

    number: int
    prompt: Sequence[int]
    decoding: "Decoding"
    seed: int
    adapter: str | None = None


@dataclass(frozen=True)
class Score:
    """Score the tokens of a text.

    Attributes:
        number: The number of the sequence, which its update carries.
        tokens: The token ids; at least one.
        count: The number of likeliest tokens that are wanted beside each.
        adapter: The name of the adapter that is computed with; None for the bare model.
    """

    number: int
    tokens: Sequence[int]
    count: int
    adapter: str | None = None


@dataclass(frozen=True)
class End:
    """End a sequence that nobody waits for any more.

    Attributes:
        number: The number of the sequence.
    """

    number: int


Order = Begin | Score | End


@dataclass(frozen=True)
class Token:
    """A token of a text.

    Attributes:
        id: The token id.
        logprob: Its log-probability (natural logarithm); None if it isn't known.
        top: The likeliest tokens at its place.
    """

    id: int
    logprob: float | None = None
    top: Likeliest = field(default_factory=list)


@dataclass(frozen=True)
class Update:
    """What there is new of a sequence.

    Attributes:
        number: The number of the sequence.
        tokens: The new tokens; of a `Score`, all of them.
        finish: Why it has ended, as `Generation.finish_reason` has it; `scored` for a `Score`, None
            if it goes on.
        problem: What has gone wrong; "" if nothing has.
    """

    number: int
    tokens: list[Token]
    finish: str | None = None
    problem: str = ""
