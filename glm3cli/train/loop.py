"""`Trainer`: the training loop, the same for pretrain and finetune."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from glm3cli.config.training import TrainConfig
from glm3cli.device import require_active
from glm3cli.errors import DataError, StoppedError
from glm3cli.train.checkpointer import Checkpointer
from glm3cli.train.probe import Probe
from glm3cli.train.profile import Profiler
from glm3cli.train.progress.operators import Recorder, describe
from glm3cli.train.progress.state import State, StepOutcome
from glm3cli.train.report.metrics import Metrics
from glm3cli.train.setup import TrainingParts
from glm3cli.train.signals import SAVE, StopFlag, signal_details


@dataclass
class Trainer:
    """Trains from `state` to the last iteration, or until something stops it earlier.

    That may be a signal, --exit-duration, or --early-stop. A step is validated before it is saved,
    so that its checkpoint knows the validation; the last step is always saved.

    Attributes:
        config: The settings of the run.
        parts: The model, the optimizer, and the data loaders on this rank.
        state: The progress of the run.
        metrics: The report of the run; rank 0 alone writes it.
        checkpointer: Writes and restores the checkpoints.
        profiler: Traces the steps that --profile names.
        stop: The requests to save or to stop, by signals and by --exit-duration.
        probes: Look at the model with each validation.
        saved: The iteration of the newest checkpoint.
        skipped_in_a_row: The number of steps since the weights last changed.
        has_numbers: Whether a step had a loss and a gradient that are numbers.
        are_operators_known: Whether a step was recorded, and its operators reported.
    """

    config: TrainConfig
    parts: TrainingParts
    state: State
    metrics: Metrics
    checkpointer: Checkpointer
    profiler: Profiler
    stop: StopFlag
    probes: Sequence[Probe] = ()
    saved: int = -1
    skipped_in_a_row: int = 0
    has_numbers: bool = False
    are_operators_known: bool = False

    def run(self) -> State:
        """Trains to the last iteration and returns the final state; all ranks must call it.

        Raises:
            StoppedError: A signal or --exit-duration has stopped the run, which was saved.
            DataError: A sample doesn't fit the model, too many steps in a row were skipped, or
                no step had a loss and a gradient that are numbers.
            CheckpointError: A checkpoint can't be written, or none can be gone back to.
        """
        self.saved, request = self.state.iteration, self.stop.agreed()
        if self.state.iteration and request <= SAVE:  # a stop may have kept it from being done
            request = max(request, self._validate_if_due())
        while not self._has_ended() and request <= SAVE:
            self._train_or_step_over()
            request = self.stop.agreed()
            if request <= SAVE:
                request = max(request, self._validate_if_due())
            if request == SAVE or self._is_to_be_saved():
                self._save()
            self.checkpointer.poll()
        if request > SAVE:
            self.metrics.event("signal", **signal_details(request))
        self._end()
        return self.state

    def _has_ended(self) -> bool:
        """Returns whether all steps are done, or --early-stop says that none is to follow."""
        return self.state.iteration >= self.config.train_iters or self._stops_early()

    def _stops_early(self) -> bool:
        """Returns whether --early-stop validations in a row had no lower loss."""
        patience = self.config.early_stop
        return patience is not None and self.state.without_better >= patience

    def _is_to_be_saved(self) -> bool:
        """Returns whether --save-interval or --keep-best asks for a checkpoint of this step."""
        iteration = self.state.iteration
        is_best = self.state.best_iteration == iteration
        return _is_due(iteration, self.config.save_interval) or (self.config.keep_best and is_best)

    def _train_or_step_over(self) -> None:
        """Trains on the next global batch and reports the step, unless that batch is left out."""
        config, state, phases = self.config, self.state, self.parts.train_step.phases
        size = self.parts.train.step_size(state.consumed_samples)
        if state.leaves_out(config.global_batch_size):
            state.step_over(config.global_batch_size, size.tokens)
            return
        self.profiler.begin(state.iteration + 1)
        phases.begin_step()
        with nullcontext() if self.are_operators_known else Recorder() as recorder:
            outcome = self.parts.train_step.run(self.parts.train, state.consumed_samples)
        spent = phases.step()
        first = state.consumed_samples
        state.advance(outcome, config.global_batch_size, size.tokens)
        self.metrics.step(state, outcome, size, require_active().peak_memory(), spent)
        if recorder is not None:
            self.are_operators_known = True
            self.metrics.event("operators", **describe(recorder.seen))
        self.profiler.end(state.iteration)
        self.has_numbers |= not outcome.is_nan
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if outcome.skipped else 0
        if outcome.skipped:
            self._react_to_skip(outcome, first)

    def _react_to_skip(self, outcome: StepOutcome, first: int) -> None:
        """Reports a step that left the weights as they were, and goes back or gives up if asked to.

        Args:
            outcome: What the step did.
            first: The position of its first sample.

        Raises:
            DataError: --max-skipped steps in a row were skipped.
        """
        iteration, last = self.state.iteration, self.state.consumed_samples - 1
        self.metrics.event(
            "skip",
            iteration=iteration,
            reason=outcome.reason,
            samples=f"{first} to {last}",
            loss_scale=outcome.loss_scale,
        )
        if self.skipped_in_a_row >= self.config.max_skipped:
            way = "use a lower --lr, a longer --lr-warmup-iters, or --dtype bf16"
            if not outcome.num_tokens:
                way = "give a --seq-length that leaves room for answers"
            raise DataError(
                f"{self.skipped_in_a_row} steps in a row were skipped, the last one, {iteration}, "
                f"because its {outcome.reason}; its samples are {first} to {last}",
                f"look at these samples; {way}; or allow more by --max-skipped",
            )
        if self.config.rollback_on_nan and outcome.is_nan:
            self._roll_back(first)

    def _roll_back(self, first: int) -> None:
        """Goes back to the last checkpoint, if there is one, and marks a batch as left out.

        Args:
            first: The position of the batch's first sample.
        """
        self.checkpointer.finish()
        folder = self.checkpointer.newest(self.metrics, self.saved)
        if folder is None:
            return
        before = self.state
        self.state = self.checkpointer.load(
            folder, self.parts.train_step, self.metrics, event="rollback"
        )
        self.state.skipped, self.state.nan = before.skipped, before.nan
        left_out = (first, first + self.config.global_batch_size)
        self.state.stepped_over = [*before.stepped_over, left_out]

    def _save(self) -> None:
        """Writes a checkpoint of the present state, or begins to."""
        with self.parts.train_step.phases.phase("save"):
            self.saved = self.checkpointer.save(self.parts.train_step, self.state, self.metrics)
        self.stop.saved()

    def _validate_if_due(self) -> int:
        """Validates after every --eval-interval steps, unless that was done; reports the loss.

        A validation that a request to stop ends is left to the run that goes on.

        Returns:
            The request that has come meanwhile; 0 if none has.
        """
        iteration = self.state.iteration
        is_due = _is_due(iteration, self.config.eval_interval) and self.state.validated < iteration
        if self.parts.valid is None or not is_due:
            return 0
        train_step = self.parts.train_step
        with train_step.phases.phase("validation"):
            totals = train_step.validate(self.parts.valid, self.config.eval_iters, self.stop)
            if totals is not None:
                means = totals.means()
                for probe in self.probes:
                    means |= probe.look(train_step, self.parts.train)
        if totals is not None:
            if not totals.weight:
                self.metrics.say("warning: the samples for validation have no token to train")
            self.state.note_validation(totals.mean_loss)
            self.metrics.validation(iteration, totals.mean_loss, means)
        return self.stop.agreed()

    def _end(self) -> None:
        """Saves the last step, writes what is left to be written, and reports the end.

        Raises:
            StoppedError: The run was stopped before its last iteration.
            DataError: No step had a loss and a gradient that are numbers.
            CheckpointError: A checkpoint can't be written.
        """
        self.profiler.close(self.state.iteration)
        if self._has_ended() and self.skipped_in_a_row and not self.has_numbers:
            raise DataError(
                "no step has changed the weights: the loss or the gradient of all "
                f"{self.skipped_in_a_row} is not a number",
                "use a lower --lr, a longer --lr-warmup-iters, or --dtype bf16; glm3 convert says "
                "whether the model's weights are numbers",
            )
        if self.saved != self.state.iteration:
            self._save()
        with self.parts.train_step.phases.phase("save"):
            self.checkpointer.finish()
        if self._stops_early():
            self.metrics.event(
                "early_stop",
                iteration=self.state.iteration,
                validations=self.state.without_better,
                best_iteration=self.state.best_iteration,
                best_loss=self.state.best_loss,
            )
        self.metrics.stop(self.state, self.parts.train_step.phases.totals())
        if not self._has_ended():
            raise self._stopped()

    def _stopped(self) -> StoppedError:
        """Returns what is said of a run that was stopped, and how it goes on."""
        iteration, way = self.state.iteration, "run the same command again to go on"
        if not iteration:
            return StoppedError("stopped before the first step; nothing is saved", way)
        if self.config.resume != "auto":
            way = "run the command again with --resume auto to go on"
        return StoppedError(
            f"stopped at iteration {iteration} of {self.config.train_iters} and saved", way
        )


def _is_due(iteration: int, interval: int | None) -> bool:
    """Returns whether something that happens every `interval` steps happens after this one."""
    return interval is not None and iteration % interval == 0
