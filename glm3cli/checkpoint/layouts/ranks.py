"""Reads weights from Megatron's per-rank files, in the layouts legacy and mcore.

The files are those of Megatron-LM core_r0.6.0 (megatron/training/checkpointing.py), which ModelLink
1.1 writes, too: mp_rank_XX[_YYY]/model_optim_rng.pt for tensor-parallel rank XX of pipeline stage
YYY. Each has its weights under `model`, or under `model0`, `model1`, ... for the chunks of an
interleaved pipeline. Layers are counted from 0 in every chunk.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm3cli.checkpoint import pickles
from glm3cli.checkpoint.cuts import join, piece_shape
from glm3cli.checkpoint.headers import (
    Header,
    TensorProblem,
    compare,
    in_fp32,
    without_padding,
)
from glm3cli.checkpoint.layouts.arguments import model_of, run_of
from glm3cli.checkpoint.locate import Location
from glm3cli.checkpoint.names import WEIGHTS, Cut, Layout, Stage, Weight, slots
from glm3cli.checkpoint.scratch import bytes_of
from glm3cli.checkpoint.source import StoredSource, config_of
from glm3cli.config.model import ModelConfig
from glm3cli.config.parallel import ModelParallelConfig
from glm3cli.errors import CheckpointError

FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_LAYER = re.compile(r"layers\.(\d+)\.")
# The entries of a rank file that are read, beside the weights.
_USED = {"args", "checkpoint_version", "iteration"}

# The tensors of one chunk of one rank, under flat names.
Chunk = dict[str, Tensor]


class RanksSource(StoredSource):
    """The weights of a tree of per-rank files, whose parallel sizes are found from the files."""

    def __init__(self, location: Location) -> None:
        self._paths = _rank_paths(location.folder)
        tp, pp = (max(rank[axis] for rank in self._paths) + 1 for axis in (0, 1))
        saved = {rank: _load(path) for rank, path in self._paths.items()}
        _check_same_run(self._paths, saved)
        # [tp rank][stage][chunk]
        self._chunks = [
            [_chunks(saved[t, p], self._paths[t, p]) for p in range(pp)] for t in range(tp)
        ]
        legacy = any(name.startswith("language_model/") for name in self._chunks[0][0][0])
        self.layout: Layout = "legacy" if legacy else "mcore"
        self._tp, self._pp, self._vpp = tp, pp, len(self._chunks[0][0])
        super().__init__(location, self._find_model(location, saved[0, 0]))
        if self.iteration is None and isinstance(saved[0, 0].get("iteration"), int):
            self.iteration = saved[0, 0]["iteration"]
        self._sizes = self._count_layers()
        self._place = {
            layer: (p, v, local)
            for layer, (p, v, local) in enumerate(
                (p, v, local)
                for v in range(self._vpp)
                for p in range(pp)
                for local in range(self._sizes[p, v])
            )
        }
        self.parallel = self._find_parallel()
        self.problems = self._check()
        self.unused = _unused(self._paths[0, 0], saved[0, 0])

    def _find_model(self, location: Location, saved: Mapping[str, Any]) -> ModelConfig:
        """Returns the model's shape from its config.json, else from the saved arguments."""
        if location.config is not None:
            return config_of(location)
        path = self._paths[0, 0]
        embedding = _find(self._chunks[0][0][0], self.layout, "embedding")
        rows = None if embedding is None else embedding.shape[0] * self._tp
        return model_of(saved.get("args"), rows, path)

    def _count_layers(self) -> dict[tuple[int, int], int]:
        """Returns the number of layers of every (stage, chunk).

        It is found from the highest index of a layer on any tensor-parallel rank.
        """
        sizes = {}
        for p in range(self._pp):
            for v in range(self._vpp):
                names = {n for rank in self._chunks for n in rank[p][v]}
                found = [int(match.group(1)) for n in names if (match := _LAYER.search(n))]
                sizes[p, v] = max(found, default=-1) + 1
        return sizes

    def _find_parallel(self) -> ModelParallelConfig:
        """Returns the parallel sizes that the files are cut for."""
        sizes = [self._sizes[p, 0] for p in range(self._pp)]
        values: dict[str, Any] = {"tp": self._tp, "pp": self._pp, "vpp": self._vpp}
        if self._vpp == 1 and len(set(sizes)) > 1:
            values["layers_per_stage"] = ",".join(map(str, sizes))
        return ModelParallelConfig.parse(values)

    def _check(self) -> list[TensorProblem]:
        """Returns the problems with the tensors in all files."""
        problems = []
        total = sum(self._sizes.values())
        if total != self.model.num_layers:
            sentence = f"the files hold {total} layers, but the model has {self.model.num_layers}"
            problems.append(TensorProblem("missing", "layers", sentence))
        for (t, p), path in self._paths.items():
            for v, chunk in enumerate(self._chunks[t][p]):
                found = {n: Header(tuple(x.shape), x.dtype) for n, x in chunk.items()}
                rows, names = self.model.padded_vocab_size, self._of_vocabulary
                found = without_padding(self.path, rows, found, names, self._tp)
                where = path.parent.name + (f" model{v}" if self._vpp > 1 else "")
                problems += compare(self._expected(p, v, chunk), found, where)
        return problems

    @property
    def _of_vocabulary(self) -> list[str]:
        """The names of the weights that have a row for each token."""
        return [w.name(self.layout) for w, _ in slots(self.model, 0) if w.cut is Cut.VOCAB]

    def _expected(self, p: int, v: int, chunk: Chunk) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of all tensors that a chunk must hold, by the name that it gives them.

        Args:
            p: The pipeline stage.
            v: The number of the chunk on the stage.
            chunk: The tensors that the chunk does hold.
        """
        expected = {}
        is_first = (p, v) == (0, 0)
        is_last = (p, v) == (self._pp - 1, self._vpp - 1)
        for weight, layer in slots(self.model, self._sizes[p, v]):
            if (weight.stage is Stage.FIRST and not is_first) or (
                weight.stage is Stage.LAST and not is_last
            ):
                continue
            name = _spelling(weight, layer, self.layout, chunk)
            expected[name] = piece_shape(weight.shape(self.model), weight.cut, self._tp)
        return expected

    def read(self, weight: Weight, layer: int | None = None) -> Tensor:
        """Returns the canonical tensor of one weight.

        It is a view of the mapped file if the weight is neither cut nor regrouped.

        Raises:
            CheckpointError: Ranks have different copies of a weight that isn't cut.
        """
        pieces = self._pieces(weight, layer)
        if weight.cut is Cut.WHOLE:
            first = bytes_of(pieces[0])
            if any(bytes_of(other) != first for other in pieces[1:]):
                raise CheckpointError(
                    f"{self.path}: the tensor-parallel ranks have different copies of "
                    f"{weight.logical}" + ("" if layer is None else f" of layer {layer}"),
                    "the files come from different checkpoints; fetch them again",
                )
        whole = join(pieces, weight.cut, self.model, self.cat)
        return whole[: self.model.padded_vocab_size] if weight.cut is Cut.VOCAB else whole

    def _pieces(self, weight: Weight, layer: int | None) -> list[Tensor]:
        """Returns the pieces of a weight, by tensor-parallel rank."""
        if weight.stage is Stage.FIRST:
            p, v, local = 0, 0, None
        elif weight.stage is Stage.LAST:
            p, v, local = self._pp - 1, self._vpp - 1, None
        else:
            p, v, local = self._place[layer or 0]
        chunks = [rank[p][v] for rank in self._chunks]
        return [in_fp32(chunk[_spelling(weight, local, self.layout, chunk)]) for chunk in chunks]

    def dtype(self, weight: Weight, layer: int | None = None) -> torch.dtype:
        """Returns the type that a tensor is stored in."""
        return self._pieces(weight, layer)[0].dtype

    def files(self) -> list[Path]:
        """Returns the files of all ranks."""
        return list(self._paths.values())

    def reading_order(self) -> list[list[Path]]:
        """Returns the files of the tensor-parallel ranks, one stage after the other."""
        return [[self._paths[t, p] for t in range(self._tp)] for p in range(self._pp)]


def _rank_paths(folder: Path) -> dict[tuple[int, int], Path]:
    """Returns the file of every (tensor-parallel rank, pipeline stage).

    Raises:
        CheckpointError: A folder's name isn't understood, or a rank's file is missing.
    """
    paths = {}
    for child in sorted(folder.glob("mp_rank_*")):
        match = _RANK.fullmatch(child.name)
        if match is None:
            raise CheckpointError(
                f"{child} is no mp_rank_XX or mp_rank_XX_YYY folder",
                "glm3 takes tensor- and pipeline-parallel files; other axes don't fit",
            )
        paths[int(match.group(1)), int(match.group(2) or 0)] = child / FILE
    tp, pp = (max(rank[axis] for rank in paths) + 1 for axis in (0, 1))
    absent = [f"tp {t} pp {p}" for t in range(tp) for p in range(pp) if (t, p) not in paths]
    absent += [str(path) for path in paths.values() if not path.is_file()]
    if absent:
        raise CheckpointError(
            f"{folder} lacks rank files: {', '.join(absent)}", "fetch the missing files"
        )
    return paths


def _load(path: Path) -> dict[str, Any]:
    """Loads a rank file and checks its version.

    Raises:
        CheckpointError: The file is damaged, or older than version 3.0, which brought Megatron's
            present order of the QKV rows.
    """
    saved = pickles.load(path)
    if not isinstance(saved, dict) or not ({"model", "model0"} & saved.keys()):
        raise CheckpointError(f"{path} holds no model", "give Megatron's per-rank files")
    version = saved.get("checkpoint_version", 0)
    if not isinstance(version, int | float) or version < 3:
        raise CheckpointError(
            f"{path} has checkpoint_version {version}; its QKV rows are in another order than "
            "those of version 3.0",
            "load it in the Megatron that wrote it and save it again with a newer one",
        )
    return saved


def _unused(path: Path, saved: Mapping[str, Any]) -> list[str]:
    """Returns what a rank file holds that only its own trainer needs, and the files beside it."""
    entries = (name for name in saved if name not in _USED and not re.fullmatch(r"model\d*", name))
    files = (other.name for other in path.parent.iterdir() if other != path)
    return sorted([*entries, *files])


def _check_same_run(
    paths: Mapping[tuple[int, int], Path], saved: Mapping[tuple[int, int], Mapping[str, Any]]
) -> None:
    """Checks that all files are of one run and one iteration.

    Raises:
        CheckpointError: One isn't: weights of different iterations don't work together.
    """
    runs = {rank: run_of(content) | _chunk_names(content) for rank, content in saved.items()}
    first = runs[0, 0]
    for rank, run in runs.items():
        for name, value in run.items():
            if value != first[name]:
                raise CheckpointError(
                    f"{paths[rank]} has {name} {value}, but {paths[0, 0]} has {first[name]}: "
                    "they come from different checkpoints",
                    "fetch all files of one checkpoint",
                )


def _chunk_names(saved: Mapping[str, Any]) -> dict[str, object]:
    """Returns the names of the chunks in a rank file, which must be the same on all ranks."""
    return {"chunks": [name for name in saved if re.fullmatch(r"model\d*", name)]}


def _chunks(saved: Mapping[str, Any], path: Path) -> list[Chunk]:
    """Returns the tensors of every chunk in a rank file, under flat names."""
    names = ["model"] if "model" in saved else sorted(n for n in saved if n.startswith("model"))
    if names[0] != "model" and names != [f"model{i}" for i in range(len(names))]:
        raise CheckpointError(f"{path} has the chunks {', '.join(names)}", "fetch the file again")
    return [
        dict(_flatten(saved[f"model{i}" if "model" not in saved else "model"]))
        for i in range(len(names))
    ]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Returns the tensors in nested dictionaries by their paths, with `/` between the levels."""
    flat: dict[str, Tensor] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}/")
        elif isinstance(value, Tensor):
            flat[prefix + name] = value
    return flat


def _spelling(weight: Weight, layer: int | None, layout: Layout, chunk: Chunk) -> str:
    """Returns the name of a weight in a chunk: the usual one unless only another is there."""
    names = weight.names(layout, layer)
    return next((name for name in names if name in chunk), names[0])


def _find(chunk: Chunk, layout: Layout, logical: str) -> Tensor | None:
    """Returns a weight outside the layers by its logical name; None if the chunk lacks it."""
    weight = next(weight for weight in WEIGHTS if weight.logical == logical)
    return chunk.get(weight.name(layout))
