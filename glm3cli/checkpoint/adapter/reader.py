"""Reads a PEFT LoRA adapter for the model that it was trained on.

The adapter's modules may have the names of either Hugging Face layout, chatglm or glm.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from safetensors import SafetensorError, safe_open
from torch import Tensor

from glm3cli.checkpoint import pickles
from glm3cli.checkpoint.adapter.config import AdapterConfig, read_adapter_config
from glm3cli.checkpoint.adapter.pairs import Adapter, Pair
from glm3cli.checkpoint.names import HfLayout, Slot, slots
from glm3cli.config.model import ModelConfig
from glm3cli.errors import CheckpointError

# The logical names of the weights that an adapter may change.
_TARGETS = ("qkv_weight", "attention_out", "mlp_up", "mlp_down")
_MODULES = (
    "query_key_value, dense, dense_h_to_4h or dense_4h_to_h (GlmForCausalLM: q_proj, k_proj, "
    "v_proj, o_proj, gate_up_proj or down_proj)"
)
WEIGHTS_FILE = "adapter_model.safetensors"
# In a state dict that was saved by hand the adapter's name ("default") is part of the names.
_NAME = re.compile(
    r"(?:base_model\.model\.)?(.+)\.lora_(A|B|magnitude_vector)(?:\.default)?(?:\.weight)?"
)
_ANOTHER_BASE = "take the base model that the adapter was trained on"


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
        CheckpointError: The adapter is damaged, has tensors for modules that ChatGLM3 doesn't have,
            lacks some, or belongs to a base model of another shape.
    """
    config = read_adapter_config(folder)
    file = _file(folder)
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _tensors(file):
        match = _NAME.fullmatch(name)
        if match is None:
            raise CheckpointError(f"{file}: {_misfit(name, model)}", _ANOTHER_BASE)
        found.setdefault(match.group(1), {})[match.group(2)] = tensor
    modules = _modules(model, found)
    for module, sides in found.items():
        if module not in modules:
            name = f"{module}.lora_{min(sides)}.weight"
            raise CheckpointError(f"{file}: {_misfit(name, model)}", _ANOTHER_BASE)
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


def _misfit(name: str, model: ModelConfig) -> str:
    """Returns a sentence about why a tensor of this name has no place in the model."""
    layer = re.search(r"layers\.(\d+)\.", name)
    if layer and int(layer.group(1)) >= model.num_layers:
        return (
            f"{name} is for layer {layer.group(1)}, but the model has {model.num_layers} layers "
            "(counted from 0)"
        )
    return f"{name} is no lora_A or lora_B of {_MODULES}, the modules that can be merged"


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
                _ANOTHER_BASE,
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
