"""`Steps`: passes that continue texts by one token each, captured as graphs of the device.

Launched one by one, the operations of a decoded token keep the host longer than the device. A graph
is launched as a whole, and works on the tensors with which it was captured: the numbers that change
from token to token are copied into them before. There is one graph for each number of rows and each
length of them, powers of two both, captured when it is first needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glm3cli.device import Device
from glm3cli.device.base import Work
from glm3cli.model.cache import KVCache, Run, Step, bucket
from glm3cli.model.decoder import Decoder
from glm3cli.parallel.groups import Grid

# The rows of a step's numbers: the tokens, their slots, the rows of the cache that get their keys
# and values, and the rows whose logits are wanted, in the order of the runs.
_NUMBERS = 4


@dataclass(frozen=True)
class _Tensors:
    """What a step reads.

    Attributes:
        numbers: The numbers that change from step to step, [4, n].
        hidden: The hidden states that the stage before sends, [n, h]; None on the first stage.
    """

    numbers: Tensor
    hidden: Tensor | None


class Steps:
    """The steps of one cache on this rank's stage of the pipeline."""

    def __init__(self, decoder: Decoder, cache: KVCache, device: Device, *, is_last: bool) -> None:
        """Makes them without any graph.

        Args:
            decoder: This rank's layers.
            cache: The cache, which must have a spare row.
            device: The device, which must capture steps.
            is_last: Whether this stage has the output layer.
        """
        self._decoder, self._cache, self._device = decoder, cache, device
        self._is_last = is_last
        self._forget()

    def _forget(self) -> None:
        """Forgets all graphs: they work on the cache's memory as it was when they were captured."""
        self._slots = self._cache.slots
        self._made: dict[tuple[int, int], tuple[_Tensors, Work]] = {}
        self._graphs = self._device.new_graphs()

    def num_rows(self, runs: Sequence[Run]) -> int:
        """Returns the number of rows of the step that continues some texts."""
        return min(bucket(max(run.row for run in runs) + 1), self._cache.num_rows)

    def run(self, runs: Sequence[Run], length: int, received: Tensor | None) -> Tensor:
        """Continues texts by one token each, and caches its key and value.

        Args:
            runs: The tokens, one in each run.
            length: The most slots of a row that are seen, one of a few numbers.
            received: The hidden states of all rows from the stage before, [rows, h]; None on the
                first stage.

        Returns:
            On the last stage the logits of the runs in fp32, [runs, vocabulary / tp]; before it the
            hidden states of all rows, [rows, h]. They hold until the next step.

        Raises:
            DeviceError: The step can't be captured.
        """
        if self._cache.slots is not self._slots:
            self._forget()
        count = self.num_rows(runs)
        made = self._made.get((count, length))
        tensors = made[0] if made else self._tensors(count, received)
        self._device.upload(self._numbers(runs, count), tensors.numbers)
        if received is not None and tensors.hidden is not None:
            tensors.hidden.copy_(received)
        if made is None:
            replay = self._graphs.capture(lambda: self._compute(tensors, length))
            made = self._made[count, length] = (tensors, replay)
        result = made[1]()
        return result[: len(runs)] if self._is_last else result

    def _tensors(self, count: int, received: Tensor | None) -> _Tensors:
        """Makes the tensors for a number of rows."""
        place = self._device.torch_device()
        numbers = torch.zeros(_NUMBERS, count, dtype=torch.int64, device=place)
        return _Tensors(numbers, None if received is None else torch.empty_like(received))

    def _numbers(self, runs: Sequence[Run], count: int) -> list[list[int]]:
        """Returns the numbers of a step over so many rows.

        A row that takes no part has the token 0 at the slot 0 of the cache's spare row: nobody gets
        what it computes.
        """
        tokens, slots, rows = [0] * count, [0] * count, [self._cache.num_rows] * count
        for run in runs:
            tokens[run.row], slots[run.row], rows[run.row] = run.tokens[0], run.start, run.row
        wanted = [run.row for run in runs]
        return [tokens, slots, rows, wanted + [0] * (count - len(runs))]

    def _compute(self, tensors: _Tensors, length: int) -> Tensor:
        """Computes a step on the device alone."""
        tokens, slots, rows, wanted = tensors.numbers
        # The layers overwrite what they get.
        given = tensors.hidden
        hidden = self._decoder.embed(tokens) if given is None else given.clone()
        hidden = self._decoder.step(hidden, Step(tokens, slots, rows, length), self._cache)
        if not self._is_last:
            return hidden
        return self._decoder.logits(hidden[wanted]).float()


def why_not_captured(grid: Grid, has_choices: bool) -> str | None:
    """Returns why steps aren't captured, on a device that captures some; None if they are.

    Args:
        grid: This rank's place among the parallel groups.
        has_choices: Whether each text chooses its adapter.
    """
    if grid.tp_size > 1:
        return f"--tp {grid.tp_size} sums between ranks within a step, which isn't captured"
    if has_choices:
        return "with --lora NAME=ADAPTER the rows of an adapter change from step to step"
    return None
