"""The log-probability of every answer of a micro-batch, summed over its tokens.

An answer is a segment of a row; `data.kinds` says what its segment id means. With context
parallelism a rank has some of an answer's tokens, so that the sums go over the ranks that share a
sequence before a loss is made of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from glm3cli.data.samples.loader import Batch
from glm3cli.data.samples.segments import Segments
from glm3cli.parallel.groups import Grid
from glm3cli.train.objective import Losses


@dataclass(frozen=True)
class Answers:
    """Some of the n answers of a micro-batch.

    Attributes:
        logps: The log-probability of each under the model that trains, with its gradient, [n].
        references: The log-probability of each under the reference; 0 without one, [n].
        counts: The number of trained tokens of each, [n].
    """

    logps: Tensor
    references: Tensor
    counts: Tensor

    @property
    def logratios(self) -> Tensor:
        """The log-probabilities less those of the reference, [n]."""
        return self.logps - self.references

    @property
    def averages(self) -> Tensor:
        """The mean log-probability of a trained token of each answer, [n]."""
        return self.logps / self.counts


@dataclass(frozen=True)
class AnswerSums:
    """The sums over a micro-batch, the same on all ranks that share its sequences.

    Attributes:
        good: The answers that were chosen or liked, in the order of rows and segments.
        bad: The answers that were rejected or disliked, in the same order.
        nll: The sum of the losses of the tokens that `sum_answers` was asked for.
    """

    good: Answers
    bad: Answers
    nll: Tensor


def own_part(whole: Tensor, grid: Grid) -> Tensor:
    """Returns the positions [b, s] of this rank out of those of the whole sequences, [b, S]."""
    return whole.chunk(grid.cp_size, dim=1)[grid.cp_rank]


def whole_segment_ids(batch: Batch, grid: Grid) -> Tensor:
    """Returns the segment ids of a micro-batch, [b, S]; 1 everywhere if it has none."""
    if batch.segment_ids is not None:
        return batch.segment_ids
    rows, length = batch.tokens.shape
    return torch.ones(rows, length * grid.cp_size, dtype=torch.int64, device=batch.tokens.device)


def sums_of_answers(batch: Batch, losses: Tensor, grid: Grid) -> Tensor:
    """Sums the log-probabilities of each answer of a micro-batch over its trained tokens.

    Args:
        batch: The micro-batch.
        losses: The loss of each token, the negative of its log-probability, [b, s].
        grid: This rank's place among the parallel groups.

    Returns:
        The sums of log-probabilities, the numbers of trained tokens and, if the batch has them, the
        log-probabilities under the reference, [2 or 3, b, ids], of this rank and those with which
        it shares the sequences. The ids are those from 1 to an even number.
    """
    sums, _ = _all_sums(batch, losses, grid, None)
    return sums


def sum_answers(batch: Batch, losses: Tensor, grid: Grid, nll_mask: Tensor | None) -> AnswerSums:
    """Sums the log-probabilities of each answer of a micro-batch, and some of its tokens' losses.

    Args:
        batch: The micro-batch.
        losses: The loss of each token, the negative of its log-probability, [b, s].
        grid: This rank's place among the parallel groups.
        nll_mask: 1 for the tokens whose losses are also summed as such, else 0, [b, s]; None for
            none.
    """
    sums, nll = _all_sums(batch, losses, grid, nll_mask)
    return AnswerSums(_present(sums, batch, 1), _present(sums, batch, 2), nll)


def _all_sums(
    batch: Batch, losses: Tensor, grid: Grid, nll_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns what `sums_of_answers` does, and the sum of the losses where the mask is 1."""
    segment_ids = whole_segment_ids(batch, grid)
    last = max(1, _segments(batch).last)
    numbers = torch.arange(1, last + last % 2 + 1, device=segment_ids.device)
    # A product with the members instead of index_add: that adds in no fixed order on some chips.
    members = own_part(segment_ids, grid).unsqueeze(1) == numbers.view(1, -1, 1)  # [b, ids, s]
    values = [-losses.float() * batch.loss_mask, batch.loss_mask]
    if batch.reference is not None:
        values.append(batch.reference)
    sums = torch.stack([(members * value.unsqueeze(1)).sum(dim=2) for value in values])
    nll = (losses.float() * (0 if nll_mask is None else nll_mask)).sum()
    if grid.cp_size > 1:
        group = parallel_state.get_context_parallel_group()
        flat = _Sum.apply(torch.cat([sums.flatten(), nll.view(1)]), group)  # type: ignore[no-untyped-call]
        sums, nll = flat[:-1].view(sums.shape), flat[-1]
    return sums, nll


def _present(sums: Tensor, batch: Batch, first: int) -> Answers:
    """Returns the answers that have a trained token.

    Args:
        sums: The sums over segments, [2 or 3, b, ids].
        batch: The micro-batch.
        first: The first of their segment ids: 1 for the odd ones, or 2 for the even ones.
    """
    count = sums.size(2)
    trained = [(row, number) for row, number in _segments(batch).trained if number % 2 == first % 2]
    places = [row * count + number - 1 for row, number in trained]
    # By numbers, since the host would wait for those that a comparison picks.
    sums = sums.flatten(1)[:, torch.tensor(places, dtype=torch.int64, device=sums.device)]
    references = sums[2] if len(sums) > 2 else torch.zeros_like(sums[0])
    return Answers(logps=sums[0], references=references.detach(), counts=sums[1].detach())


def _segments(batch: Batch) -> Segments:
    """Returns what the host knows of the segments of a micro-batch of answers."""
    assert batch.segments is not None, "only texts have no segments"
    return batch.segments


def losses_of(
    total: Tensor,
    sums: AnswerSums,
    parts: Mapping[str, tuple[Tensor, float]],
    count: int,
    divisor: float,
    grid: Grid,
) -> Losses:
    """Returns what the train step needs for a micro-batch.

    Args:
        total: The sum of the losses of the micro-batch's samples.
        sums: The sums over the answers.
        parts: The sum and the count of each further mean, by name.
        count: The number of the losses.
        divisor: The objective's `loss_divisor`.
        grid: This rank's place among the parallel groups. Of the ranks that share a sequence, which
            have the same sums, the first counts.
    """
    is_first = grid.cp_rank == 0
    report = {
        name: torch.stack([one.detach().float(), one.new_tensor(size, dtype=torch.float32)])
        for name, (one, size) in {"loss": (total, count), **parts}.items()
        if is_first
    }
    if is_first:
        report["tokens"] = (sums.good.counts.sum() + sums.bad.counts.sum()).expand(2)
    return total / divisor, total.new_tensor(count if is_first else 0), report


def sum_over_ranks(counts: list[int], device: torch.device) -> list[int]:
    """Returns the sums of counts over all ranks that run the same stage; all of them must call it.

    Args:
        counts: This rank's counts, of its own positions of its own micro-batches.
        device: The device of this rank.
    """
    total = torch.tensor(counts, dtype=torch.int, device=device)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    dist.all_reduce(total, group=group)
    return [int(count) for count in total.tolist()]


class _Sum(torch.autograd.Function):
    """A sum over the ranks of a group, each of which goes on with it in the same way.

    Every rank computes the same loss of the sum, so that the gradient of its own part is that of
    the sum: it is not summed again.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return grads[0], None
