"""Writes small random LoRA adapters as PEFT saves them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from glm3cli.config.model import ModelConfig
from tests.support.checkpoints import SMALL

# The linear layers under transformer.encoder.layers.N, with the numbers of outputs and inputs.
TARGETS = {
    "self_attention.query_key_value": lambda m: (m.query_size + 2 * m.kv_size, m.hidden_size),
    "self_attention.dense": lambda m: (m.hidden_size, m.query_size),
    "mlp.dense_h_to_4h": lambda m: (2 * m.ffn_hidden_size, m.hidden_size),
    "mlp.dense_4h_to_h": lambda m: (m.hidden_size, m.ffn_hidden_size),
}
RANK, ALPHA = 3, 7


def module_names(*targets: str, model: ModelConfig = SMALL) -> list[str]:
    """Returns the names of the modules of all layers in the chatglm layout; all without targets."""
    return [
        f"transformer.encoder.layers.{layer}.{target}"
        for layer in range(model.num_layers)
        for target in targets or TARGETS
    ]


def adapter_tensors(
    *targets: str, model: ModelConfig = SMALL, ranks: dict[str, int] | None = None
) -> dict[str, Tensor]:
    """Returns random matrices for modules of the chatglm layout, by PEFT's names.

    Args:
        targets: The modules, as in `TARGETS`; all if none is given.
        model: The shape of the base model.
        ranks: The rank by target, where it isn't `RANK`.
    """
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for module in module_names(*targets, model=model):
        target = module.split(".", 4)[4]
        outputs, inputs = TARGETS[target](model)
        rank = (ranks or {}).get(target, RANK)
        for side, shape in {"A": (rank, inputs), "B": (outputs, rank)}.items():
            name = f"base_model.model.{module}.lora_{side}.weight"
            tensors[name] = torch.randn(shape, generator=generator)
    return tensors


def glm_adapter_tensors(model: ModelConfig = SMALL) -> dict[str, Tensor]:
    """Returns random matrices for all modules of the glm layout, by PEFT's names."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for layer in range(model.num_layers):
        for target, (outputs, inputs) in glm_targets(model).items():
            for side, shape in {"A": (RANK, inputs), "B": (outputs, RANK)}.items():
                name = f"base_model.model.model.layers.{layer}.{target}.lora_{side}.weight"
                tensors[name] = torch.randn(shape, generator=generator)
    return tensors


def with_lengths(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Makes a DoRA of the matrices of an adapter, with lengths of rows between 1 and 2."""
    generator = torch.Generator().manual_seed(4)
    lengths = {
        name.replace("lora_B.weight", "lora_magnitude_vector"): 1
        + torch.rand(len(tensor), generator=generator)
        for name, tensor in tensors.items()
        if ".lora_B." in name
    }
    return tensors | lengths


def glm_targets(model: ModelConfig = SMALL) -> dict[str, tuple[int, int]]:
    """Returns the linear layers of a layer in the glm layout, with their outputs and inputs."""
    return {
        "self_attn.q_proj": (model.query_size, model.hidden_size),
        "self_attn.k_proj": (model.kv_size, model.hidden_size),
        "self_attn.v_proj": (model.kv_size, model.hidden_size),
        "self_attn.o_proj": (model.hidden_size, model.query_size),
        "mlp.gate_up_proj": (2 * model.ffn_hidden_size, model.hidden_size),
        "mlp.down_proj": (model.hidden_size, model.ffn_hidden_size),
    }


def write_adapter(
    folder: Path, tensors: dict[str, Tensor] | None = None, kind: str = "safetensors", **config
) -> Path:
    """Writes an adapter's folder, like PEFT's save_pretrained.

    Args:
        folder: The new folder, which is returned.
        tensors: The matrices by PEFT's names; random ones of the chatglm layout if None.
        kind: The file of the matrices: "safetensors" or "bin".
        config: Fields of adapter_config.json to change.
    """
    folder.mkdir()
    tensors = adapter_tensors() if tensors is None else tensors
    values = {
        "base_model_name_or_path": "THUDM/chatglm3-6b",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.1,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": RANK,
        "target_modules": [target.split(".")[1] for target in TARGETS],
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(values | config))
    if kind == "safetensors":
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(tensors, folder / "adapter_model.bin")
    return folder
