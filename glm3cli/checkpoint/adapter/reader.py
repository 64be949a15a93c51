"""Reads a PEFT LoRA adapter for the model that it was trained on.

The adapter's modules may have the names of either Hugging Face layout, chatglm or glm.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from safetensors import SafetensorError, safe_open
from torch import Tensor

from glm3cli.checkpoint import pickles
from glm3cli.checkpoint.adapter.config import AdapterConfig, read_adapter_config
from glm3cli.checkpoint.adapter.misfits import ANOTHER_BASE, refuse_misfits
from glm3cli.checkpoint.adapter.pairs import Adapter, Pair
from glm3cli.checkpoint.locate import ADAPTER_CONFIG
from glm3cli.checkpoint.names import HfLayout, Slot, slots
from glm3cli.checkpoint.wrappers import PEFT, without_wrappers
from glm3cli.config.model import ModelConfig
from glm3cli.errors import CheckpointError

# The logical names of the weights that an adapter may change.
_TARGETS = ("qkv_weight", "attention_out", "mlp_up", "mlp_down")
WEIGHTS_FILE = "adapter_model.safetensors"
# In a state dict that was saved by hand the adapter's name ("default") is part of the names.
_NAME = re.compile(r"(.+)\.lora_(A|B|magnitude_vector)(?:\.default)?(?:\.weight)?")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Module:
    """A linear layer of the model that an adapter may change.

    Attributes:
        slot: The weight and the layer that the module belongs to.
        rows: The rows of the weight that are the module's: all, unless the layout splits the weight
            into several modules.
        shape: The numbers of the module's outputs and inputs.
    """

    slot: Slot
    rows: slice
    shape: tuple[int, int]


def open_adapter(folder: Path, model: ModelConfig) -> Adapter:
    """Reads the folder of a PEFT adapter.

    Args:
        folder: The folder.
        model: The shape of the base model.

    Raises:
        CheckpointError: The adapter is damaged, has tensors for other modules than those that
            can be merged, lacks some, or belongs to a base model of another shape.
    """
    config = read_adapter_config(folder)
    file = _file(folder)
    found, modules = _matched(file, model)
    for module, sides in found.items():
        if "magnitude_vector" in sides and not config.use_dora:
            raise CheckpointError(
                f"{file} has lora_magnitude_vector of {module}, but {ADAPTER_CONFIG} says that it "
                "is no DoRA (use_dora)",
                "set use_dora to true there if it was trained as a DoRA; else save it again",
            )
    for module in modules:
        if module in found or config.wants(module):
            needed = ["A", "B", *(["magnitude_vector"] if config.use_dora else [])]
            absent = [side for side in needed if side not in found.get(module, {})]
            if absent:
                names = " and ".join(f"lora_{side}" for side in absent)
                raise CheckpointError(f"{file} lacks {names} of {module}", "save it again")
    if not found:
        raise CheckpointError(f"{file} holds no tensors", "save the adapter again")
    pairs: dict[Slot, list[Pair]] = {}
    for name, sides in found.items():
        slot = modules[name].slot
        pairs.setdefault(slot, []).append(_pair(file, name, sides, modules[name], config))
    return Adapter(pairs)


def _matched(
    file: Path, model: ModelConfig
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Module]]:
    """Returns the matrices in a file by module and side, and the modules that it could change.

    Raises:
        CheckpointError: A tensor belongs to no such module.
    """
    tensors = dict(_tensors(file))
    names = _unwrapped(file, list(tensors))
    places = {stored: _NAME.fullmatch(name) for stored, name in names.items()}
    found: dict[str, dict[str, Tensor]] = {}
    for stored, place in places.items():
        if place is not None:
            found.setdefault(place.group(1), {})[place.group(2)] = tensors[stored]
    modules = _modules(model, found)
    misfits = [s for s, place in places.items() if place is None or place.group(1) not in modules]
    refuse_misfits(file, misfits, model)
    return found, modules


def _unwrapped(file: Path, stored: Sequence[str]) -> dict[str, str]:
    """Returns the names in the model, with the endings of PEFT, by those in a file."""
    names, wrappers = without_wrappers(stored)
    wrappers = [wrapper for wrapper in wrappers if wrapper != PEFT]
    if wrappers:
        _log.warning("names in %s have %s, which is left out", file, " and ".join(wrappers))
    return {one: name.removeprefix(PEFT) for one, name in names.items()}


def _modules(model: ModelConfig, found: Mapping[str, object]) -> dict[str, Module]:
    """Returns the modules that an adapter may change, in the layout of most names in `found`."""
    namings = [modules_in(layout, model) for layout in get_args(HfLayout)]
    return max(namings, key=lambda modules: len(modules.keys() & found))


def modules_in(layout: HfLayout, model: ModelConfig) -> dict[str, Module]:
    """Returns the modules of a model that an adapter may change, by their names in a layout."""
    modules = {}
    for weight, layer in slots(model):
        if weight.logical not in _TARGETS:
            continue
        start = 0
        for name, (outputs, inputs) in weight.parts(layout, model, layer).items():
            rows = slice(start, start + outputs)
            module = Module((weight, layer), rows, (outputs, inputs))
            modules[name.removesuffix(".weight")] = module
            start += outputs
    return modules


def _pair(
    file: Path, name: str, sides: dict[str, Tensor], module: Module, config: AdapterConfig
) -> Pair:
    """Returns the matrices of one module.

    Args:
        file: The file of the adapter, for messages.
        name: The module's name.
        sides: The matrices "A" and "B", and a DoRA's "magnitude_vector".
        module: The module's place in the model.
        config: The ranks and scales of the adapter.

    Raises:
        CheckpointError: A matrix has a wrong shape or isn't of a floating type.
    """
    rank = config.rank(name)
    outputs, inputs = module.shape
    shapes: dict[str, tuple[int, ...]] = {"A": (rank, inputs), "B": (outputs, rank)}
    if config.use_dora:
        shapes["magnitude_vector"] = (outputs,)
    for side, shape in shapes.items():
        if tuple(sides[side].shape) != shape:
            raise CheckpointError(
                f"{file}: lora_{side} of {name} has the shape {list(sides[side].shape)}; with "
                f"rank {rank} this base model needs {list(shape)}",
                ANOTHER_BASE,
            )
        if not sides[side].is_floating_point():
            raise CheckpointError(
                f"{file}: lora_{side} of {name} is {sides[side].dtype}", "save it as fp32"
            )
    magnitude = sides["magnitude_vector"] if config.use_dora else None
    return Pair(module.rows, sides["A"], sides["B"], config.scale(name), magnitude)


def _file(folder: Path) -> Path:
    """Returns the path of the adapter's weights."""
    paths = [folder / WEIGHTS_FILE, folder / "adapter_model.bin"]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        raise CheckpointError(
            f"{folder} has neither {paths[0].name} nor {paths[1].name}",
            "give a folder that PEFT's save_pretrained wrote",
        )
    return found


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields the names and values of all tensors in a file of an adapter."""
    if file.suffix == ".bin":
        content = pickles.load(file)
        if not isinstance(content, dict):
            raise CheckpointError(f"{file} holds no named tensors", "save the adapter again")
        for name, tensor in content.items():
            if not isinstance(tensor, Tensor):
                raise CheckpointError(f"{file}: {name} is no tensor", "save the adapter again")
            yield name, tensor
        return
    try:
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118
                yield name, content.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: {error}", "save the adapter again") from None
