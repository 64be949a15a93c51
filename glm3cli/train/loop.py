"""The training loop, the same for pretrain and finetune."""

from glm3cli.config.training import TrainConfig
from glm3cli.device import require_active
from glm3cli.errors import StoppedError
from glm3cli.train.metrics import Metrics
from glm3cli.train.profile import Profiler
from glm3cli.train.setup import Parts
from glm3cli.train.signals import StopFlag
from glm3cli.train.state import State
from glm3cli.train.store import Store


def train(
    config: TrainConfig,
    parts: Parts,
    state: State,
    metrics: Metrics,
    store: Store,
    profiler: Profiler,
) -> None:
    """Trains from `state` to the end, or to a stop signal; the last step is always saved.

    Raises:
        StoppedError: A signal came; the run was saved.
        DataError: A sample doesn't fit the model.
    """
    device, stop, phases = require_active(), StopFlag(), parts.trainer.phases
    saved = state.iteration
    while state.iteration < config.train_iters:
        profiler.begin(state.iteration + 1)
        phases.begin_step()
        outcome = parts.trainer.step(parts.train, state.consumed_samples)
        spent = phases.step()
        state.advance(outcome, config.global_batch_size, config.seq_length)
        metrics.step(state, outcome, sum(spent.values()), device.peak_memory(), spent)
        profiler.end(state.iteration)
        if outcome.skipped:
            metrics.event("skip", iteration=state.iteration, loss_scale=outcome.loss_scale)
        if _is_due(state.iteration, config.save_interval):
            with phases.phase("save"):
                saved = store.save(parts.trainer, state, metrics)
        if parts.valid is not None and _is_due(state.iteration, config.eval_interval):
            with phases.phase("validation"):
                loss = parts.trainer.validate(parts.valid, config.eval_iters)
            metrics.validation(state.iteration, loss)
        signal_number = stop.agreed(device.torch_device())
        if signal_number:
            metrics.event("signal", number=signal_number)
            break
    profiler.close(state.iteration)
    if saved != state.iteration:
        with phases.phase("save"):
            store.save(parts.trainer, state, metrics)
    metrics.stop(state, phases.totals())
    if state.iteration < config.train_iters:
        raise StoppedError(
            f"stopped at iteration {state.iteration} of {config.train_iters} and saved",
            "run the same command again to go on",
        )


def _is_due(iteration: int, interval: int | None) -> bool:
    return interval is not None and iteration % interval == 0
