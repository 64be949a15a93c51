"""What is asked of the engine, and what it answers: token ids only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from glm3cli.errors import Glm3Error
from glm3cli.infer.decoding.beams import Beams, Ended
from glm3cli.infer.decoding.grammar import Grammar
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
        beams: The rule of a beam search; None draws one token after the other.
        lookup: The most tokens that are guessed from the prompt and read together with the last
            one; 0 guesses none. The continuation is the same, of greedy decoding alone.
        grammar: The grammar that the continuation follows; None for none. It goes without beams
            and without guesses.
        raises: Whether trouble with the request is an error of the step in which it comes; if not,
            the request ends alone, and its result has the error. Beams always raise.
        adapter: The name of the engine's adapter that the text is computed with; None for none.
    """

    prompt: Sequence[int]
    sampling: Sampling
    max_new_tokens: int
    stop_ids: Sequence[int] = ()
    seed: int = 0
    is_end: IsEnd | None = None
    logprobs: int | None = 0
    beams: Beams | None = None
    lookup: int = 0
    grammar: Grammar | None = None
    raises: bool = True
    adapter: str | None = None

    def is_last(self, new: Sequence[int]) -> bool:
        """Returns whether a continuation ends with its last token, whatever its length."""
        return new[-1] in self.stop_ids or (self.is_end is not None and self.is_end(new))


@dataclass
class Generation:
    """The continuation of one prompt, complete or not.

    Attributes:
        token_ids: The ids of the new tokens; a stop token is not among them.
        logprobs: The log-probability (natural logarithm) of each new token, before the sampling
            rule changes it; empty if they aren't wanted.
        top_logprobs: The likeliest tokens at each place with their log-probabilities, if wanted.
        finish_reason: `stop` after a stop token or `Engine.end`, `stop_text` where `is_end` has
            ended it, `error` where `problem` has, else `length`.
        score: The log-probability of all tokens after the sampling rule, divided by the length to
            the power of the length penalty; of beam searches alone.
        others: The further continuations of a beam search, the best first.
        problem: The error that has ended it; None if none has.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    finish_reason: str = "length"
    score: float | None = None
    others: list["Generation"] = field(default_factory=list)
    problem: Glm3Error | None = None

    def add(self, token: int, logprob: float | None, top: list[tuple[int, float]] | None) -> None:
        """Adds a token with what is known of it."""
        self.token_ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if top is not None:
            self.top_logprobs.append(top)


def generation_of(ended: Ended, request: Request) -> Generation:
    """Returns the continuation that a text of a beam search is."""
    found = Generation(ended.tokens, ended.logprobs, score=ended.score)
    if ended.tokens and ended.tokens[-1] in request.stop_ids:
        found.token_ids, found.logprobs = ended.tokens[:-1], ended.logprobs[:-1]
        found.finish_reason = "stop"
    elif request.is_end is not None and request.is_end(ended.tokens):
        found.finish_reason = "stop_text"
    return found


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
