"""`prepare`: checks all that can be checked about a training before a rank starts.

A dry run and a real one begin here alike. Nothing here imports torch where the model has a
config.json and --data is preprocessed, so that mistakes are reported at once.
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from glm3cli.checkpoint.files.manifest import read_manifest
from glm3cli.checkpoint.layouts.opening import shape_at
from glm3cli.checkpoint.locate import Location, iteration_of, locate
from glm3cli.config.model import ModelConfig
from glm3cli.config.presets import PRESETS
from glm3cli.config.training import TrainConfig
from glm3cli.data.kinds import DataKind
from glm3cli.data.prefixes import Blend, check_files, is_raw, read_blend
from glm3cli.errors import CheckpointError, ConfigError, DataError
from glm3cli.host.files import existing_parent
from glm3cli.host.memory import total_memory
from glm3cli.plan.auto import choose
from glm3cli.plan.search import gib
from glm3cli.train.origin import Origin, check_goes_on, newest_noted
from glm3cli.train.report.reporters import check_installed
from glm3cli.train.weights.adapter import with_adapter
from glm3cli.train.weights.selection import check_selection

if TYPE_CHECKING:
    from glm3cli.data.raw import RawData
    from glm3cli.data.samples.blend_table import DataSource

# Bytes for each sample. Of texts, megatron-core 0.16.1 keeps 12.6, and takes 16.6 while it builds
# them (measured); of a blend, an int16 and an int64 are kept.
_ORDER_OF_TEXT, _ORDER_OF_BLEND = 17, 10
# What a run keeps in its folder besides checkpoints; see checkpointer, report and data.
_OF_THE_RUN = {
    *("best", "data", "run.yaml", "metrics.jsonl", "report.html", "profile"),
    *("tensorboard", "wandb", "swanlab"),
}


@dataclass(frozen=True)
class Prepared:
    """A training whose settings, model and data were checked.

    Attributes:
        config: The settings of the run; where it starts from an adapter, with the adapter's own.
        kind: The kind of data that the command reads: text or answers.
        model: The shape of the model.
        location: Where the weights to start from are; None for random ones.
        tokenizer: The vocabulary's file, such as tokenizer.model.
        named: The items of --data and their weights, as the user gave them.
        raw: The items that have to be preprocessed first, by their names in `named`.
        reference: Where the model of --reference is; None if the weights to start from are the
            reference, or there is none.
        choice: The sentence about the parallel plan that --auto-layout has chosen; None without it.
    """

    config: TrainConfig
    kind: DataKind
    model: ModelConfig
    location: Location | None
    tokenizer: Path
    named: Blend
    raw: "Mapping[str, RawData]"
    reference: Location | None = None
    choice: str | None = None

    @cached_property
    def origin(self) -> Origin:
        """What the run is made of, which its checkpoints note."""
        return Origin.of(self.config, self.kind, self.model, self.location, self.named, self.raw)

    @property
    def companions(self) -> Path:
        """The folder with the small files that a checkpoint needs beside its weights."""
        return self.location.companions if self.location else self.tokenizer.parent

    def blend(self, prefixes: Mapping[str, str]) -> Blend:
        """Returns the data sets that the training reads, and their weights.

        Args:
            prefixes: The prefix of the files that preprocess has made of each raw item, by the
                item's name in `named`.

        Raises:
            DataError: A file is missing.
        """
        preprocessed = tuple(prefixes.get(name, name) for name in self.named.prefixes)
        for prefix in preprocessed:
            check_files(prefix, self.kind)
        return Blend(preprocessed, self.named.weights)

    def data_sources(self, blend: Blend) -> "list[DataSource]":
        """Returns the numbers of documents, tokens, samples and epochs of each data set.

        Args:
            blend: The data sets that the training reads.

        Raises:
            DataError: An index is damaged, or a split has no document.
        """
        from glm3cli.data.samples.blend_table import data_sources

        config = self.config
        samples = config.train_iters * config.global_batch_size
        return data_sources(
            blend,
            self.kind,
            config.split,
            config.row_length,
            samples,
            packing=config.packing,
        )

    def first_look(self, blend: Blend) -> Iterator[str]:
        """Yields lines about the samples of a tuning, some of them as they are trained.

        Args:
            blend: The data sets that the training reads.

        Raises:
            DataError: Another tokenizer has made the files, or packs don't tell their samples
                apart.
        """
        from glm3cli.data.samples.first_look import FirstLook
        from glm3cli.data.samples.weighting import Weighting
        from glm3cli.data.tokens.tokenizer import Tokenizer

        config = self.config
        if config.seq_length > self.model.seq_length:
            yield (
                f"warning: --seq-length {config.seq_length} is more than the "
                f"{self.model.seq_length} positions that the model was made for"
            )
        if self.kind.documents_are_samples:
            look = FirstLook(
                self.kind,
                config.split,
                config.row_length,
                Tokenizer.load(self.tokenizer),
                Weighting(last_turn_only=config.last_turn_only),
                config.preview,
            )
            yield from look.lines(blend)

    def with_steps(self, blend: Blend) -> "Prepared":
        """Returns the same training with a number of steps, where `--epochs` was given.

        An epoch of a blend has as many samples as all its data sets together.

        Args:
            blend: The data sets that the training reads.

        Raises:
            ConfigError: An option doesn't fit the number of steps.
            DataError: A file is damaged, or a split has no document with a token to train.
        """
        config = self.config
        if config.epochs is None:
            return self
        samples = sum(source.size for source in self.data_sources(blend))
        steps = math.ceil(config.epochs * samples / config.global_batch_size)
        config = config.with_steps(steps)
        config.check_sizes(self.model)
        return replace(self, config=config)


def prepare(config: TrainConfig, kind: DataKind) -> Prepared:
    """Reads the model's shape and what --data names, and checks all settings against them.

    Args:
        config: The settings of the run.
        kind: The kind of data that the command reads.

    Raises:
        ConfigError: A setting doesn't fit the model, the ranks, or the folder of the run, or that
            folder has a run of another command, model or data; or --auto-layout finds no plan.
        CheckpointError: The model isn't there, its config.json is wrong, or --resume names no
            checkpoint.
        DataError: The tokenizer or a file of --data is missing.
        DeviceError: --auto-layout doesn't know the speed of the device that is here.
    """
    location = None if config.model is None else locate(config.model)
    model = _shape(config, location)
    config = with_adapter(config, model)
    check_selection(config, model)
    choice = choose(config, model) if config.auto_layout else None
    config = choice.config if choice else config
    config.check_sizes(model)
    reference = _reference(config, model)
    tokenizer = _find_tokenizer(config, location)
    _check_save(config.save)
    _check_apart(config, location)
    _check_export(config)
    check_installed(config.tools)
    named = read_blend(config.data)
    _check_order(config, kind, named)
    raw = _raw_data(config, kind, named, tokenizer)
    why = choice.why if choice else None
    prepared = Prepared(config, kind, model, location, tokenizer, named, raw, reference, why)
    if checkpoint := newest_noted(config):
        check_goes_on(checkpoint, prepared.origin, config.allow_changed)
    return prepared


def _shape(config: TrainConfig, location: Location | None) -> ModelConfig:
    """Returns the shape of the model at `location`, or of the one to make from scratch."""
    if location is not None:
        return shape_at(location)
    assert config.shape is not None  # StartOptions has checked it
    return PRESETS.get(config.shape) or ModelConfig.from_file(Path(config.shape))


def _reference(config: TrainConfig, model: ModelConfig) -> Location | None:
    """Returns where the model of --reference is.

    Raises:
        CheckpointError: It isn't there.
        ConfigError: It has another shape than the model that trains.
    """
    if config.reference is None:
        return None
    location = locate(config.reference)
    shape = shape_at(location).model_dump()
    others = [
        f"{name} {shape[name]} instead of {value}"
        for name, value in model.model_dump().items()
        if shape[name] != value and name not in ("seq_length", "torch_dtype")
    ]
    if others:
        raise ConfigError(
            f"--reference {config.reference} has another shape than the model: {', '.join(others)}",
            "give a model of the same shape, such as the one that --model was tuned from",
        )
    return location


def _find_tokenizer(config: TrainConfig, location: Location | None) -> Path:
    """Returns the vocabulary's file of --tokenizer, or the one beside the model.

    Raises:
        ConfigError: Neither is given.
        DataError: The file does not exist.
    """
    place = config.tokenizer or (location.companions if location else None)
    if place is None:
        raise ConfigError(
            "--from-scratch has no model folder to take the tokenizer from",
            "give --tokenizer with a folder or a tokenizer.model",
        )
    from glm3cli.data.tokens.vocabulary.files import FILE_NAME, find_vocabulary

    file = find_vocabulary(place) or place / FILE_NAME if place.is_dir() else place
    if not file.is_file():
        raise DataError(
            f"tokenizer {file} does not exist",
            "give --tokenizer with a folder that has a tokenizer.model, or that file",
        )
    return file


def _check_save(save: Path) -> None:
    """Checks that the folder of the run can be made and written to.

    Raises:
        ConfigError: It can't.
    """
    existing = existing_parent(save)
    if not existing.is_dir():
        raise ConfigError(f"--save {save}: {existing} is a file", "give a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--save {save}: {existing} is not writable", "give a folder that you may write to"
        )


def _check_apart(config: TrainConfig, location: Location | None) -> None:
    """Checks that the run's folder and the model's don't lie in one another.

    The run's checkpoints would else be a part of the model, which is compared when it goes on. That
    a run goes on with a checkpoint of its own as the model is fine.

    Raises:
        ConfigError: They do.
    """
    if location is None or config.model is None:
        return
    save, folder = _real(config.save), _real(location.folder)
    is_own = location.kind == "dist" and iteration_of(folder) is not None and folder.parent == save
    if _overlap(save, folder) and not is_own:
        raise ConfigError(
            f"--save {config.save} and the model in {location.folder} lie in one another",
            "give the run a folder elsewhere",
        )


def _real(path: Path) -> Path:
    """Returns the path without links; as far as it goes where links go in a circle."""
    return Path(os.path.realpath(path))


def _overlap(one: Path, other: Path) -> bool:
    """Returns whether two resolved paths are the same, or one lies in the other."""
    return one.is_relative_to(other) or other.is_relative_to(one)


def _check_export(config: TrainConfig) -> None:
    """Checks that --export-hf would not replace anything but an earlier export of the same run.

    It may lie in the run's folder, but not where the run itself writes.

    Raises:
        ConfigError: It would, or the folder can't be made.
    """
    target = config.export_hf
    if target is None:
        return
    new, save = _real(target), _real(config.save)
    inner = new.relative_to(save).parts[:1] if new.is_relative_to(save) else ()
    is_taken = inner and (iteration_of(save / inner[0]) is not None or inner[0] in _OF_THE_RUN)
    around = any(place.is_relative_to(new) for place in (save, _real(config.cache_folder)))
    if is_taken or around or (config.model and _overlap(new, _real(config.model))):
        raise ConfigError(
            f"--export-hf {target} lies among the files of --save or --model, or around them",
            f"give a folder elsewhere, or {config.save / 'hf'}",
        )
    if not existing_parent(target).is_dir() or not os.access(existing_parent(target), os.W_OK):
        raise ConfigError(f"--export-hf {target} can't be made", "give another folder")
    if not target.exists():
        return
    try:
        source = read_manifest(target).source.get("path", "")
    except CheckpointError:
        source = ""
    if save not in _real(Path(source)).parents:
        raise ConfigError(
            f"--export-hf {target} is there already, and is no export of this run",
            "give another folder, or remove it",
        )


def _check_order(config: TrainConfig, kind: DataKind, named: Blend) -> None:
    """Checks that the order of all samples, which each rank keeps, leaves half of the memory.

    Instructions of a single data set are in an order that is found as they are read. The others'
    is built before the first step: megatron-core shuffles texts as a whole.

    Raises:
        ConfigError: It doesn't.
    """
    size = _ORDER_OF_TEXT if not kind.documents_are_samples else 0
    size += _ORDER_OF_BLEND if len(named.prefixes) > 1 else 0
    bytes_of_step = size * config.global_batch_size * config.num_local_ranks
    most = total_memory() // 2
    if not config.plans_elsewhere and bytes_of_step * config.train_iters > most:
        raise ConfigError(
            f"--train-iters {config.train_iters:,} x --global-batch-size "
            f"{config.global_batch_size:,}: {config.num_local_ranks} rank(s) of this machine would "
            f"keep the order of all these samples in {gib(bytes_of_step * config.train_iters)}, "
            f"and its memory is {gib(2 * most)}",
            f"give at most {most // bytes_of_step:,} steps; --exit-duration ends a run by time",
        )


def _raw_data(
    config: TrainConfig, kind: DataKind, named: Blend, tokenizer: Path
) -> "dict[str, RawData]":
    """Returns the items of --data that have to be preprocessed first, by their names.

    Raises:
        DataError: A file of an item that is preprocessed already is missing, or a raw item has
            none.
    """
    raw = {}
    for item in named.prefixes:
        if not is_raw(item, kind):
            check_files(item, kind)
            continue
        from glm3cli.data.raw import RawData

        raw[item] = RawData.of(item, kind, config, tokenizer)
    return raw
