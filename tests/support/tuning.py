"""Trains an adapter on the tiny model, on the ranks of a pool."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.tiny import TINY, train_config

STEPS = 5


@dataclass(frozen=True)
class Tuned:
    """What a rank saw of some steps with an adapter.

    Attributes:
        losses: The loss of each step.
        grad_norms: The gradient norm of each step.
        rates: The learning rate of each step.
        without: The loss of the first batch with the adapter off, after the last step.
        trained: The number of elements that DDP has buffers for.
        matrices: The adapter after the last step, by weight, layer, and name; on rank 0 alone.
    """

    losses: list[float]
    grad_norms: list[float]
    rates: list[float]
    without: float
    trained: int
    matrices: dict[tuple[str, int, str], Any] | None


def tune(
    options: dict[str, Any],
    start: int = 0,
    stop: int = STEPS,
    save: Path | None = None,
    load: Path | None = None,
) -> Tuned:
    """Trains an adapter on the tiny model; a checkpoint is loaded before, or saved after."""
    from glm3cli.checkpoint.adapter.transfer import gather_adapter
    from glm3cli.checkpoint.run.resume import gather_weights, load_training, save_request
    from glm3cli.model.adapters import adapters_off
    from glm3cli.parallel.groups import open_grid
    from tests.support.training import build

    with open_grid(train_config(**options)) as grid:
        config, train_step, loader = build(options, grid)
        parts = (train_step.chunks, train_step.optimizer, train_step.scheduler)
        if load is not None:
            load_training(load, *parts, grid)
        batch = config.global_batch_size
        outcomes = [train_step.run(loader, step * batch) for step in range(start, stop)]
        if save is not None:
            save_request(save, *parts, {"iteration": stop}, grid).execute_sync()
        gather_weights(train_step.chunks)
        with adapters_off(train_step.chunks):
            without = train_step.validate(loader, 1).mean_loss
        adapter = gather_adapter(train_step.chunks, TINY, grid)
        return Tuned(
            losses=[outcome.loss for outcome in outcomes],
            grad_norms=[outcome.grad_norm for outcome in outcomes],
            rates=[outcome.lr for outcome in outcomes],
            without=without,
            trained=sum(b.grad_data.numel() for chunk in train_step.chunks for b in chunk.buffers),
            matrices=None
            if adapter is None
            else {
                (weight.logical, layer, side): getattr(pair, side).float().numpy().copy()
                for (weight, layer), [pair] in adapter.pairs.items()
                for side in ("a", "b", "magnitude")
                if getattr(pair, side) is not None
            },
        )
