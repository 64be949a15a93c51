"""Says why tensors of an adapter have no place in the model."""

import re
from collections.abc import Sequence
from pathlib import Path

from glm3cli.config.model import ModelConfig
from glm3cli.errors import CheckpointError

ANOTHER_BASE = "take the base model that the adapter was trained on"
_MERGE = "merge it by PEFT's merge_and_unload, and convert the result"
_MODULES = (
    "query_key_value, dense, dense_h_to_4h or dense_4h_to_h (GlmForCausalLM: q_proj, k_proj, "
    "v_proj, o_proj, gate_up_proj or down_proj)"
)
_ENDS = r"(lm_head|output_layer|embed_tokens|word_embeddings)"
# What names of tensors tell about an adapter, and what to do.
_KINDS: list[tuple[str, str, str]] = [
    (
        rf"(^|\.){_ENDS}\.lora_",
        "it changes the output layer or the embedding, which glm3 doesn't merge",
        _MERGE,
    ),
    (
        rf"(^|\.){_ENDS}\.(\w+\.)*weight$",
        "it has a whole output layer or embedding beside the adapter, as PEFT saves them with "
        "save_embedding_layers",
        "save it by save_pretrained(..., save_embedding_layers=False) if training didn't change "
        f"them; else {_MERGE}",
    ),
]


def refuse_misfits(file: Path, names: Sequence[str], model: ModelConfig) -> None:
    """Raises an error if there are any tensors without a place in the model.

    Args:
        file: The adapter's file, for the message.
        names: The names of these tensors.
        model: The shape of the base model.

    Raises:
        CheckpointError: There are some; the message has the name of one, and the reason.
    """
    for pattern, reason, way_out in _KINDS:
        found = [name for name in names if re.search(pattern, name)]
        if found:
            raise CheckpointError(f"{file}: {reason} ({found[0]})", way_out)
    for name in names:
        raise CheckpointError(f"{file}: {_misfit(name, model)}", ANOTHER_BASE)


def _misfit(name: str, model: ModelConfig) -> str:
    """Returns a sentence about why a tensor of this name has no place in the model."""
    layer = re.search(r"layers\.(\d+)\.", name)
    if layer and int(layer.group(1)) >= model.num_layers:
        return (
            f"{name} is for layer {layer.group(1)}, but the model has {model.num_layers} layers "
            "(counted from 0)"
        )
    return f"{name} is no lora_A or lora_B of {_MODULES}, the modules that can be merged"
