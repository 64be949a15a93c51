"""Says what a model folder holds, complete or not, without reading the weights."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from glm3cli.checkpoint.files.manifest import find_manifest
from glm3cli.checkpoint.layouts.opening import open_source
from glm3cli.checkpoint.names import WEIGHTS, Layout, Stage, Weight
from glm3cli.checkpoint.source import StoredSource


@dataclass(frozen=True)
class TensorKind:
    """One row of the table of weights, as it is in a folder.

    Attributes:
        name: The name in the folder's layout; `{}` stands for the layer.
        shape: The whole tensor's, of one layer.
        count: How many there are.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    count: int


@dataclass(frozen=True)
class Inspection:
    """What a folder holds.

    Attributes:
        bytes: Size of the files of weights.
        missing: Names that should be there but aren't.
        extra: Names that shouldn't be there.
        problems: Sentences about everything that is wrong.
        manifest: What the conversion that wrote the folder noted, if one did; of its files,
            tensors and places only the numbers.
    """

    path: str
    layout: Layout
    tp: int
    pp: int
    vpp: int
    layers_per_stage: str | None
    iteration: int | None
    bytes: int
    parameters: int
    kinds: list[TensorKind]
    missing: list[str]
    extra: list[str]
    problems: list[str]
    manifest: dict[str, Any] | None


def inspect(path: Path) -> Inspection:
    """Looks at a MODEL in any layout.

    Raises:
        CheckpointError: It holds no weights, or files that can't be read.
    """
    source = open_source(path, check=False)
    return Inspection(
        path=str(source.path),
        layout=source.layout,
        tp=source.parallel.tp,
        pp=source.parallel.pp,
        vpp=source.parallel.vpp,
        layers_per_stage=source.parallel.layers_per_stage,
        iteration=source.iteration,
        bytes=sum(file.stat().st_size for file in source.files()),
        parameters=source.model.num_parameters,
        kinds=_kinds(source),
        missing=[problem.name for problem in source.problems if problem.kind == "missing"],
        extra=[problem.name for problem in source.problems if problem.kind == "unknown"],
        problems=[problem.sentence for problem in source.problems],
        manifest=_noted(path, source.path),
    )


def _noted(path: Path, weights: Path) -> dict[str, Any] | None:
    found = find_manifest(path, weights)
    if found is None:
        return None
    values = asdict(found[1])
    numbers: dict[str, Any] = {name: len(values[name]) for name in ("files", "tensors")}
    return values | numbers | {"places": {k: len(v) for k, v in values["places"].items()}}


def _kinds(source: StoredSource) -> list[TensorKind]:
    kinds = []
    for weight in WEIGHTS:
        layers = range(source.model.num_layers) if weight.stage is Stage.LAYER else [None]
        dtypes = [dtype for layer in layers if (dtype := _dtype(source, weight, layer))]
        kinds.append(
            TensorKind(
                name=weight.name(source.layout),
                shape=weight.shape(source.model),
                dtype=", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes})),
                count=len(dtypes),
            )
        )
    return kinds


def _dtype(source: StoredSource, weight: Weight, layer: int | None) -> torch.dtype | None:
    try:
        return source.dtype(weight, layer)
    except KeyError:
        return None  # listed under `missing`
