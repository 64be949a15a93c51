"""`glm3 pretrain` and `glm3 finetune`: one config, one loop, two kinds of data."""

import os
from pathlib import Path

import typer

from glm3cli.checkpoint.locate import locate
from glm3cli.checkpoint.shape import read_shape
from glm3cli.cli.launch import is_speaker, run_here
from glm3cli.cli.options import command
from glm3cli.config.model import PRESETS, ModelConfig
from glm3cli.config.training import TrainConfig
from glm3cli.data.prefixes import Blend, Kind, parse_blend
from glm3cli.errors import ConfigError, DataError
from glm3cli.train.layouts import check_memory
from glm3cli.train.plan import advise, describe


def register(app: typer.Typer) -> None:
    """Adds both commands to `app`."""

    @command(app, TrainConfig, "pretrain")
    def pretrain(config: TrainConfig) -> None:
        """Train on text: every token of `preprocess --handler text` files.

        torchrun --nproc_per_node 8 -m glm3cli pretrain --model MODEL --data PREFIX --save RUN
        --tp 1 --pp 2 --seq-length 8192 --train-iters 2000
        """
        _run(config, "pretrain")

    @command(app, TrainConfig, "finetune")
    def finetune(config: TrainConfig) -> None:
        """Train on answers: `preprocess --handler instruction` or `chat` files.

        torchrun --nproc_per_node 8 -m glm3cli finetune --model MODEL --data PREFIX --save RUN
        --tp 1 --pp 2 --seq-length 8192 --train-iters 2000
        """
        _run(config, "finetune")


def _run(config: TrainConfig, kind: Kind) -> None:
    model = _shape(config)
    config.check_plan(model)
    _check_tokenizer(config)
    _check_save(config.save)
    blend = parse_blend(config.data, kind)
    if config.dry_run:
        typer.echo(f"{describe(config, model)}\n{_sources(config, kind, blend)}")
        if config.device_memory or config.chip:
            typer.echo(advise(config, model))
        return
    check_memory(config, model)
    if not run_here(config):
        return
    if is_speaker():
        typer.echo(_sources(config, kind, blend), err=True)
    from glm3cli.train.run import run_training

    state = run_training(config, kind, model)
    if is_speaker():
        typer.echo(str(config.save / f"iter_{state.iteration:07d}"))


def _sources(config: TrainConfig, kind: Kind, blend: Blend) -> str:
    from glm3cli.data.blend_table import sources_of, table

    samples = config.train_iters * config.global_batch_size
    return table(sources_of(blend, kind, config.split, config.seq_length, samples))


def _shape(config: TrainConfig) -> ModelConfig:
    if config.model is not None:
        return read_shape(config.model)
    assert config.shape is not None  # StartOptions has checked it
    return PRESETS.get(config.shape) or ModelConfig.from_file(Path(config.shape))


def _check_tokenizer(config: TrainConfig) -> None:
    if config.tokenizer is None and config.from_scratch:
        raise ConfigError(
            "--from-scratch has no model folder to take the tokenizer from",
            "give --tokenizer with a folder or a tokenizer.model",
        )
    place = config.tokenizer or locate(config.model or Path()).companions
    file = place / "tokenizer.model" if place.is_dir() else place
    if not file.is_file():
        raise DataError(
            f"tokenizer {file} does not exist",
            "give --tokenizer with a folder that has a tokenizer.model, or that file",
        )


def _check_save(save: Path) -> None:
    existing = next(path for path in (save, *save.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"--save {save}: {existing} is a file", "give a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--save {save}: {existing} is not writable", "give a folder that you may write to"
        )
