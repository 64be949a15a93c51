"""Beam search and beam sampling, as transformers defines them (generation/utils.py, _beam_search).

The device finds the likeliest continuations of all beams of a prompt; which of them go on, and
which have ended, is decided here, on the host and on every rank alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

# What stands for "no": of a beam that isn't there, and of one that mustn't be chosen.
_NEVER = -1.0e9


@dataclass(frozen=True)
class Beams:
    """The rule of a beam search.

    Attributes:
        num_beams: The number of texts that are continued side by side.
        length_penalty: The power of a text's length, in new tokens, by which its log-probability is
            divided when it has ended: above 0 favours long texts, below 0 short ones.
        early_stopping: Whether the search ends as soon as it has `num_beams` texts that have ended;
            if not, it ends when the best text that runs, at its present length, isn't better than
            the worst of them, or with `never` when it couldn't become so at any length.
        num_return: The number of texts to return, the best first; at most `num_beams`.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return: int = 1

    def num_candidates(self, num_stop_ids: int) -> int:
        """Returns how many continuations are looked at in each step.

        So many of them can end in each step that `num_beams` are left.
        """
        return max(2, 1 + num_stop_ids) * self.num_beams


@dataclass(frozen=True)
class Candidate:
    """A continuation of a beam by one token.

    Attributes:
        score: The log-probability of all new tokens together.
        beam: The index of the beam.
        token: The token id.
        logprob: The log-probability of this token alone, before the sampling rule changes it.
    """

    score: float
    beam: int
    token: int
    logprob: float


@dataclass(frozen=True)
class Ended:
    """A text of a beam search.

    Attributes:
        score: Its log-probability, divided by its length to the power of the penalty.
        tokens: The new tokens; the last one may be a stop token.
        logprobs: The log-probability of each of them.
        has_ended: Whether it is a text, or stands where there is none yet.
    """

    score: float
    tokens: list[int]
    logprobs: list[float]
    has_ended: bool


@dataclass
class BeamSearch:
    """The search for the best continuations of one prompt.

    Attributes:
        rule: The rule of the search.
        max_new_tokens: The length at which every text ends.
        scores: The log-probability of each beam; at first, the first one alone counts.
        beams: The new tokens of each beam.
        logprobs: The log-probability of each of them.
        ended: The best texts that have ended, the best first.
    """

    rule: Beams
    max_new_tokens: int
    scores: list[float] = field(default_factory=list)
    beams: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    _can_improve: bool = True

    def __post_init__(self) -> None:
        count = self.rule.num_beams
        self.scores = [0.0] + [_NEVER] * (count - 1)
        self.beams = [[] for _ in range(count)]
        self.logprobs = [[] for _ in range(count)]
        self.ended = [Ended(_NEVER, [], [], False)] * count

    def advance(
        self, candidates: Sequence[Candidate], is_end: Callable[[list[int]], bool]
    ) -> list[int] | None:
        """Continues the beams by one token each.

        Args:
            candidates: The likeliest continuations, the best first.
            is_end: Returns whether a text ends with its last token, but for its length.

        Returns:
            For each beam, the index of the one that it goes on from; None if the search is done.
        """
        count = self.rule.num_beams
        texts = [[*self.beams[one.beam], one.token] for one in candidates]
        logprobs = [[*self.logprobs[one.beam], one.logprob] for one in candidates]
        length = len(texts[0])
        hits = [length >= self.max_new_tokens or is_end(text) for text in texts]
        self._collect(candidates, texts, logprobs, hits)
        running = [one.score + _NEVER * hit for one, hit in zip(candidates, hits, strict=True)]
        best = sorted(range(len(running)), key=lambda i: -running[i])[:count]
        self.scores = [running[i] for i in best]
        self.beams, self.logprobs = [texts[i] for i in best], [logprobs[i] for i in best]
        self._can_improve &= self._could_improve(length)
        is_full = all(one.has_ended for one in self.ended) and self.rule.early_stopping is True
        if not self._can_improve or is_full or all(hits):
            return None
        return [candidates[i].beam for i in best]

    def _collect(
        self,
        candidates: Sequence[Candidate],
        texts: list[list[int]],
        logprobs: list[list[float]],
        hits: list[bool],
    ) -> None:
        """Adds texts that end now to those that have ended, and keeps the best."""
        count, length = self.rule.num_beams, len(texts[0])
        is_full = all(one.has_ended for one in self.ended) and self.rule.early_stopping is True
        new = []
        for place, (one, hit) in enumerate(zip(candidates, hits, strict=True)):
            counts = hit and place < count  # the others are there to go on from
            score = one.score / length**self.rule.length_penalty
            score += _NEVER * (is_full + (not self._can_improve) + (not counts))
            new.append(Ended(score, texts[place], logprobs[place], counts))
        self.ended = sorted([*self.ended, *new], key=lambda one: -one.score)[:count]

    def _could_improve(self, length: int) -> bool:
        """Returns whether a beam could become better than the worst text that has ended."""
        penalty = self.rule.length_penalty
        is_patient = self.rule.early_stopping == "never" and penalty > 0
        best = self.scores[0] / (self.max_new_tokens if is_patient else length) ** penalty
        worst = min(one.score for one in self.ended)
        return any(best > (worst if one.has_ended else _NEVER) for one in self.ended)
