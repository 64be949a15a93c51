"""`Pipeline`: this rank's part of a model, and forward passes through all of it."""

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from glm3cli.checkpoint.adapter.pairs import Adapter
from glm3cli.checkpoint.adapter.transfer import load_adapter, shapes_of
from glm3cli.checkpoint.load import load_weights
from glm3cli.checkpoint.source import WeightSource
from glm3cli.config.model import DType
from glm3cli.config.parallel import ParallelConfig
from glm3cli.device import require_active
from glm3cli.errors import CheckpointError
from glm3cli.infer.selected import Selected
from glm3cli.infer.steps import Steps, why_not_captured
from glm3cli.model.build import build_chunks, transformer_config, unwrap
from glm3cli.model.cache import KVCache, Run
from glm3cli.model.decoder import Decoder
from glm3cli.parallel.groups import Grid

_log = logging.getLogger(__name__)


class Pipeline:
    """This rank's part of a model, which runs forward passes together with the other ranks' parts.

    The ranks that share a copy of the model must call the same methods with the same arguments.
    """

    def __init__(
        self,
        source: WeightSource,
        parallel: ParallelConfig,
        dtype: DType,
        grid: Grid,
        adapter: Adapter | None = None,
        bits: int | None = None,
        choices: Mapping[str, Adapter] | None = None,
    ) -> None:
        """Builds this rank's part of the model, and loads its weights.

        Args:
            source: The weights.
            parallel: The parallel sizes.
            dtype: The type in which the model runs.
            grid: This rank's place among the parallel groups.
            adapter: A LoRA adapter of the model; None for the bare model.
            bits: The bits to which weights are rounded, 8 or 4; None leaves them as they are.
            choices: Adapters by their names, among which each run of tokens chooses; they go
                without `adapter`.

        Raises:
            CheckpointError: The source lacks a tensor or can't be read.
        """
        self._grid = grid
        # A decoded token is one position: it can't be split over tensor parallel ranks.
        config = transformer_config(source.model, parallel, dtype, sequence_parallel=False)
        built = adapter or next(iter((choices or {}).values()), None)
        shapes = None if built is None else shapes_of(built, source.model)
        gpt = unwrap(build_chunks(source.model, parallel, config, shapes)[0].eval())
        load_weights([gpt], source, parallel, grid)
        if adapter is not None:
            load_adapter([gpt], adapter, source.model, grid)
        selected = Selected() if choices else None
        for name, choice in (choices or {}).items():
            assert selected is not None
            load = partial(load_adapter, [gpt], choice, source.model, grid)
            selected.add(name, gpt.decoder.layers, shapes_of(choice, source.model), load)
        self._decoder = Decoder(gpt, source.model, grid.tp_group, bits, selected)
        self._dtype, self._device = config.params_dtype, require_active().torch_device()
        self._captures = require_active().captures_steps
        if self._captures and (reason := why_not_captured(grid, selected is not None)):
            self._captures = False
            if grid.rank == 0:
                _log.warning("decoding launches each operation by itself: %s", reason)
        self._model, self._is_warned = source.model, False
        self._sent: deque[tuple[Any, Tensor]] = deque()

    def new_cache(self, *, for_steps: bool = False) -> KVCache:
        """Returns a KV cache for this rank's layers that has no rows yet.

        Args:
            for_steps: Whether it is for `new_steps`.
        """
        decoder = self._decoder
        return KVCache(
            decoder.num_layers,
            decoder.groups,
            self._model.kv_channels,
            self._dtype,
            self._device,
            num_spare=int(for_steps and self._captures),
        )

    def new_steps(self, cache: KVCache) -> Steps | None:
        """Returns what runs captured steps over a cache; None if the device captures none."""
        if not self._captures:
            return None
        return Steps(self._decoder, cache, require_active(), is_last=self._grid.is_last_stage)

    def forward(
        self, runs: Sequence[Run], cache: KVCache, wanted: Sequence[int] | None = None
    ) -> Tensor | None:
        """Runs one forward pass through the pipeline, which fills the cache.

        This rank doesn't wait for the stages after its own.

        Args:
            runs: The new tokens, at most one run for each row of the cache.
            cache: The cache, whose rows have room for the tokens.
            wanted: The tokens whose logits are wanted, by their indices in all runs one after the
                other; None for all of them.

        Returns:
            This tensor parallel rank's part of the logits in fp32, [wanted, vocabulary / tp]; None
            before the last stage, or if none is wanted.
        """
        num_tokens = sum(len(run.tokens) for run in runs)
        self._watch_positions(max(run.end for run in runs))
        if self._grid.is_first_stage:
            ids = [token for run in runs for token in run.tokens]
            hidden = self._decoder.embed(torch.tensor(ids, device=self._device))
        else:
            hidden = self._received(num_tokens)
        hidden = self._decoder.forward(hidden, runs, cache)
        if not self._grid.is_last_stage:
            self._send(hidden)
            return None
        if wanted is not None and len(wanted) < num_tokens:
            if not wanted:
                return None
            hidden = hidden[torch.tensor(wanted, device=hidden.device)]
        return self._decoder.logits(hidden).float()

    def step(self, runs: Sequence[Run], steps: Steps, length: int) -> Tensor | None:
        """Does what `forward` does, for one more token of each text, by a captured step.

        Args:
            runs: The tokens, one in each run.
            steps: The steps of the cache, whose rows have room for the tokens.
            length: The most slots of a row that are seen, one of a few numbers.

        Returns:
            This rank's part of the logits in fp32, [runs, vocabulary / tp], which hold until the
            next step; None before the last stage.
        """
        self._watch_positions(max(run.end for run in runs))
        received = None
        if not self._grid.is_first_stage:
            received = self._received(steps.num_rows(runs))
        result = steps.run(runs, length, received)
        if self._grid.is_last_stage:
            return result
        self._send(result.clone())  # the next step overwrites it, maybe before it has arrived
        return None

    def _watch_positions(self, length: int) -> None:
        """Warns once where sequences get longer than those that the model was trained on.

        Args:
            length: The length of the longest sequence that a forward pass reads, in tokens.
        """
        if length > self._model.seq_length and not self._is_warned:
            self._is_warned = True
            if self._grid.rank == 0:
                _log.warning(
                    "warning: a sequence gets longer than the %d positions that the model was "
                    "trained on (seq_length of its config.json); expect nonsense behind them",
                    self._model.seq_length,
                )

    def _received(self, num_tokens: int) -> Tensor:
        """Returns the hidden states that the stage before this one sends, [tokens, h]."""
        shape = (num_tokens, self._model.hidden_size)
        hidden = torch.empty(shape, dtype=self._dtype, device=self._device)
        dist.recv(hidden, self._neighbour(-1), group=self._grid.pp_group)
        return hidden

    def _send(self, hidden: Tensor) -> None:
        """Begins to send hidden states to the next stage, and waits for what was sent long ago."""
        # Every stage may be a pass behind the one before it.
        self._wait_for_all_but(self._grid.pp_size - 1)
        work = dist.isend(hidden, self._neighbour(1), group=self._grid.pp_group)
        self._sent.append((work, hidden))

    def finish_sending(self) -> None:
        """Waits until all is sent: a rank that hears of no later stage may not end before."""
        self._wait_for_all_but(0)

    def _wait_for_all_but(self, count: int) -> None:
        """Waits for what was sent before the last `count` messages."""
        while len(self._sent) > count:
            self._sent.popleft()[0].wait()

    def _neighbour(self, step: int) -> int:
        """Returns the rank that runs the stage so many after this one."""
        return dist.get_global_rank(self._grid.pp_group, self._grid.pp_rank + step)

    def whole_vocabulary(self, logits: Tensor) -> Tensor:
        """Returns the logits of all tensor parallel ranks, [n, vocabulary / tp] -> [n, vocabulary].

        The ranks of the last stage must call it together.
        """
        if self._grid.tp_size == 1:
            return logits
        return self.gather(logits).transpose(0, 1).flatten(1)

    def gather(self, tensor: Tensor) -> Tensor:
        """Returns the tensors of all tensor parallel ranks, which must call it together."""
        return self._decoder.collectives.gather(tensor)

    def from_last_stage(self, tensor: Tensor) -> "Arriving":
        """Begins to send the last stage's tensor to the other stages, which pass one of its shape.

        Every rank of the pipeline must call it, but none waits for another one.
        """
        work = None
        if self._grid.pp_size > 1:
            source = self._grid.last_stage_rank
            work = dist.broadcast(tensor, source, group=self._grid.pp_group, async_op=True)
        return Arriving(tensor, work)


class Arriving:
    """A tensor that is under way to this rank."""

    def __init__(self, tensor: Tensor, work: Any) -> None:
        self._tensor, self._work = tensor, work

    def wait(self) -> Tensor:
        """Returns the tensor when it is here."""
        if self._work is not None:
            self._work.wait()
        return self._tensor


def not_numbers() -> CheckpointError:
    """Returns the error for logits that are NaN."""
    return CheckpointError(
        "the model's logits are NaN",
        "use --dtype bf16 or fp32 if this is fp16; otherwise the weights are damaged",
    )
