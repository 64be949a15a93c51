"""Reads weights in the dist layout: megatron-core's distributed checkpoints (torch_dist).

Version 1 of the format is read. Such a folder holds `.metadata`, which says where in the .distcp
files every part of every tensor lies (torch.distributed.checkpoint.filesystem), and metadata.json.
One tensor holds all layers. Reading it needs neither a process group nor megatron.
"""

import hashlib
import io
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from glm3cli.checkpoint.cuts import from_megatron
from glm3cli.checkpoint.files.manifest import find_manifest
from glm3cli.checkpoint.headers import Header, TensorProblem, compare, in_fp32, kept_dtype
from glm3cli.checkpoint.layouts.embedded import MappedFile
from glm3cli.checkpoint.locate import Location
from glm3cli.checkpoint.names import Stage, Weight, is_ignored, weights_of
from glm3cli.checkpoint.pickles import enum_member
from glm3cli.checkpoint.source import StoredSource, config_of
from glm3cli.errors import CheckpointError, StoppedError

# How the keys of a training run's other state begin.
_TRAINING = ("optimizer", "chained_", "rng", "opt_param_scheduler", "rerun_state")
# The names, by module, that `.metadata` files of torch.distributed.checkpoint refer to.
_NAMES = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.planner": (
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "float32", "float16", "bfloat16", "float64", "uint8", "int64", "int32"),
    "collections": ("OrderedDict", "defaultdict"),
    "builtins": ("set", "dict", "list", "slice"),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
    "pathlib._local": ("PosixPath",),
}


class _MetadataReader(pickle.Unpickler):
    """Unpickles a `.metadata` file, and refuses every class that such files don't need."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _NAMES.get(module, ()):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return enum_member
        if module.startswith("megatron.core.dist_checkpointing."):
            return _Unread
        raise pickle.UnpicklingError(f"{module}.{name}")


class _Unread:
    """A stand-in for the objects that megatron-core adds to `.metadata`, which aren't needed."""

    def __init__(self, *_args: Any, **_values: Any) -> None:
        pass


@dataclass(frozen=True)
class _Part:
    """A box of a tensor that is stored in one piece.

    Attributes:
        offsets: The indices in the tensor at which the box begins, one per dimension.
        sizes: The shape of the box.
        file: The name of the file that holds it.
        start: Its first byte in the file.
        length: The number of its bytes in the file.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int

    def has_layer(self, layer: int) -> bool:
        """Says whether the box, of a tensor of all layers, contains this layer."""
        return self.offsets[0] <= layer < self.offsets[0] + self.sizes[0]


class DistSource(StoredSource):
    """The weights of a distributed checkpoint that a conversion or a training run wrote."""

    layout = "dist"

    def __init__(self, location: Location) -> None:
        super().__init__(location, config_of(location))
        metadata = _read_metadata(self.path / ".metadata", self._digest_of(".metadata"))
        tensors = {
            name: value
            for name, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata) and not name.startswith(_TRAINING)
        }
        self._headers = {
            name: Header(tuple(value.size), value.properties.dtype)
            for name, value in tensors.items()
        }
        self._parts = _parts_of(metadata, tensors)
        self._mapped: dict[str, MappedFile] = {}
        self.problems = self._check()

    def _digest_of(self, name: str) -> str | None:
        """Returns the SHA-256 of a file according to the manifest; None if that isn't known."""
        noted = find_manifest(self.path, self.path)
        if noted is None:
            return None
        folder, manifest = noted
        place = (self.path / name).resolve().relative_to(folder.resolve()).as_posix()
        entry = manifest.files.get(place)
        return entry.sha256 if entry else None

    def _check(self) -> list[TensorProblem]:
        """Returns the problems with the checkpoint's files and with the tensors they hold."""
        expected: dict[str, tuple[int, ...]] = {}
        layers = self.model.num_layers
        for weight in weights_of(self.model):
            shape = weight.shape(self.model)
            if weight.stage is not Stage.LAYER:
                expected[weight.name("dist")] = shape
                continue
            for layer in range(layers):
                name = self._spelling(weight, layer)
                expected[name] = (layers, *shape) if _is_stacked(name) else shape
        problems = [*self._missing_files(), *compare(expected, self._headers)]
        for name, header in self._headers.items():
            stored = sum(math.prod(part.sizes) for part in self._parts.get(name, []))
            if stored != math.prod(header.shape) and not is_ignored(name):
                problems.append(TensorProblem("missing", name, f"parts of {name} are missing"))
        return problems

    def _missing_files(self) -> list[TensorProblem]:
        """Returns a problem for each missing file of weights.

        Other machines of the training run may have it; if the manifest says which, so does the
        problem.
        """
        present = {path.name for path in self.files()}
        missing = {part.file for parts in self._parts.values() for part in parts} - present
        noted = find_manifest(self.path, self.path)
        way = noted[1].way_to(missing) if noted else None
        return [
            TensorProblem("missing", name, f"{name} is missing" + (f": {way}" if way else ""))
            for name in sorted(missing)
        ]

    def _spelling(self, weight: Weight, layer: int | None) -> str:
        """Returns the key of a weight in this checkpoint; the usual one if none is there."""
        names = weight.names("dist", layer)
        return next((name for name in names if name in self._headers), names[0])

    def read(self, weight: Weight, layer: int | None = None) -> Tensor:
        """Returns the canonical tensor of one weight.

        It is a view of the mapped file if it is stored as one part in the canonical order.

        Raises:
            CheckpointError: A file is missing or cut short.
        """
        name = self._spelling(weight, layer)
        # Where one tensor holds all layers, its first dimension counts them.
        index = layer if weight.stage is Stage.LAYER and _is_stacked(name) else None
        parts = [part for part in self._parts[name] if index is None or part.has_layer(index)]
        if len(parts) == 1:
            tensor = self._box(parts[0], index)[1]
        else:
            tensor = torch.empty(weight.shape(self.model), dtype=self._headers[name].dtype)
            for part in parts:
                offsets, stored = self._box(part, index)
                extents = zip(offsets, stored.shape, strict=True)
                tensor[tuple(slice(start, start + size) for start, size in extents)] = stored
        return from_megatron(in_fp32(tensor), weight.cut, self.model, self.cat)

    def _box(self, part: _Part, layer: int | None) -> tuple[tuple[int, ...], Tensor]:
        """Returns the indices at which a part begins in its tensor, and the part's values.

        Args:
            part: The part.
            layer: The layer to take from a part of all layers; None takes the whole part.
        """
        stored = self._load(part)
        if layer is None:
            return part.offsets, stored
        return part.offsets[1:], stored[layer - part.offsets[0]]

    def _load(self, part: _Part) -> Tensor:
        """Returns the values of a part, as a view of the mapped file if they are aligned there.

        Raises:
            CheckpointError: The file is damaged.
            StoppedError: The process received SIGTERM.
        """
        path = self.path / part.file
        try:
            if part.file not in self._mapped:
                self._mapped[part.file] = MappedFile(path)
            return self._mapped[part.file].tensor(part.start, part.length).view(part.sizes)
        except StoppedError:
            raise
        except Exception as error:  # unpickling raises nearly anything
            raise CheckpointError(
                f"{path} is missing, damaged or cut short: {error}", "use an older checkpoint"
            ) from None

    def dtype(self, weight: Weight, layer: int | None = None) -> torch.dtype:
        """Returns the type that a tensor is stored in."""
        return kept_dtype(self._headers[self._spelling(weight, layer)].dtype)

    def files(self) -> list[Path]:
        """Returns the .distcp files, which hold the tensors."""
        return sorted(self.path.glob("*.distcp"))


def shortage(folder: Path) -> str | None:
    """Returns a sentence about what a checkpoint's files lack of what `.metadata` says they hold.

    Args:
        folder: The checkpoint.

    Returns:
        The sentence; None if all is there.

    Raises:
        CheckpointError: `.metadata` is damaged.
    """
    metadata = _read_metadata(folder / ".metadata", None)
    ends: dict[str, int] = {}
    for stored in metadata.storage_data.values():
        end = stored.offset + stored.length
        ends[stored.relative_path] = max(end, ends.get(stored.relative_path, 0))
    for name, end in sorted(ends.items()):
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size < end:
            return f"{name} has {path.stat().st_size:,} bytes instead of {end:,}"
    return None


def _is_stacked(name: str) -> bool:
    """Says whether a tensor with this key holds all layers: else the key has a layer's number."""
    return not any(part.isdecimal() for part in name.split("."))


def _read_metadata(path: Path, digest: str | None) -> Metadata:
    """Reads a `.metadata` file.

    Args:
        path: The file.
        digest: The SHA-256 that it should have, in hexadecimal digits; None if that isn't known.

    Raises:
        CheckpointError: The file is damaged, or refers to a class that such files don't need.
        StoppedError: The process received SIGTERM.
    """
    try:
        content = path.read_bytes()
        # A damaged pickle can ask for more memory than there is, which would end the process.
        if digest not in (None, hashlib.sha256(content).hexdigest()):
            raise pickle.UnpicklingError(f"its SHA-256 isn't {digest}")
        metadata = _MetadataReader(io.BytesIO(content)).load()
    except StoppedError:
        raise
    except Exception as error:  # unpickling raises nearly anything
        raise CheckpointError(
            f"{path} is damaged or wants a class that checkpoints don't need: {error}",
            "use another checkpoint",
        ) from None
    if not isinstance(metadata, Metadata) or metadata.storage_data is None:
        raise CheckpointError(f"{path} describes no checkpoint", "use another checkpoint")
    return metadata


def _parts_of(
    metadata: Metadata, tensors: dict[str, TensorStorageMetadata]
) -> dict[str, list[_Part]]:
    """Returns the stored parts of each of the given tensors, by key."""
    extents = {
        (name, tuple(chunk.offsets)): tuple(chunk.sizes)
        for name, value in tensors.items()
        for chunk in value.chunks
    }
    parts: dict[str, list[_Part]] = {}
    for index, stored in metadata.storage_data.items():
        if index.fqn not in tensors:
            continue
        offsets = tuple(index.offset or (0,) * len(tensors[index.fqn].size))
        sizes = extents[index.fqn, offsets]
        part = _Part(offsets, sizes, stored.relative_path, stored.offset, stored.length)
        parts.setdefault(index.fqn, []).append(part)
    return parts
