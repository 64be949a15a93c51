"""Training jobs that run on ranks of the pool."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.tiny import TINY, Samples, train_config
from tests.support.weights import Pieces, pieces_here


@dataclass(frozen=True)
class Trained:
    """What a rank saw of some steps: a number for each, and its part of the weights at the end."""

    losses: list[float]
    grad_norms: list[float]
    pieces: Pieces


def first_source() -> Any:
    """The weights that every run begins with."""
    from glm3cli.checkpoint.random import RandomSource

    return RandomSource(TINY, seed=7, std=train_config().init_method_std)


def build(
    options: dict[str, Any], grid: Any, samples: type[Samples] = Samples
) -> tuple[Any, Any, Any]:
    """Config, trainer, and loader of the tiny model on this rank."""
    from glm3cli.checkpoint.load import load_weights
    from glm3cli.model.build import unwrap
    from glm3cli.train.setup import build_trainer, make_loader

    config = train_config(**options)
    trainer = build_trainer(config, TINY, grid)
    load_weights([unwrap(chunk) for chunk in trainer.chunks], first_source(), config, grid)
    trainer.optimizer.reload_model_params()
    loader = make_loader(config, TINY, grid, samples(config.seq_length, TINY.padded_vocab_size))
    return config, trainer, loader


def train_steps(
    options: dict[str, Any],
    start: int,
    stop: int,
    save: Path | None = None,
    load: Path | None = None,
) -> Trained:
    """Trains the steps start..stop, from and to a checkpoint if given."""
    from glm3cli.checkpoint.run.resume import gather_weights, load_training, save_request
    from glm3cli.parallel.groups import open_grid

    with open_grid(train_config(**options)) as grid:
        config, trainer, loader = build(options, grid)
        if load is not None:
            progress, _ = load_training(
                load, trainer.chunks, trainer.optimizer, trainer.scheduler, grid
            )
            assert progress == {"iteration": start}
        outcomes = [
            trainer.step(loader, step * config.global_batch_size) for step in range(start, stop)
        ]
        if save is not None:
            save_request(
                save,
                trainer.chunks,
                trainer.optimizer,
                trainer.scheduler,
                {"iteration": stop},
                grid,
            ).execute_sync()
        gather_weights(trainer.chunks)
        return Trained(
            losses=[outcome.loss for outcome in outcomes],
            grad_norms=[outcome.grad_norm for outcome in outcomes],
            pieces=pieces_here(trainer, config, TINY),
        )
