"""Reads weights from a Hugging Face folder: safetensors or .bin files, one file or several shards.

The layout is chatglm or glm; the names of the tensors show which.
"""

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from glm3cli.checkpoint import pickles
from glm3cli.checkpoint.headers import Header, compare, in_fp32, kept_dtype, without_padding
from glm3cli.checkpoint.locate import Location, hf_files, index_of
from glm3cli.checkpoint.names import Cut, HfLayout, Weight, is_ignored, slots
from glm3cli.checkpoint.source import StoredSource, config_of
from glm3cli.checkpoint.wrappers import without_wrappers
from glm3cli.config.model import is_glm
from glm3cli.errors import CheckpointError
from glm3cli.host.parsing import read_json

# The types by their names in the safetensors format: those that are written, and further ones.
SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_OTHER_DTYPES = {
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Where trainers' own checkpoints have the weights, beside the optimizer's state and counters.
_WITHIN = ("state_dict", "module", "model")
_log = logging.getLogger(__name__)


class _Shard(ABC):
    """One file of a model, whose tensors are read on demand.

    Attributes:
        headers: The shape and type of every tensor, by name.
    """

    headers: dict[str, Header]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Returns the tensor called `name`."""


class _Safetensors(_Shard):
    """One safetensors file, which is mapped."""

    def __init__(self, path: Path) -> None:
        try:
            file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is damaged or cut short: {error}", "fetch or save it again"
            ) from None
        self._file = file
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        self.headers = {
            name: Header(tuple(part.get_shape()), _dtype_of(part.get_dtype(), path))
            for name, part in slices.items()
        }

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


def _dtype_of(name: str, path: Path) -> torch.dtype:
    """Returns the type for its name in the safetensors format.

    Raises:
        CheckpointError: The type is one that no model of ours comes in.
    """
    known = SAFETENSORS_DTYPES | _OTHER_DTYPES
    if name not in known:
        raise CheckpointError(
            f"{path} has tensors of the type {name}", "take files in fp32, bf16 or fp16"
        )
    return known[name]


class _Pickle(_Shard):
    """One .bin file, which torch.save wrote."""

    def __init__(self, path: Path) -> None:
        self._path = path
        content = self._load()
        self.headers = {n: Header(tuple(t.shape), t.dtype) for n, t in content.items()}
        # Files of the old format aren't mapped but read whole: they are read again when needed.
        self._content = content if is_zipfile(path) else None

    def _load(self) -> dict[str, Tensor]:
        """Returns the tensors of the file, by name.

        Raises:
            CheckpointError: It has something else.
        """
        content = pickles.load(self._path)
        place = next((name for name in _WITHIN if _has_tensors(content, name)), None)
        if place is not None:
            others = ", ".join(str(name) for name in content if name != place)
            _say_within(self._path, place, others)
            content = content[place]
        entries = content if isinstance(content, dict) else {type(content).__name__: content}
        other = next((name for name, value in entries.items() if not _is_stored(value)), None)
        if other is not None:
            raise CheckpointError(
                f"{self._path} holds something other than named tensors with values ({other})",
                "give the model's own pytorch_model*.bin files",
            )
        return dict(entries)

    def read(self, name: str) -> Tensor:
        return (self._content or self._load())[name]


def _is_stored(value: Any) -> bool:
    """Returns whether an entry of a .bin file is a tensor with values, which one on meta lacks."""
    return isinstance(value, Tensor) and not value.is_meta


def _has_tensors(content: Any, name: str) -> bool:
    """Returns whether an entry of a .bin file's content is a dictionary that has tensors."""
    inner = content.get(name) if isinstance(content, dict) else None
    return isinstance(inner, dict) and any(isinstance(value, Tensor) for value in inner.values())


@functools.lru_cache(maxsize=16)
def _say_within(path: Path, place: str, others: str) -> None:
    """Logs where a file has its weights, and what else it has, once for all times it is read."""
    left_out = f"; {others} is left out" if others else ""
    _log.warning("%s has the weights in its entry %s%s", path, place, left_out)


class HfSource(StoredSource):
    """The weights of a Hugging Face folder, in the layout chatglm or glm."""

    layout: HfLayout

    def __init__(self, location: Location) -> None:
        super().__init__(location, config_of(location))
        index = index_of(self.path)
        self._files = hf_files(self.path) if index is None else _indexed(index)
        self._shards = [
            _Safetensors(path) if path.suffix == ".safetensors" else _Pickle(path)
            for path in self._files
        ]
        self._place = self._places()
        headers = {name: shard.headers[stored] for name, (shard, stored) in self._place.items()}
        expected = {layout: self._expected(layout) for layout in get_args(HfLayout)}
        # If no name of either layout is there, the layout of the config.json is taken.
        usual = "glm" if is_glm(location.config or self.path / "config.json") else "chatglm"
        self.layout = max(
            expected, key=lambda name: (len(expected[name].keys() & headers), name == usual)
        )
        vocabulary = [w.name(self.layout) for w, _ in slots(self.model) if w.cut is Cut.VOCAB]
        rows = self.model.padded_vocab_size
        headers = without_padding(self.path, rows, headers, vocabulary)
        self.problems = compare(expected[self.layout], headers)
        if any(header.dtype is torch.float64 for header in headers.values()):
            _log.warning("%s is in fp64, and is read as fp32", self.path)

    def _expected(self, layout: HfLayout) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of all tensors that the model has in a layout, by name."""
        expected: dict[str, tuple[int, ...]] = {}
        for weight, layer in slots(self.model):
            expected |= weight.parts(layout, self.model, layer)
        return expected

    def _places(self) -> dict[str, tuple[_Shard, str]]:
        """Returns the shard that holds each tensor and its name there, by the tensor's name.

        The names differ where they tell of wrappers around the model or its modules, or where the
        model inside ChatGLMForConditionalGeneration was saved without its own prefix.

        Raises:
            CheckpointError: A tensor is in two files.
        """
        place: dict[str, tuple[_Shard, str]] = {}
        file_of: dict[str, Path] = {}
        stored_names = [name for shard in self._shards for name in shard.headers]
        unwrapped, wrappers = without_wrappers(stored_names)
        inner = _prefix_of(list(unwrapped.values()))
        if wrappers:
            left_out = " and ".join(wrappers)
            _log.warning("names in %s have %s, which is left out", self.path, left_out)
        for path, shard in zip(self._files, self._shards, strict=True):
            for stored in shard.headers:
                name = inner + unwrapped[stored]
                if name in place and not is_ignored(name):
                    raise CheckpointError(
                        f"{name} is both in {file_of[name].name} and in {path.name} of {self.path}",
                        "keep the files of one checkpoint only",
                    )
                place[name], file_of[name] = (shard, stored), path
        return place

    def read(self, weight: Weight, layer: int | None = None) -> Tensor:
        """Returns the canonical tensor of one weight.

        It is a view of the mapped file if the weight is one tensor in the layout.
        """
        names = weight.parts(self.layout, self.model, layer)
        places = [self._place[name] for name in names]
        parts = [in_fp32(shard.read(stored)) for shard, stored in places]
        if weight.cut is Cut.VOCAB:
            return parts[0][: self.model.padded_vocab_size]
        return parts[0] if len(parts) == 1 else self.cat(parts, 0)

    def dtype(self, weight: Weight, layer: int | None = None) -> torch.dtype:
        """Returns the type that a weight is stored in.

        If its parts have different types, it is the type that holds the values of all.
        """
        names = weight.parts(self.layout, self.model, layer)
        places = [self._place[name] for name in names]
        dtypes = [kept_dtype(shard.headers[stored].dtype) for shard, stored in places]
        return functools.reduce(torch.promote_types, dtypes)

    def files(self) -> list[Path]:
        """Returns the files that hold the weights."""
        return self._files


def _prefix_of(names: Sequence[str]) -> str:
    """Returns the prefix that all names lack because ChatGLMModel alone was saved, or ""."""
    lacking = ("embedding.", "encoder.", "output_layer.", "rotary_pos_emb.", "prefix_encoder.")
    return "transformer." if names and all(name.startswith(lacking) for name in names) else ""


def _indexed(index: Path) -> list[Path]:
    """Returns the files that the index of a sharded model names.

    Raises:
        CheckpointError: The index isn't valid, or a file is missing.
    """
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise CheckpointError(f"{index} is no valid index", "fetch it again") from None
    paths = [index.parent / str(name) for name in names]
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        raise CheckpointError(
            f"{index.name} names {', '.join(absent)}, which {index.parent} lacks",
            "fetch the missing files",
        )
    return paths
