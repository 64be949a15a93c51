"""Trains a LoRA adapter with peft on transformers: what our own training is compared with."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from glm3cli.checkpoint.adapter.pairs import Adapter
from glm3cli.config.model import ModelConfig
from tests.support import reference as glm
from tests.support.tiny import Samples

# The modules of the fused model, with the logical names of their weights.
MODULES = {
    "self_attn.query_key_value": "qkv_weight",
    "self_attn.o_proj": "attention_out",
    "mlp.gate_up_proj": "mlp_up",
    "mlp.down_proj": "mlp_down",
}


class Part(torch.nn.Module):
    """Some rows of a layer's query_key_value, which peft may have wrapped."""

    def __init__(self, attention: torch.nn.Module, start: int, stop: int) -> None:
        super().__init__()
        self._attention = [attention]  # in a list, so that it's no submodule
        self._rows = slice(start, stop)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._attention[0].query_key_value(hidden)[..., self._rows]


def fused(model: ModelConfig, source: Any) -> Any:
    """GlmForCausalLM whose queries, keys and values come from one layer, as ChatGLM3's do."""
    built = glm.build(model, source)
    for layer in built.model.layers:
        attention = layer.self_attn
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        joined = torch.nn.Linear(model.hidden_size, model.query_size + 2 * model.kv_size)
        with torch.no_grad():
            joined.weight.copy_(torch.cat([part.weight for part in parts]))
            joined.bias.copy_(torch.cat([part.bias for part in parts]))
        attention.query_key_value = joined
        start = 0
        for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
            setattr(attention, name, Part(attention, start, start + part.out_features))
            start += part.out_features
    return built


def with_peft(model: ModelConfig, source: Any, first: Adapter | None, **settings: Any) -> Any:
    """The fused model with an adapter, whose matrices begin as those of `first`, if it's given."""
    targets = [module.split(".")[1] for module in MODULES]
    config = LoraConfig(**{"target_modules": targets, **settings})
    wrapped = get_peft_model(fused(model, source), config)
    if first is not None:
        with torch.no_grad():
            for (weight, layer), [pair] in first.pairs.items():
                [module] = [name for name, logical in MODULES.items() if logical == weight.logical]
                lora = wrapped.base_model.model.model.layers[layer].get_submodule(module)
                lora.lora_A.default.weight.copy_(pair.a)
                lora.lora_B.default.weight.copy_(pair.b)
    return wrapped


def losses_in_peft(
    model: Any, rates: Sequence[float], *, seq_length: int, batch: int, vocab: int, ratio: float = 1
) -> list[float]:
    """Trains one step for each learning rate, with AdamW as ours is set; returns the losses.

    Args:
        model: A model of peft.
        rates: The learning rate of each step.
        seq_length: Tokens of a sample.
        batch: Samples of a step.
        vocab: Number of tokens in the vocabulary.
        ratio: Of the learning rate of lora_B to that of the rest (LoRA+).
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {
            "params": [parameter],
            "weight_decay": 0.1 if parameter.dim() > 1 else 0.0,
            "factor": ratio if "lora_B" in name else 1,
        }
        for name, parameter in trained.items()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    samples, losses = Samples(seq_length, vocab), []
    model.train()
    for step, rate in enumerate(rates):
        rows = [samples[step * batch + i] for i in range(batch)]
        tokens, labels, mask = (
            torch.stack([torch.as_tensor(row[key]) for row in rows])
            for key in ("tokens", "labels", "loss_mask")
        )
        logits = model(input_ids=tokens).logits
        each = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="none"
        )
        loss = (each * mask.flatten()).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
