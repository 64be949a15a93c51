"""One optimizer step through megatron-core's pipeline schedule, and validation by the same way."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from glm3cli.data.samples.loader import Loader
from glm3cli.device import require_active
from glm3cli.parallel.groups import Grid
from glm3cli.train.objective import Objective
from glm3cli.train.progress.phases import Phases
from glm3cli.train.signals import StopFlag


@dataclass(frozen=True)
class StepOutcome:
    """What one step did.

    Attributes:
        loss: Mean over all trained tokens of the global batch.
        num_tokens: Trained tokens of the global batch.
        grad_norm: Norm of the whole gradient before clipping.
        skipped: Whether the weights stayed as they were.
        is_overflow: Whether that was fp16's loss scale, which is tried anew with a smaller one.
    """

    loss: float
    num_tokens: int
    grad_norm: float
    loss_scale: float
    lr: float
    skipped: bool
    is_overflow: bool = False

    @property
    def is_nan(self) -> bool:
        """Whether the loss or the gradient is not a finite number, by itself."""
        return not math.isfinite(self.loss) or (
            not self.is_overflow and not math.isfinite(self.grad_norm)
        )

    @property
    def reason(self) -> str:
        """What was wrong with a skipped step, as in "its ..."."""
        if not math.isfinite(self.loss):
            return "loss is not a number"
        return "gradient overflows" if self.is_overflow else "gradient is not a number"


@dataclass(frozen=True)
class TrainStep:
    """One optimizer step of a run on this rank, and a validation by the same way.

    Attributes:
        objective: The forward pass and the loss of a micro-batch.
        chunks: This rank's model chunks, each wrapped in megatron-core's DDP.
        optimizer: Megatron-core's optimizer of all chunks.
        scheduler: Megatron-core's schedule of the learning rate, counted in samples.
        grid: This rank's coordinates.
        seq_length: Tokens of a sample, over all context parallel ranks.
        micro_batch_size: Samples of a micro-batch.
        phases: The clock that adds up the seconds of forward and backward passes, the optimizer,
            and the waits for data.
    """

    objective: Objective
    chunks: list[torch.nn.Module]
    optimizer: Any
    scheduler: Any
    grid: Grid
    seq_length: int
    micro_batch_size: int
    phases: Phases = field(default_factory=Phases)

    def finalize(
        self, chunks: list[torch.nn.Module], num_tokens: Tensor | None = None, **megatron: Any
    ) -> None:
        """Reduces the gradients and divides them by the tokens of the global batch."""
        count = None if num_tokens is None else num_tokens / self.objective.loss_divisor
        # Where work is queued, it is only here that the host waits for the backward pass.
        queued = require_active().stream_ordered
        with self.phases.phase("forward_backward" if queued else "optimizer"):
            finalize_model_grads(chunks, count, **megatron)

    def close(self) -> None:
        """Lets go of the model, which would keep the process groups and their threads alive.

        DDP's hooks hold it in a cycle through autograd that Python's collector can't see, and
        megatron-core's config, which outlives it, through the functions that it was given.
        """
        for chunk in self.chunks:
            chunk.grad_accs.clear()  # type: ignore[operator, union-attr]
            config: Any = chunk.config
            config.finalize_model_grads_func = None
            config.grad_scale_func = None
            config.no_sync_func = None

    def run(self, loader: Loader, consumed: int) -> StepOutcome:
        """Trains on the global batch that starts after `consumed` samples."""
        with self.phases.phase("forward_backward"):
            loss, num_tokens = self.forward_backward(loader, consumed)
        lr = float(self.scheduler.get_lr({}))
        loss_scale = float(self.optimizer.get_loss_scale())
        with self.phases.phase("optimizer"):
            updated, grad_norm = False, math.nan
            # fp16's loss scale has to see what overflows; others would update with it.
            if self._has_loss_scale or (math.isfinite(loss) and self.is_gradient_finite()):
                updated, grad_norm, _ = self.optimizer.step()
            require_active().synchronize()
        if updated:
            self.scheduler.step(increment=loader.global_batch_size)
        return StepOutcome(
            loss=loss / max(num_tokens, 1),
            num_tokens=num_tokens,
            grad_norm=float(grad_norm or 0.0),
            loss_scale=loss_scale,
            lr=lr,
            skipped=not updated,
            is_overflow=not updated and self._has_loss_scale and math.isfinite(loss),
        )

    @property
    def _has_loss_scale(self) -> bool:
        """Whether the optimizer itself looks for numbers that are not finite (fp16)."""
        return bool(self.optimizer.config.fp16)

    def is_gradient_finite(self) -> bool:
        """Whether every number of the gradient is finite, on every rank alike.

        A norm sees each number once; one that has overflowed by itself is looked into.
        """
        chunks: list[Any] = list(self.chunks)
        gradients = [buffer.grad_data for chunk in chunks for buffer in chunk.buffers]
        finite = all(
            bool(gradient.norm().isfinite()) or bool(gradient.isfinite().all())
            for gradient in gradients
        )
        flag = torch.tensor([not finite], dtype=torch.int, device=gradients[0].device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return not int(flag)

    def forward_backward(self, loader: Loader, consumed: int) -> tuple[float, int]:
        """Leaves the gradient of one global batch in the parameters' `main_grad`.

        Returns:
            Sum of the token losses and number of trained tokens of the global batch.
        """
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()  # type: ignore[operator]
        self.optimizer.zero_grad()
        return self._run_schedule(loader, consumed, forward_only=False)

    def validate(
        self, loader: Loader, num_batches: int, stop: StopFlag | None = None
    ) -> float | None:
        """Mean loss over the tokens of the first `num_batches` global batches of `loader`.

        None where `stop` has asked to end before.
        """
        for chunk in self.chunks:
            chunk.eval()
        total, num_tokens = 0.0, 0
        with torch.no_grad():
            for batch in range(num_batches):
                if stop is not None and stop.is_ending():
                    return None
                consumed = batch * loader.global_batch_size
                loss, tokens = self._run_schedule(loader, consumed, forward_only=True)
                total, num_tokens = total + loss, num_tokens + tokens
        return total / max(num_tokens, 1)

    def _run_schedule(
        self, loader: Loader, consumed: int, *, forward_only: bool
    ) -> tuple[float, int]:
        """Sum of the token losses and number of trained tokens, over all ranks."""
        num_microbatches = loader.global_batch_size // (loader.micro_batch_size * loader.dp_size)
        # Every chunk reads the same micro-batches by itself: the schedule runs them out of step.
        iterators = [self.phases.waits(loader.microbatches(consumed)) for _ in self.chunks]
        reports: list[dict[str, Tensor]] = get_forward_backward_func()(
            forward_step_func=self.objective.forward,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=num_microbatches,
            seq_length=self.seq_length,
            micro_batch_size=self.micro_batch_size,
            forward_only=forward_only,
        )
        return self._sum(reports)

    def _sum(self, reports: list[dict[str, Tensor]]) -> tuple[float, int]:
        # The last stage knows the losses, every tensor parallel rank of it the same ones.
        totals = torch.zeros(2, dtype=torch.float64)
        if self.grid.is_last_stage and self.grid.tp_rank == 0:
            for report in reports:
                totals += report["sums"].to("cpu", torch.float64)
        totals = totals.to(next(self.chunks[0].parameters()).device)
        # Gathered, not reduced: not every backend reduces fp64, and fp32 can't count many tokens.
        gathered = [torch.zeros_like(totals) for _ in range(self.grid.world_size)]
        dist.all_gather(gathered, totals)
        loss, num_tokens = torch.stack(gathered).sum(dim=0).tolist()
        return loss, int(num_tokens)
