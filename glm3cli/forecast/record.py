"""Records what one rank of a pipeline stage does in a step, from the real model and optimizer.

One micro-batch runs on meta tensors, which have no data, in a world of ranks of which only this one
is there. This takes about a second, whatever the model's size.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from glm3cli.config.model import ModelConfig
from glm3cli.config.training import TrainConfig
from glm3cli.data.samples.loader import Batch
from glm3cli.device import DEVICES
from glm3cli.device.dtypes import TORCH_DTYPES
from glm3cli.device.planned import planned
from glm3cli.forecast.recorder import Operator, recording
from glm3cli.model.build import unwrap
from glm3cli.model.rotary import rotation_of_sequence
from glm3cli.parallel.groups import Grid, open_grid
from glm3cli.train.objective import NextTokenLoss, run_batch
from glm3cli.train.setup import build_train_step
from glm3cli.train.step import TrainStep


@dataclass(frozen=True)
class ChunkWork:
    """The operators of one micro-batch in one model chunk.

    Attributes:
        forward: The operators of the forward pass and, on the last stage, of the loss.
        backward: The operators of the backward pass.
    """

    forward: list[Operator]
    backward: list[Operator]


@dataclass(frozen=True)
class StageWork:
    """The operators of one rank of a pipeline stage.

    Attributes:
        chunks: The work of each model chunk of the stage per micro-batch.
        update: What is done once per step: clearing and reducing the gradients, and the
            optimizer's step.
        weights: What is sent once per step to gather weights during the forward pass; empty
            without `--overlap-param-gather`.
    """

    chunks: list[ChunkWork]
    update: list[Operator]
    weights: list[Operator]


def record_stage(config: TrainConfig, model: ModelConfig, kind: str, pp_rank: int) -> StageWork:
    """Records the work of the first rank of a pipeline stage; the CPU must be the active device.

    Args:
        config: The run's settings.
        model: The model's shape.
        kind: The kind of device that is planned for, as `--device` has it.
        pp_rank: The stage's rank in the pipeline.
    """
    with _alone(config, kind, pp_rank) as grid:
        train_step = build_train_step(config, model, grid)
        # Other objectives add a few operations on one number for each answer, and read them on the
        # host, which meta tensors can't.
        train_step = replace(train_step, objective=NextTokenLoss.of(config))
        step = _Step(config, model, train_step)
        # Whatever is made once for all steps, or in the first micro-batch, is made here.
        for _ in range(2):
            with recording():
                step.update()
            for chunk in range(config.vpp):
                step.run(chunk)
        chunks = [step.run(chunk) for chunk in range(config.vpp)]
        with recording() as update:
            step.update()
        with recording() as weights:
            step.gather_weights()
        return StageWork(chunks, update, weights)


@contextmanager
def _alone(config: TrainConfig, kind: str, pp_rank: int) -> Iterator[Grid]:
    """Opens the grid of a run's ranks as the first rank of a stage, without any other rank."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    rank = pp_rank * (config.world_size // config.pp)
    with ExitStack() as stack:
        stack.enter_context(planned(DEVICES[kind], config.without_kernel))
        # Its cache holds what the kernels of another device have made.
        rotation_of_sequence.cache_clear()
        stack.callback(rotation_of_sequence.cache_clear)
        dist.init_process_group("fake", rank=rank, world_size=config.world_size, store=FakeStore())
        yield stack.enter_context(open_grid(config, config.seed))


@dataclass(frozen=True)
class _Step:
    """The step of a run on meta tensors, part by part."""

    config: TrainConfig
    model: ModelConfig
    train_step: TrainStep

    def run(self, index: int) -> ChunkWork:
        """Runs a micro-batch through a chunk and back, without messages between stages."""
        chunk, grid = self.train_step.chunks[index], self.train_step.grid
        is_first = grid.is_first_stage and index == 0
        is_last = grid.is_last_stage and index == self.config.vpp - 1
        chunk.train()
        if not is_first:
            unwrap(chunk).set_input_tensor(self._hidden().requires_grad_())
        with recording() as forth:
            batch = self._batch()
            result = run_batch(chunk, batch)
            if is_last:
                result = self.train_step.objective.losses(batch, result)[0]
        grad = None if is_last else self._hidden()
        with chunk.no_sync(), recording() as back:  # type: ignore[operator]
            torch.autograd.backward(result, grad)
        return ChunkWork(forth, back)

    def update(self) -> None:
        """Does what `TrainStep.step` does once per step."""
        train_step = self.train_step
        count = torch.empty((), dtype=torch.int, device="meta")
        for chunk in train_step.chunks:
            any_chunk: Any = chunk
            any_chunk.zero_grad_buffer()
            if self.config.overlap_grad_reduce:
                any_chunk.start_grad_sync()
        train_step.optimizer.zero_grad()
        train_step.finalize(train_step.chunks, count)
        if self.config.dtype != "fp16":
            train_step.is_gradient_finite()
        train_step.optimizer.step()

    def gather_weights(self) -> None:
        """Gathers the weights, for which the next step's forward passes wait."""
        if self.config.overlap_param_gather:
            for chunk in self.train_step.chunks:
                any_chunk: Any = chunk
                any_chunk.start_param_sync(force_sync=True)

    @property
    def _num_sequences(self) -> int:
        """The number of sequences of a micro-batch; a pair has two."""
        return self.config.micro_batch_size * self.config.row_length // self.config.seq_length

    def _batch(self) -> Batch:
        """Makes a micro-batch, [b, s / cp] each."""
        config = self.config
        shape = self._num_sequences, config.seq_length // config.cp
        tokens = torch.empty(shape, dtype=torch.int64, device="meta")
        return Batch(tokens, tokens, torch.empty(shape, device="meta"))

    def _hidden(self) -> torch.Tensor:
        """Makes the tensor that goes from stage to stage, [s / shards, b, h]."""
        config = self.config
        shards = config.cp * (config.tp if config.sequence_parallel else 1)
        shape = config.seq_length // shards, self._num_sequences, self.model.hidden_size
        return torch.empty(shape, dtype=TORCH_DTYPES[config.dtype], device="meta")
