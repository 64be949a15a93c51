"""The training loop, the same for pretrain and finetune."""

import time

from glm3cli.config.training import TrainConfig
from glm3cli.device import require_active
from glm3cli.errors import StoppedError
from glm3cli.train.metrics import Metrics
from glm3cli.train.setup import Parts
from glm3cli.train.signals import StopFlag
from glm3cli.train.state import State
from glm3cli.train.store import Store


def train(config: TrainConfig, parts: Parts, state: State, metrics: Metrics, store: Store) -> None:
    """Trains from `state` to the end, or to a stop signal; the last step is always saved.

    Raises:
        StoppedError: A signal came; the run was saved.
        DataError: A sample doesn't fit the model.
    """
    device, stop = require_active(), StopFlag()
    saved = state.iteration
    while state.iteration < config.train_iters:
        started = time.perf_counter()
        outcome = parts.trainer.step(parts.train, state.consumed_samples)
        device.synchronize()
        state.advance(outcome, config.global_batch_size, config.seq_length)
        metrics.step(state, outcome, time.perf_counter() - started, device.peak_memory())
        if outcome.skipped:
            metrics.event("skip", iteration=state.iteration, loss_scale=outcome.loss_scale)
        if _is_due(state.iteration, config.save_interval):
            saved = store.save(parts.trainer, state, metrics)
        if parts.valid is not None and _is_due(state.iteration, config.eval_interval):
            metrics.validation(
                state.iteration, parts.trainer.validate(parts.valid, config.eval_iters)
            )
        signal_number = stop.agreed(device.torch_device())
        if signal_number:
            metrics.event("signal", number=signal_number)
            break
    if saved != state.iteration:
        store.save(parts.trainer, state, metrics)
    consumed = metrics.by_source(state.consumed_samples)
    metrics.event("stop", iteration=state.iteration, consumed_by_source=consumed)
    if state.iteration < config.train_iters:
        raise StoppedError(
            f"stopped at iteration {state.iteration} of {config.train_iters} and saved",
            "run the same command again to go on",
        )


def _is_due(iteration: int, interval: int | None) -> bool:
    return interval is not None and iteration % interval == 0
