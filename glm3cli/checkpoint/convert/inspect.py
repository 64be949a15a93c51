"""Describes a model folder, complete or not, from its headers: the weights aren't read."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from glm3cli.checkpoint.files.manifest import find_manifest
from glm3cli.checkpoint.layouts.opening import open_at
from glm3cli.checkpoint.locate import locate
from glm3cli.checkpoint.names import Layout, Stage, Weight, weights_of
from glm3cli.checkpoint.source import StoredSource


@dataclass(frozen=True)
class TensorKind:
    """One row of the table of weights, as a folder holds it.

    Attributes:
        name: The weight's name in the folder's layout; `{}` stands for the layer.
        shape: The shape of the whole weight, of one layer.
        dtype: The types that it is stored in, such as `float16`, separated by commas.
        count: The number of layers that hold it; 1 or 0 for weights outside the layers.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    count: int


@dataclass(frozen=True)
class Inspection:
    """What a model folder holds; `--json` prints these fields.

    Attributes:
        path: The folder of the weights themselves.
        layout: The layout of the folder.
        tp: The number of tensor-parallel ranks that the files are cut for.
        pp: The number of pipeline stages that the files are cut for.
        vpp: The number of model chunks per pipeline stage.
        layers_per_stage: The numbers of layers of the stages, separated by commas, if they differ;
            else None.
        iteration: The training iteration, if the folder or its files name one; else None.
        bytes: The size of the files of weights, in bytes.
        parameters: The number of the model's parameters.
        kinds: The rows of the table of weights, as the folder holds them.
        missing: The names of tensors that should be there but aren't.
        extra: The names of tensors that shouldn't be there.
        unused: What the files hold beside the weights, such as the optimizer's state.
        problems: Sentences about everything that is wrong.
        manifest: The content of the folder's manifest, with the number of its files, its tensors,
            and each machine's files in place of their names; None without a manifest.
        adapters: The folders of the LoRA adapters that belong to the weights.
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
    unused: list[str]
    problems: list[str]
    manifest: dict[str, Any] | None
    adapters: list[str]


def inspect(path: Path) -> Inspection:
    """Describes a model in any layout.

    Args:
        path: The folder of the model, or a training run (its newest complete checkpoint).

    Raises:
        CheckpointError: The folder holds no weights, or files that can't be read.
    """
    location = locate(path)
    source = open_at(location, check=False)
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
        unused=source.unused,
        problems=[problem.sentence for problem in source.problems],
        manifest=_noted(path, source.path),
        adapters=[str(folder) for folder in location.adapters],
    )


def _noted(path: Path, weights: Path) -> dict[str, Any] | None:
    """Returns the content of a model's manifest, in the form of `Inspection.manifest`."""
    found = find_manifest(path, weights)
    if found is None:
        return None
    values = asdict(found[1])
    numbers: dict[str, Any] = {name: len(values[name]) for name in ("files", "tensors")}
    return values | numbers | {"places": {k: len(v) for k, v in values["places"].items()}}


def _kinds(source: StoredSource) -> list[TensorKind]:
    """Returns the rows of the table of weights, as the source holds them."""
    kinds = []
    for weight in weights_of(source.model):
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
    """Returns the type that a tensor is stored in; None if the tensor is missing."""
    try:
        return source.dtype(weight, layer)
    except KeyError:
        return None  # listed under `missing`
