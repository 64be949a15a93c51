"""Chooses the next tokens of a forward pass, the same on every rank.

The last stage chooses and sends what it has chosen to the others: whole numbers of 32 bits alone,
the only ones that the host reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from glm3cli.errors import ConfigError, Glm3Error
from glm3cli.infer.decoding.beams import Candidate
from glm3cli.infer.decoding.grammar import Matcher
from glm3cli.infer.decoding.penalties import penalize
from glm3cli.infer.pipeline import Pipeline, not_numbers
from glm3cli.infer.sampling import Sampling, candidates, sample
from glm3cli.parallel.groups import Grid

# Stand for the token where logits are NaN, and where none is allowed: all stages read it, and fail
# together.
_NO_TOKEN, _STUCK = -1, -2


@dataclass(frozen=True)
class Place:
    """A place in a text whose next token is chosen.

    Attributes:
        rule: The rule by which it is chosen.
        generator: The random generator of the request.
        prompt: The token ids of the prompt.
        new: The new token ids so far.
        logprobs: The number of likeliest tokens whose log-probabilities are wanted beside that of
            the chosen one; None if not even that one's is.
        matcher: Says which tokens a grammar allows; None without a grammar.
    """

    rule: Sampling
    generator: torch.Generator
    prompt: Sequence[int]
    new: Sequence[int]
    logprobs: int | None
    matcher: Matcher | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is taken, without a change of the logits."""
        return self.rule.greedy and not self.rule.changes_logits and self.matcher is None


@dataclass(frozen=True)
class Fork:
    """The places at the ends of a prompt's beams, whose best continuations are found together.

    Attributes:
        places: The place of each beam; of the first one alone before the beams have parted.
        scores: The log-probability of each beam.
        count: The number of continuations to find.
        keep: The number of tokens that the sampling rule leaves to each beam at least.
    """

    places: Sequence[Place]
    scores: Sequence[float]
    count: int
    keep: int


@dataclass(frozen=True)
class Chosen:
    """The token that was chosen at a place.

    Attributes:
        token: The token id.
        logprob: Its log-probability (natural logarithm) before the rule has changed the logits;
            None if it isn't wanted.
        top: The likeliest tokens with their log-probabilities.
        problem: Why none could be chosen: the logits are NaN, or no token is allowed; None if one
            was.
    """

    token: int
    logprob: float | None
    top: list[tuple[int, float]] = field(default_factory=list)
    problem: Glm3Error | None = None


class Chooser:
    """Chooses tokens together with the ranks that share the model."""

    def __init__(self, pipeline: Pipeline, grid: Grid, device: torch.device) -> None:
        self._pipeline, self._grid, self._device = pipeline, grid, device

    def choose(
        self, logits: Tensor | None, places: Sequence[Place], forks: Sequence[Fork] = ()
    ) -> Tensor:
        """Chooses tokens on the last stage; the others get an empty tensor of the same shape.

        Args:
            logits: This rank's part of the logits, [places, vocabulary / tp]: first those of the
                places, then those of the forks' places; None before the last stage.
            places: The places.
            forks: The beams of prompts.

        Returns:
            32-bit numbers, which `read` understands.
        """
        if logits is None:
            size = len(places) * _width(places) + sum(4 * fork.count for fork in forks)
            return torch.empty(size, dtype=torch.int32, device=self._device)
        parts = []
        if places:
            parts.append(self._of_places(logits[: len(places)], places).flatten())
        first = len(places)
        for fork in forks:
            whole = self._pipeline.whole_vocabulary(logits[first : first + len(fork.places)])
            parts.append(_best(whole, fork).flatten())
            first += len(fork.places)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _of_places(self, logits: Tensor, places: Sequence[Place]) -> Tensor:
        """Chooses a token at each place; returns a row of numbers for each."""
        width = _width(places)
        if all(place.is_plain for place in places) and width <= 2:
            return self._likeliest(logits, wants_logprobs=width == 2)
        logits = self._pipeline.whole_vocabulary(logits)
        is_broken = logits.isnan().any(dim=-1, keepdim=True)
        logits = logits.masked_fill(is_broken, 0)
        changed = _changed(logits, places)
        is_stuck = changed.isneginf().all(dim=-1, keepdim=True)
        changed = changed.masked_fill(is_stuck, 0)
        rules, generators = [p.rule for p in places], [p.generator for p in places]
        tokens = sample(changed, rules, generators).unsqueeze(1)
        columns = [tokens.int().masked_fill(is_broken, _NO_TOKEN).masked_fill(is_stuck, _STUCK)]
        if width > 1:
            total = logits.logsumexp(dim=-1, keepdim=True)
            columns.append(_bits(logits.gather(1, tokens) - total))
            top, ids = logits.topk((width - 2) // 2, dim=-1)
            columns += [ids.int(), _bits(top - total)]
        return torch.cat(columns, dim=1)

    def _likeliest(self, logits: Tensor, *, wants_logprobs: bool) -> Tensor:
        """Takes the likeliest token of each row, without gathering the logits of other ranks."""
        scores, tokens = logits.max(dim=-1)  # NaN is larger than all numbers
        columns = [tokens.int(), _bits(scores)]
        if wants_logprobs:
            columns.append(_bits(logits.logsumexp(dim=-1)))
        own = torch.stack(columns, dim=1)  # [n, 2 or 3]
        if self._grid.tp_size > 1:
            own[:, 0] += self._grid.tp_rank * logits.size(-1)
            parts = self._pipeline.gather(own)
            best = _numbers(parts[:, :, 1]).argmax(dim=0)  # of equal ones the first, as in one row
            own = parts.gather(0, best[None, :, None].expand(1, *own.shape))[0]
            if wants_logprobs:
                own[:, 2] = _bits(_numbers(parts[:, :, 2]).logsumexp(dim=0))
        own[:, 0].masked_fill_(_numbers(own[:, 1]).isnan(), _NO_TOKEN)
        if not wants_logprobs:
            return own[:, :1].contiguous()
        own[:, 1] = _bits(_numbers(own[:, 1]) - _numbers(own[:, 2]))
        return own[:, :2].contiguous()


def read(
    numbers: Tensor, places: Sequence[Place], forks: Sequence[Fork] = ()
) -> tuple[list[Chosen], list[list[Candidate]]]:
    """Reads what `Chooser.choose` has chosen, on the host.

    Returns:
        What was chosen at each place, and the best continuations of each fork.

    Raises:
        CheckpointError: The logits of a fork are NaN.
    """
    numbers, width = numbers.cpu(), _width(places)
    sizes = [width * len(places), *(4 * fork.count for fork in forks)]
    first, *others = torch.split(numbers, sizes)
    rows = first.view(len(places), width)
    pairs = zip(rows.tolist(), _numbers(rows).tolist(), places, strict=True)
    chosen = [_read_place(values, scores, place) for values, scores, place in pairs]
    return chosen, [_read_fork(part.view(4, -1)) for part in others]


def _read_place(values: list[int], scores: list[float], place: Place) -> Chosen:
    """Reads what was chosen at a place from its numbers, taken as integers and as fp32."""
    if values[0] == _NO_TOKEN:
        return Chosen(values[0], None, problem=not_numbers())
    if values[0] == _STUCK:
        problem = ConfigError(
            "no token is allowed any more: the grammar or the forbidden n-grams leave none",
            "give a simpler --json-schema or --regex, or a larger --no-repeat-ngram-size",
        )
        return Chosen(values[0], None, problem=problem)
    if place.logprobs is None:
        return Chosen(values[0], None)
    half, count = (len(values) - 2) // 2, place.logprobs
    ids, tops = values[2 : 2 + count], scores[2 + half : 2 + half + count]
    return Chosen(values[0], scores[1], list(zip(ids, tops, strict=True)))


def _read_fork(rows: Tensor) -> list[Candidate]:
    """Reads continuations: their beams, tokens, scores and log-probabilities, [4, count]."""
    beams, tokens = rows[:2].tolist()
    scores, logprobs = _numbers(rows[2:]).tolist()
    if _NO_TOKEN in tokens:
        raise not_numbers()
    pairs = zip(scores, beams, tokens, logprobs, strict=True)
    return [Candidate(*one) for one in pairs]


def _best(logits: Tensor, fork: Fork) -> Tensor:
    """Finds the best continuations of the beams of a prompt.

    Args:
        logits: The logits of each beam, [beams, vocab].
        fork: The beams.

    Returns:
        Numbers that `_read_fork` understands, [4, count].
    """
    is_broken = logits.isnan().any()
    plain = logits.log_softmax(dim=-1)
    rule, sums = fork.places[0].rule, _changed(plain, fork.places)
    if not rule.greedy:
        scores, ids = candidates(sums, rule, fork.keep)
        sums = torch.full_like(sums, -torch.inf).scatter_(-1, ids, scores)
    beams = torch.tensor(fork.scores[: len(logits)], device=logits.device)
    flat = (sums + beams.unsqueeze(1)).flatten()
    order = flat
    if not rule.greedy:
        # The largest sums of log-probabilities and Gumbel noise are a draw without replacement
        # (Vieira 2014, "Gumbel-max trick and weighted reservoir sampling").
        noise = torch.rand(flat.shape, generator=fork.places[0].generator).to(flat.device)
        order = flat - (-noise.log()).log()
    found = order.topk(fork.count).indices
    found = found[flat[found].argsort(descending=True, stable=True)]
    beam, token = found // logits.size(-1), found % logits.size(-1)
    columns = [beam.int(), token.int(), _bits(flat[found]), _bits(plain.flatten()[found])]
    return torch.stack(columns).masked_fill(is_broken, _NO_TOKEN)


def _width(places: Sequence[Place]) -> int:
    """Returns how many numbers tell what was chosen at a place."""
    wanted = [place.logprobs for place in places if place.logprobs is not None]
    return 2 + 2 * max(wanted) if wanted else 1


def _changed(logits: Tensor, places: Sequence[Place]) -> Tensor:
    """Returns the logits after what rules and grammars change of them, in a copy if any."""
    if any(place.rule.changes_logits or place.matcher for place in places):
        logits = logits.clone()
        for row, place in zip(logits, places, strict=True):
            penalize(row, place.rule, place.prompt, place.new)
            if place.matcher is not None:
                allowed = place.matcher.allowed(place.new).to(row.device)[: len(row)]
                row[: len(allowed)].masked_fill_(~allowed, -torch.inf)
                row[len(allowed) :] = -torch.inf
    return logits


def _bits(numbers: Tensor) -> Tensor:
    """Returns fp32 numbers as integers of the same bits."""
    return numbers.contiguous().view(torch.int32)


def _numbers(bits: Tensor) -> Tensor:
    """Returns integers of 32 bits as the fp32 numbers of the same bits."""
    return bits.contiguous().view(torch.float32)
