"""`glm3 pretrain` and `glm3 finetune`: one config, one loop, two kinds of data."""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from glm3cli.checkpoint.layouts.opening import read_shape
from glm3cli.checkpoint.locate import locate
from glm3cli.cli.options import command
from glm3cli.cli.preprocess import progress_lines
from glm3cli.config.model import PRESETS, ModelConfig
from glm3cli.config.training import TrainConfig
from glm3cli.data.prefixes import Blend, DataKind, check_files, is_raw, parse_blend, read_blend
from glm3cli.errors import ConfigError, DataError
from glm3cli.host.files import existing_parent
from glm3cli.parallel.launch import is_speaker, run_here
from glm3cli.plan.describe import advise
from glm3cli.plan.describe import describe as describe_plan
from glm3cli.plan.fit import check_memory
from glm3cli.train.report.reporters import check_installed

if TYPE_CHECKING:
    from glm3cli.data.raw import RawData


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


def _run(config: TrainConfig, kind: DataKind) -> None:
    model = _shape(config)
    config.check_sizes(model)
    tokenizer = _find_tokenizer(config)
    _check_save(config.save)
    check_installed(config.tools)
    raw = _raw_data(config, kind, tokenizer)
    if config.dry_run:
        typer.echo(f"{describe_plan(config, model)}\n{_plan_of_data(config, kind, raw)}")
        if config.device_memory or config.chip:
            typer.echo(f"{advise(config, model)}\n{_forecast(config, model)}")
        return
    check_memory(config, model)
    # By the one process that starts the ranks, where --nproc does; they find it done.
    prepared = {item: _prepare(data) for item, data in raw.items()}
    blend = parse_blend(config.data, kind, prepared)
    if not run_here(config):
        return
    if is_speaker():
        typer.echo(_sources(config, kind, blend), err=True)
    from glm3cli.train.run import run_training

    state = run_training(config, kind, model, blend)
    if is_speaker():
        typer.echo(str(config.save / f"iter_{state.iteration:07d}"))


def _forecast(config: TrainConfig, model: ModelConfig) -> str:
    """The step on devices that aren't here, from the operators that it would run."""
    from glm3cli.device import select
    from glm3cli.device.catalog import find_chip

    select("cpu").activate()
    from glm3cli.forecast.forecast import describe, forecast

    return describe(forecast(config, model, find_chip(config.chip)))


def _raw_data(config: TrainConfig, kind: DataKind, tokenizer: Path) -> "dict[str, RawData]":
    """What of `--data` is raw; the rest must be there already."""
    raw = {}
    for item in read_blend(config.data).prefixes:
        if not is_raw(item, kind):
            check_files(item, kind)
            continue
        from glm3cli.data.raw import RawData

        raw[item] = RawData.of(item, kind, config, tokenizer)
    return raw


def _prepare(data: "RawData") -> str:
    """The prefix of what preprocess makes, or has made, of raw data."""
    if not is_speaker():
        logging.getLogger("glm3cli.data").setLevel(logging.ERROR)
    with progress_lines() as report:
        done = data.prepare(report)
    if is_speaker():
        when = "was preprocessed before" if done.repeated else "is preprocessed"
        typer.echo(
            f"--data {data.item} {when}: {done.documents:,} documents, {done.tokens:,} tokens in "
            f"{data.prefix}",
            err=True,
        )
    return data.prefix


def _plan_of_data(config: TrainConfig, kind: DataKind, raw: "dict[str, RawData]") -> str:
    waiting = [data for data in raw.values() if data.look() is None]
    for data in waiting:
        data.check_first()
    if waiting:
        return "\n".join(
            f"data: {data.item} would be preprocessed into {data.prefix}" for data in waiting
        )
    prefixes = {item: data.prefix for item, data in raw.items()}
    return _sources(config, kind, parse_blend(config.data, kind, prefixes))


def _sources(config: TrainConfig, kind: DataKind, blend: Blend) -> str:
    from glm3cli.data.samples.blend_table import data_sources, table

    samples = config.train_iters * config.global_batch_size
    return table(data_sources(blend, kind, config.split, config.seq_length, samples))


def _shape(config: TrainConfig) -> ModelConfig:
    if config.model is not None:
        return read_shape(config.model)
    assert config.shape is not None  # StartOptions has checked it
    return PRESETS.get(config.shape) or ModelConfig.from_file(Path(config.shape))


def _find_tokenizer(config: TrainConfig) -> Path:
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
    return file


def _check_save(save: Path) -> None:
    existing = existing_parent(save)
    if not existing.is_dir():
        raise ConfigError(f"--save {save}: {existing} is a file", "give a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--save {save}: {existing} is not writable", "give a folder that you may write to"
        )
