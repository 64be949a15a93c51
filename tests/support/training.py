"""Trains the tiny model on the ranks of a pool."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm3cli.config.model import ModelConfig
from glm3cli.config.training import TrainConfig
from tests.support.preferences import LikedOrNot, Pairs
from tests.support.tiny import TINY, Samples, train_config
from tests.support.weights import Pieces, pieces_here


@dataclass(frozen=True)
class Trained:
    """What a rank saw of some steps.

    Attributes:
        losses: The loss of each step.
        grad_norms: The gradient norm of each step.
        pieces: The rank's part of the weights after the last step.
    """

    losses: list[float]
    grad_norms: list[float]
    pieces: Pieces


def first_source(model: ModelConfig = TINY) -> Any:
    """Returns the weights that every run begins with."""
    from glm3cli.checkpoint.random import RandomSource

    return RandomSource(model, seed=7, std=train_config().init_method_std)


def build(
    options: dict[str, Any],
    grid: Any,
    samples: type[Samples] | None = None,
    model: ModelConfig = TINY,
) -> tuple[Any, Any, Any]:
    """Builds the config, the train step, and the loader of a model on this rank.

    Without `samples` they are those that the method of the options needs.
    """
    from glm3cli.checkpoint.adapter.transfer import load_adapter
    from glm3cli.checkpoint.load import load_weights
    from glm3cli.model.build import unwrap
    from glm3cli.train.setup import build_train_step, make_loader
    from glm3cli.train.weights.adapter import first_adapter

    config = train_config(**options)
    train_step = build_train_step(config, model, grid)
    gpts = [unwrap(chunk) for chunk in train_step.chunks]
    load_weights(gpts, first_source(model), config, grid)
    if config.is_adapted:
        load_adapter(gpts, first_adapter(config, first_source(model)), model, grid)
    train_step.optimizer.reload_model_params()
    dataset = (samples or _samples_of(config))(config.row_length, model.padded_vocab_size)
    loader = make_loader(config, model, grid, dataset)
    return config, train_step, loader


def _samples_of(config: TrainConfig) -> type[Any]:
    """The class of the samples that a method trains on."""
    if config.is_paired:
        return Pairs
    return LikedOrNot if config.method == "kto" else Samples


def train_steps(
    options: dict[str, Any],
    start: int,
    stop: int,
    save: Path | None = None,
    load: Path | None = None,
) -> Trained:
    """Trains the steps start..stop; a checkpoint is loaded before, or saved after, if given."""
    from glm3cli.checkpoint.run.resume import gather_weights, load_training, save_request
    from glm3cli.parallel.groups import open_grid

    with open_grid(train_config(**options)) as grid:
        config, train_step, loader = build(options, grid)
        if load is not None:
            progress, _ = load_training(
                load, train_step.chunks, train_step.optimizer, train_step.scheduler, grid
            )
            assert progress == {"iteration": start}
        outcomes = [
            train_step.run(loader, step * config.global_batch_size) for step in range(start, stop)
        ]
        if save is not None:
            save_request(
                save,
                train_step.chunks,
                train_step.optimizer,
                train_step.scheduler,
                {"iteration": stop},
                grid,
            ).execute_sync()
        gather_weights(train_step.chunks)
        return Trained(
            losses=[outcome.loss for outcome in outcomes],
            grad_norms=[outcome.grad_norm for outcome in outcomes],
            pieces=pieces_here(train_step, config, TINY),
        )
