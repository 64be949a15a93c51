"""Chooses the next tokens of a forward pass, the same on every rank.

The last stage chooses and sends what it has chosen to the others: whole numbers of 32 bits alone,
the only ones that the host reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from glm3cli.infer.decoding.penalties import penalize
from glm3cli.infer.pipeline import Pipeline, not_numbers
from glm3cli.infer.sampling import Sampling, sample
from glm3cli.parallel.groups import Grid

# Stands for the token where logits are NaN: all stages read it, and fail together.
_NO_TOKEN = -1


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
    """

    rule: Sampling
    generator: torch.Generator
    prompt: Sequence[int]
    new: Sequence[int]
    logprobs: int | None


@dataclass(frozen=True)
class Chosen:
    """The token that was chosen at a place.

    Attributes:
        token: The token id.
        logprob: Its log-probability (natural logarithm) before the rule has changed the logits;
            None if it isn't wanted.
        top: The likeliest tokens with their log-probabilities.
    """

    token: int
    logprob: float | None
    top: list[tuple[int, float]] = field(default_factory=list)


class Chooser:
    """Chooses tokens together with the ranks that share the model."""

    def __init__(self, pipeline: Pipeline, grid: Grid, device: torch.device) -> None:
        self._pipeline, self._grid, self._device = pipeline, grid, device

    def choose(self, logits: Tensor | None, places: Sequence[Place]) -> Tensor:
        """Chooses tokens on the last stage; the others get an empty tensor of the same shape.

        Args:
            logits: This rank's part of the logits, [places, vocabulary / tp]; None before the last
                stage.
            places: The places, in the order of the logits.

        Returns:
            A row of 32-bit numbers for each place, which `read` understands.
        """
        width = _width(places)
        if logits is None:
            return torch.empty((len(places), width), dtype=torch.int32, device=self._device)
        is_plain = all(place.rule.greedy and not place.rule.changes_logits for place in places)
        if is_plain and width <= 2:
            return self._likeliest(logits, wants_logprobs=width == 2)
        logits = self._pipeline.whole_vocabulary(logits)
        is_broken = logits.isnan().any(dim=-1)
        logits = logits.masked_fill(is_broken.unsqueeze(1), 0)
        tokens = _draw(logits, places)
        columns = [tokens.unsqueeze(1).int()]
        if width > 1:
            total = logits.logsumexp(dim=-1, keepdim=True)
            columns.append(_bits(logits.gather(1, tokens.unsqueeze(1)) - total))
            top, ids = logits.topk((width - 2) // 2, dim=-1)
            columns += [ids.int(), _bits(top - total)]
        columns[0].masked_fill_(is_broken.unsqueeze(1), _NO_TOKEN)
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
            parts = own.new_empty(self._grid.tp_size, *own.shape)
            dist.all_gather_into_tensor(parts, own, group=self._grid.tp_group)
            best = _numbers(parts[:, :, 1]).argmax(dim=0)  # of equal ones the first, as in one row
            own = parts.gather(0, best[None, :, None].expand(1, *own.shape))[0]
            if wants_logprobs:
                own[:, 2] = _bits(_numbers(parts[:, :, 2]).logsumexp(dim=0))
        own[:, 0].masked_fill_(_numbers(own[:, 1]).isnan(), _NO_TOKEN)
        if not wants_logprobs:
            return own[:, :1].contiguous()
        own[:, 1] = _bits(_numbers(own[:, 1]) - _numbers(own[:, 2]))
        return own[:, :2].contiguous()


def read(rows: Tensor, places: Sequence[Place]) -> list[Chosen]:
    """Reads what `Chooser.choose` has chosen, [places, numbers], on the host.

    Raises:
        CheckpointError: The logits of a place are NaN.
    """
    numbers = rows.cpu()
    floats, width = _numbers(numbers).tolist(), numbers.size(1)
    found = []
    for values, scores, place in zip(numbers.tolist(), floats, places, strict=True):
        count = place.logprobs or 0
        if values[0] == _NO_TOKEN:
            raise not_numbers()
        half = (width - 2) // 2
        top = list(zip(values[2 : 2 + count], scores[2 + half : 2 + half + count], strict=True))
        logprob = None if place.logprobs is None else scores[1]
        found.append(Chosen(values[0], logprob, top))
    return found


def _width(places: Sequence[Place]) -> int:
    """Returns how many numbers tell what was chosen at a place."""
    wanted = [place.logprobs for place in places if place.logprobs is not None]
    return 2 + 2 * max(wanted) if wanted else 1


def _draw(logits: Tensor, places: Sequence[Place]) -> Tensor:
    """Returns the token of each place, [places], after its rule has changed the logits."""
    if any(place.rule.changes_logits for place in places):
        logits = logits.clone()
        for row, place in zip(logits, places, strict=True):
            penalize(row, place.rule, place.prompt, place.new)
    return sample(logits, [p.rule for p in places], [p.generator for p in places])


def _bits(numbers: Tensor) -> Tensor:
    """Returns fp32 numbers as integers of the same bits."""
    return numbers.contiguous().view(torch.int32)


def _numbers(bits: Tensor) -> Tensor:
    """Returns integers of 32 bits as the fp32 numbers of the same bits."""
    return bits.contiguous().view(torch.float32)
