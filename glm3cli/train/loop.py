"""The training loop, the same for pretrain and finetune."""

from dataclasses import dataclass

from glm3cli.config.training import TrainConfig
from glm3cli.device import require_active
from glm3cli.errors import DataError, StoppedError
from glm3cli.train.checkpointer import Checkpointer
from glm3cli.train.profile import Profiler
from glm3cli.train.progress.state import State
from glm3cli.train.report.metrics import Metrics
from glm3cli.train.setup import TrainingParts
from glm3cli.train.signals import SAVE, StopFlag, described
from glm3cli.train.step import StepOutcome


@dataclass
class Trainer:
    """Trains from `state` to the end, or to a stop signal; the last step is always saved.

    Attributes:
        config: The settings.
        parts: Model, optimizer, and data on this rank.
        state: How far the run has come.
        metrics: What the run reports; rank 0 alone writes it.
        checkpointer: Writes the checkpoints.
        profiler: Traces the steps that --profile names.
        stop: The requests of signals and of --exit-duration.
        saved: The iteration of the newest checkpoint.
        skipped_in_a_row: The number of steps since the weights last changed.
    """

    config: TrainConfig
    parts: TrainingParts
    state: State
    metrics: Metrics
    checkpointer: Checkpointer
    profiler: Profiler
    stop: StopFlag
    saved: int = -1
    skipped_in_a_row: int = 0

    def run(self) -> State:
        """Trains, and gives the final state.

        Raises:
            StoppedError: A signal came; the run was saved.
            DataError: A sample doesn't fit the model, or too many steps in a row were skipped.
            CheckpointError: A checkpoint can't be written.
        """
        self.saved, request = self.state.iteration, self.stop.agreed()
        while self.state.iteration < self.config.train_iters and request <= SAVE:
            self._run_step()
            request = self.stop.agreed()
            if request == SAVE or _is_due(self.state.iteration, self.config.save_interval):
                self._save()
            if not request and _is_due(self.state.iteration, self.config.eval_interval):
                request = self._validate()
            self.checkpointer.poll()
        if request > SAVE:
            self.metrics.event("signal", **described(request))
        self._end()
        return self.state

    def _run_step(self) -> None:
        config, state, phases = self.config, self.state, self.parts.train_step.phases
        if state.consumed_samples in state.stepped_over:
            state.step_over(config.global_batch_size, config.seq_length)
            return
        self.profiler.begin(state.iteration + 1)
        phases.begin_step()
        outcome = self.parts.train_step.run(self.parts.train, state.consumed_samples)
        spent = phases.step()
        first = state.consumed_samples
        state.advance(outcome, config.global_batch_size, config.seq_length)
        seconds = sum(spent.values())
        self.metrics.step(state, outcome, seconds, require_active().peak_memory(), spent)
        self.profiler.end(state.iteration)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if outcome.skipped else 0
        if outcome.skipped:
            self._skipped(outcome, first)

    def _skipped(self, outcome: StepOutcome, first: int) -> None:
        """Tells of a step that left the weights as they were, and ends what leads nowhere."""
        iteration, last = self.state.iteration, self.state.consumed_samples - 1
        self.metrics.event(
            "skip",
            iteration=iteration,
            reason=outcome.reason,
            samples=f"{first} to {last}",
            loss_scale=outcome.loss_scale,
        )
        if self.skipped_in_a_row >= self.config.max_skipped:
            raise DataError(
                f"{self.skipped_in_a_row} steps in a row were skipped, the last one, {iteration}, "
                f"because its {outcome.reason}; its samples are {first} to {last}",
                "look at these samples; use a lower --lr, a longer --lr-warmup-iters, or --dtype "
                "bf16; or allow more by --max-skipped",
            )
        if self.config.rollback_on_nan and not outcome.is_overflow:
            self._roll_back(first)

    def _roll_back(self, first: int) -> None:
        """Goes back to the newest checkpoint; the batch that begins at `first` is left out."""
        self.checkpointer.finish()
        folder = self.checkpointer.newest(self.metrics)
        if folder is None:
            return
        counted = self.state
        self.state = self.checkpointer.load(
            folder, self.parts.train_step, self.metrics, event="rollback"
        )
        self.state.skipped, self.state.nan = counted.skipped, counted.nan
        self.state.stepped_over = [*counted.stepped_over, first]

    def _save(self) -> None:
        with self.parts.train_step.phases.phase("save"):
            self.saved = self.checkpointer.save(self.parts.train_step, self.state, self.metrics)

    def _validate(self) -> int:
        """Validates, unless a signal comes meanwhile, which it gives."""
        if self.parts.valid is None:
            return 0
        train_step = self.parts.train_step
        with train_step.phases.phase("validation"):
            loss = train_step.validate(self.parts.valid, self.config.eval_iters, self.stop)
        if loss is not None:
            self.metrics.validation(self.state.iteration, loss)
        return self.stop.agreed()

    def _end(self) -> None:
        self.profiler.close(self.state.iteration)
        if self.saved != self.state.iteration:
            self._save()
        with self.parts.train_step.phases.phase("save"):
            self.checkpointer.finish()
        self.metrics.stop(self.state, self.parts.train_step.phases.totals())
        if self.state.iteration < self.config.train_iters:
            raise StoppedError(
                f"stopped at iteration {self.state.iteration} of {self.config.train_iters} and "
                "saved",
                "run the same command again to go on",
            )


def _is_due(iteration: int, interval: int | None) -> bool:
    return interval is not None and iteration % interval == 0
