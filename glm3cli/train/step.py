"""`TrainStep`: one optimizer step through megatron-core's pipeline schedule, and validation."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

from glm3cli.data.samples.loader import Batch, Loader
from glm3cli.device import require_active
from glm3cli.model.dropout import AdapterDropout
from glm3cli.model.noise import EmbeddingNoise
from glm3cli.parallel.groups import Grid
from glm3cli.train.objective import Losses, LossFunction, Objective, run_batch
from glm3cli.train.pipeline import run_pipeline
from glm3cli.train.progress.phases import Phases
from glm3cli.train.progress.state import StepOutcome
from glm3cli.train.progress.totals import Totals
from glm3cli.train.signals import StopFlag


@dataclass(frozen=True)
class TrainStep:
    """What this rank needs for optimizer steps and for validations.

    All ranks must call the same methods with the same arguments.

    Attributes:
        objective: Makes the losses of a micro-batch.
        chunks: This rank's model chunks, each wrapped in megatron-core's DDP.
        optimizer: Megatron-core's optimizer of all chunks.
        scheduler: Megatron-core's schedule of the learning rate, counted in optimizer steps.
        grid: This rank's place among the parallel groups.
        noise: Adds noise to the embeddings in training; None for no noise.
        dropout: Drops inputs of adapters in training; None drops none.
        phases: The clock that adds up the seconds of forward and backward passes, the optimizer,
            and the waits for data.
    """

    objective: Objective
    chunks: list[torch.nn.Module]
    optimizer: Any
    scheduler: Any
    grid: Grid
    noise: EmbeddingNoise | None = None
    dropout: AdapterDropout | None = None
    phases: Phases = field(default_factory=Phases)
    _weights: list[Tensor] = field(default_factory=list)

    def finalize(self, chunks: list[torch.nn.Module], num_tokens: Tensor, **megatron: Any) -> None:
        """Reduces the gradients over the ranks, and makes them those of the mean loss.

        Megatron-core's schedule calls it after the last backward pass. The objective's division of
        the losses is undone.

        Args:
            chunks: This rank's model chunks.
            num_tokens: The sum of the weights that this rank has seen, as the schedule counts it:
                in whole numbers. Instead of it megatron-core gets the sum with its fraction, adds
                up those of all ranks, and divides the gradients by it.
            megatron: The schedule's further arguments, which are passed on.
        """
        weight = torch.zeros((), dtype=torch.float32, device=num_tokens.device)
        count = sum(self._weights, weight) / self.objective.loss_divisor
        # Where work is queued, it is only here that the host waits for the backward pass.
        queued = require_active().stream_ordered
        with self.phases.phase("forward_backward" if queued else "optimizer"):
            finalize_model_grads(chunks, count, **megatron)

    def close(self) -> None:
        """Drops what would keep the model, and so the process groups and their threads, alive.

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
        """Trains on one global batch.

        Weights, optimizer and schedule stay as they are where the loss or the gradient is not
        finite, or where the batch has nothing to train: weight decay and the decay of the moments
        would change them.

        Args:
            loader: Cuts the samples into this rank's micro-batches.
            consumed: The number of samples that all steps before have taken.

        Raises:
            DataError: A sample doesn't fit the model.
        """
        with self.phases.phase("forward_backward"):
            totals = self.forward_backward(loader, consumed)
        loss = totals.mean_loss
        lr = float(self.scheduler.get_lr({}))
        loss_scale = float(self.optimizer.get_loss_scale())
        with self.phases.phase("optimizer"):
            updated, grad_norm = False, math.nan if totals.weight else 0.0
            # fp16's loss scaler has to see what overflows; other optimizers would update with it.
            if totals.weight and (
                self._has_loss_scale or (math.isfinite(loss) and self.is_gradient_finite())
            ):
                updated, grad_norm, _ = self.optimizer.step()
            require_active().synchronize()
        if updated:
            self.scheduler.step(increment=1)
        return StepOutcome(
            loss=loss,
            num_tokens=totals.num_tokens,
            grad_norm=float(grad_norm or 0.0),
            loss_scale=loss_scale,
            lr=lr,
            skipped=not updated,
            is_overflow=not updated and self._has_loss_scale and math.isfinite(loss),
            means=totals.means(),
        )

    @property
    def _has_loss_scale(self) -> bool:
        """Whether the optimizer scales the loss (fp16), and so skips gradients that overflow."""
        return bool(self.optimizer.config.fp16)

    def is_gradient_finite(self) -> bool:
        """Returns whether the gradient is finite on all ranks; every rank must call it."""
        chunks: list[Any] = list(self.chunks)
        gradients = [buffer.grad_data for chunk in chunks for buffer in chunk.buffers]
        # A norm reads each element once. It may overflow though the elements are finite: only
        # then is each of them looked at.
        finite = all(
            bool(gradient.norm().isfinite()) or bool(gradient.isfinite().all())
            for gradient in gradients
        )
        flag = torch.tensor([not finite], dtype=torch.int, device=require_active().torch_device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return not int(flag)

    def forward_backward(self, loader: Loader, consumed: int) -> Totals:
        """Computes the gradient of one global batch, into the parameters' `main_grad`.

        Args:
            loader: Cuts the samples into this rank's micro-batches.
            consumed: The number of samples that all steps before have taken.

        Returns:
            What the objective reports of the global batch.

        Raises:
            DataError: A sample doesn't fit the model.
        """
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()  # type: ignore[operator]
        self.optimizer.zero_grad()
        return self._run_schedule(loader, consumed, forward_only=False)

    def validate(
        self, loader: Loader, num_batches: int, stop: StopFlag | None = None
    ) -> Totals | None:
        """Computes the loss of the first global batches, without training on them.

        Args:
            loader: Cuts the samples for validation into this rank's micro-batches.
            num_batches: The number of global batches.
            stop: The request to stop that ends the validation early; None asks nobody.

        Returns:
            What the objective reports of them together; None if `stop` has ended the validation.

        Raises:
            DataError: A sample doesn't fit the model.
        """
        for chunk in self.chunks:
            chunk.eval()
        totals = self._totals([], self.objective.metrics)
        with torch.no_grad():
            for batch in range(num_batches):
                if stop is not None and stop.is_ending():
                    return None
                consumed = batch * loader.global_batch_size
                totals += self._run_schedule(loader, consumed, forward_only=True)
        return totals

    def _run_schedule(self, loader: Loader, consumed: int, *, forward_only: bool) -> Totals:
        """Puts one global batch through megatron-core's pipeline schedule.

        Args:
            loader: Cuts the samples into this rank's micro-batches.
            consumed: The position in the samples at which the global batch begins.
            forward_only: Whether to leave the backward passes out.

        Returns:
            What the objective reports of the global batch.
        """
        self.objective.begin(loader, consumed, self.score)
        reports = self._run(self.objective.losses, loader, consumed, forward_only=forward_only)
        return self._totals(reports, self.objective.metrics)

    def score(
        self, losses: LossFunction, metrics: tuple[str, ...], loader: Loader, consumed: int
    ) -> Totals:
        """Runs a global batch through the model without training on it; every rank must call it.

        Args:
            losses: Makes the losses of a micro-batch, as `Objective.losses` does.
            metrics: The names of what they report.
            loader: Cuts the samples into this rank's micro-batches.
            consumed: The position in the samples at which the global batch begins.
        """
        return self._totals(self.run_forward(losses, loader, consumed), metrics)

    def run_forward(
        self, losses: LossFunction, loader: Loader, consumed: int
    ) -> list[dict[str, Tensor]]:
        """Runs a global batch forward as `score` does; every rank must call it.

        Returns:
            The report of each micro-batch of this rank; empty before the last stage.
        """
        modes = [chunk.training for chunk in self.chunks]
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad():
            reports = self._run(losses, loader, consumed, forward_only=True)
        for chunk, mode in zip(self.chunks, modes, strict=True):
            chunk.train(mode)
        return reports

    def _run(
        self, losses: LossFunction, loader: Loader, consumed: int, *, forward_only: bool
    ) -> list[dict[str, Tensor]]:
        """Returns the reports of this rank's micro-batches of a global batch."""
        self._weights.clear()
        # Every chunk reads the same micro-batches by itself: the schedule runs them out of step.
        iterators = [self.phases.waits(self._batches(loader, consumed)) for _ in self.chunks]
        reports: list[dict[str, Tensor]] = run_pipeline(
            partial(self._forward, losses),
            iterators,
            self.chunks,
            micro_batch_size=loader.micro_batch_size,
            lengths=loader.lengths(consumed),
            forward_only=forward_only,
        )
        return reports

    def _batches(self, loader: Loader, consumed: int) -> Iterator[Batch]:
        """Yields this rank's micro-batches, with what is prepared for each of them."""
        for batch in loader.microbatches(consumed):
            if batch.segment_ids is not None and batch.segments is not None:
                require_active().kernels.know_ends(batch.segment_ids, batch.segments.ends)
            if self.noise is not None:
                self.noise.places, self.noise.scales = batch.places, batch.scales
            if self.dropout is not None:
                self.dropout.places = batch.places
            yield batch

    def _forward(
        self, losses: LossFunction, batches: Iterator[Batch], chunk: torch.nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], Losses]]:
        """Runs the next micro-batch through a chunk, as megatron-core's schedule asks for it.

        Returns:
            The chunk's output, and the function that makes the losses of it on the last stage and
            notes their weights.
        """
        batch = next(batches)

        def noting(of_tokens: Tensor) -> Losses:
            value, weight, report = losses(batch, of_tokens)
            self._weights.append(weight.float())
            return value, weight.to(torch.int), report

        return run_batch(chunk, batch), noting

    def _totals(self, reports: list[dict[str, Tensor]], metrics: tuple[str, ...]) -> Totals:
        """Adds up the reports of the micro-batches over all ranks; all must call it.

        Args:
            reports: The objective's report of each micro-batch of this rank: a sum and a count by
                name, where names without any may be missing; empty before the last stage.
            metrics: The names of what is reported beside the loss.
        """
        names = ("loss", "tokens", *metrics)
        table = torch.zeros(len(names), 2, dtype=torch.float64)
        # The last stage knows the losses, every tensor parallel rank of it the same ones.
        if self.grid.is_last_stage and self.grid.tp_rank == 0:
            parts = [item for report in reports for item in report.items()]
            # One copy from the device, where each would wait for all that is queued there.
            values = [value for _, value in parts]
            copied = torch.stack(values).cpu().double() if values else values
            for (name, _), value in zip(parts, copied, strict=True):
                table[names.index(name)] += value
        # fp32 can't count many tokens, and not every chip computes in fp64, or its network reduces
        # it: the bits are gathered as whole numbers, and the host adds up.
        bits = table.view(torch.int64).to(require_active().torch_device())
        gathered = bits.new_empty(self.grid.world_size, *bits.shape)
        dist.all_gather(list(gathered.unbind()), bits)
        rows = gathered.cpu().view(torch.float64).sum(dim=0).tolist()
        return Totals({name: (row[0], row[1]) for name, row in zip(names, rows, strict=True)})
