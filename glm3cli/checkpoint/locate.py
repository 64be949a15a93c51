"""Finds out by file names alone what kind of model a folder holds, and where its parts lie.

Needs no torch, so that a wrong path is reported at once.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from glm3cli.errors import CheckpointError
from glm3cli.host.parsing import read_json

FolderKind = Literal["hf", "ranks", "dist"]

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".distcp"}  # of files, in all layouts
TRACKER = "latest_checkpointed_iteration.txt"
SAFETENSORS_INDEX = "model.safetensors.index.json"
BIN_INDEX = "pytorch_model.bin.index.json"
# Further files of a model, which may be links as the weights may.
_LINKED = {SAFETENSORS_INDEX, BIN_INDEX, "config.json", "tokenizer.model", "tokenizer.json"}
# The names that ModelLink 1.1 and its successors give the folder of a conversion to Hugging Face
# files, which they make inside the original model's folder.
_CONVERTED = ("mg2hg", "mg2hf")
_ITERATION = re.compile(r"iter_(\d{7,})")
# The config of an adapter in PEFT's layout, and the adapter's folder in a checkpoint.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER = "adapter"
# megatron-core writes metadata.json last (dist_checkpointing/serialization.py 0.16.1, save).
_DIST_FILES = (".metadata", "metadata.json")


@dataclass(frozen=True)
class Location:
    """The places where the parts of a model lie.

    Attributes:
        kind: Whether the weights are Hugging Face files ("hf": the layouts chatglm and glm),
            Megatron's per-rank files ("ranks": the layouts legacy and mcore), or megatron-core's
            distributed checkpoint ("dist").
        folder: The folder of the weights themselves.
        config: The config.json that belongs to them; None if there is none.
        iteration: The training iteration in the folder's name; None for other names.
        adapters: The folders of the LoRA adapters that belong to the weights, the first one first.
    """

    kind: FolderKind
    folder: Path
    config: Path | None
    iteration: int | None
    adapters: tuple[Path, ...] = ()

    @property
    def companions(self) -> Path:
        """The folder of the tokenizer and the remote code, which lie beside the config.json."""
        return self.config.parent if self.config else self.folder


def locate(path: Path) -> Location:
    """Finds the weights of a model.

    A checkpoint of a run that trains a LoRA adapter has no other weights: these are where the base
    model of the adapter lies.

    Args:
        path: The folder of the weights, or one that contains it: a training run (whose newest
            complete checkpoint is taken) or the target of an older conversion.

    Raises:
        CheckpointError: The path doesn't exist, holds no weights, or only an incomplete checkpoint;
            or a link in it leads nowhere; or it is an adapter, whose base model isn't there.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist", "give a model folder")
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file", "give the model's folder")
    _check_links(path)
    kind = kind_of(path)
    if kind == "dist" and (path / ADAPTER / ADAPTER_CONFIG).is_file():
        base = _base_of(path / ADAPTER)
        return replace(
            base, iteration=iteration_of(path), adapters=(*base.adapters, path / ADAPTER)
        )
    if kind is not None:
        return Location(kind, path, _config_of(path, kind), iteration_of(path))
    inner = _tracked(path) or _newest(path) or _converted(path)
    if inner is None:
        raise CheckpointError(
            f"{path} holds no weights that glm3 knows",
            "give its base model, and this folder to --lora"
            if (path / ADAPTER_CONFIG).is_file()
            else "give a folder with *.safetensors or pytorch_model*.bin, mp_rank_* folders, "
            "or a training run",
        )
    return locate(inner)


def _check_links(folder: Path) -> None:
    """Refuses links to files that a model needs and that aren't there any more.

    Hugging Face's cache has such links in its snapshots, and clearing it can take the files away.

    Raises:
        CheckpointError: There is one.
    """
    for path in sorted(folder.iterdir()):
        is_needed = path.suffix in WEIGHT_SUFFIXES or path.name in _LINKED
        if is_needed and path.is_symlink() and not path.exists():
            raise CheckpointError(
                f"{path} is a dead link: it leads to {path.readlink()}, which isn't there",
                "download the model again, or mend the link",
            )


def _base_of(adapter: Path) -> Location:
    """Finds the model that an adapter of a checkpoint was trained on.

    Raises:
        CheckpointError: The adapter's config is damaged, or the model isn't there.
    """
    path = adapter / ADAPTER_CONFIG
    try:
        base = Path(read_json(path)["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} names no base model: {error}", "use another checkpoint"
        ) from None
    try:
        return locate(base)
    except CheckpointError as error:
        raise CheckpointError(
            f"{adapter.parent} is an adapter for {base}: {error.message}",
            f"give the base model, and {adapter} to --lora",
        ) from None


def locate_adapter(path: Path) -> Path:
    """Finds an adapter in PEFT's layout.

    Args:
        path: Its folder, a checkpoint of a run that trained it, or the run's folder (whose newest
            checkpoint is taken).

    Raises:
        CheckpointError: There is none.
    """
    checkpoints = sorted(path.glob("iter_*"), key=lambda child: iteration_of(child) or 0)
    for folder in (path, path / ADAPTER, *(child / ADAPTER for child in reversed(checkpoints))):
        if (folder / ADAPTER_CONFIG).is_file():
            return folder
    raise CheckpointError(
        f"the adapter {path} has no {ADAPTER_CONFIG}",
        "give a folder that PEFT's save_pretrained wrote, or a training run with --lora-rank",
    )


def weight_stamps(model: Path, lora: Path | None) -> list[list[tuple[str, int, int]]]:
    """Returns (name, size in bytes, modification time in ns) of each file of a model's weights.

    They stand for the weights, which would take too long to read.

    Args:
        model: The model's folder, or one that contains it.
        lora: The adapter that is computed with, if any.

    Returns:
        A list for the weights' folder, and one for the folder of each adapter.

    Raises:
        CheckpointError: The model or the adapter isn't there.
    """
    location = locate(model)
    adapters = [*location.adapters, *([] if lora is None else [locate_adapter(lora)])]
    return [_stamps(folder) for folder in (location.folder, *adapters)]


def _stamps(folder: Path) -> list[tuple[str, int, int]]:
    """Returns (name, size, time) of each weight file in a folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix in WEIGHT_SUFFIXES]
    stats = [path.stat() for path in paths]
    return [
        (str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns)
        for path, stat in zip(paths, stats, strict=True)
    ]


def kind_of(folder: Path) -> FolderKind | None:
    """Returns the kind of weights that lie directly in `folder`; None if there are none.

    Raises:
        CheckpointError: The folder is a distributed checkpoint that was never finished.
    """
    present = [name for name in _DIST_FILES if (folder / name).is_file()]
    if len(present) == len(_DIST_FILES):
        return "dist"
    if present and any(folder.glob("*.distcp")):
        raise CheckpointError(
            f"{folder} is an incomplete checkpoint ({present[0]} is there, but not both of "
            f"{' and '.join(_DIST_FILES)})",
            "use an older checkpoint",
        )
    if any(folder.glob("mp_rank_*")):
        return "ranks"
    return "hf" if hf_files(folder) or index_of(folder) else None


def index_of(folder: Path) -> Path | None:
    """Returns the path of the index of a sharded Hugging Face model; None if there is none.

    An index of safetensors files is preferred to one of .bin files.
    """
    if (folder / "model.safetensors").is_file():
        return None
    paths = (folder / name for name in (SAFETENSORS_INDEX, BIN_INDEX))
    return next((path for path in paths if path.is_file()), None)


def hf_files(folder: Path) -> list[Path]:
    """Returns the weight files of a Hugging Face folder; .bin files only without safetensors."""
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def _tracked(path: Path) -> Path | None:
    """Returns the checkpoint that Megatron's tracker file in `path` names; None without the file.

    Raises:
        CheckpointError: The file names no folder that exists.
    """
    if not (path / TRACKER).is_file():
        return None
    text = (path / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    name = iteration_folder(int(text)) if text.isdecimal() else text
    if text != "release" and not text.isdecimal():
        raise CheckpointError(
            f"{path / TRACKER} says {text!r}", "it must be an iteration's number or 'release'"
        )
    if not (path / name).is_dir():
        raise CheckpointError(
            f"{path / TRACKER} says {text}, but {name} does not exist",
            "correct the file or fetch the folder",
        )
    return path / name


def _newest(path: Path) -> Path | None:
    """Returns the newest complete checkpoint in `path`, else the folder `release`, else None."""
    found = [child for child in path.glob("iter_*") if iteration_of(child) is not None]
    for child in sorted(found, key=lambda child: iteration_of(child) or 0, reverse=True):
        try:
            if kind_of(child):
                return child
        except CheckpointError:
            continue  # was being written when the run stopped
    release = path / "release"
    return release if release.is_dir() and kind_of(release) else None


def _converted(path: Path) -> Path | None:
    """Returns the folder in `path` that an older conversion wrote; None if there is none."""
    folders = (path / name for name in _CONVERTED)
    return next((folder for folder in folders if folder.is_dir() and kind_of(folder)), None)


def iteration_folder(iteration: int) -> str:
    """Returns the name of the folder of a training checkpoint, such as iter_0000030."""
    return f"iter_{iteration:07d}"


def iteration_of(folder: Path) -> int | None:
    """Returns the iteration in the name of a training checkpoint's folder; None for other names."""
    match = _ITERATION.fullmatch(folder.name)
    return int(match.group(1)) if match else None


def _config_of(folder: Path, kind: FolderKind) -> Path | None:
    """Returns the config.json of the weights in `folder`; None if there is none.

    It lies in the folder, or above it where the folder is a part of a larger one.
    """
    if kind == "hf":
        above = [folder.parent] if folder.name in _CONVERTED else []
    else:
        is_part = iteration_of(folder) is not None or folder.name == "release"
        above = [folder.resolve().parent, folder.resolve().parent.parent] if is_part else []
    paths = (place / "config.json" for place in (folder, *above))
    return next((path for path in paths if path.is_file()), None)
