"""The tensors of a layer that autograd saves for the backward pass, from shapes alone.

Korthikanti et al. 2022 ("Reducing activation recomputation in large transformer models") do the
same sum for GPT-3. Adapt these tables when the model's operations change:
tests/distributed/test_memory.py compares them with what a CPU really holds, and
tests/unit/test_memory_of_kernels.py with what the operators of a chip return.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from glm3cli.config.model import DTYPE_BYTES, ModelConfig
from glm3cli.config.training import TrainConfig

if TYPE_CHECKING:
    from glm3cli.device.kernels import SavedForBackward


@dataclass(frozen=True)
class Sizes:
    """Sizes of the tensors that the tables of this module are made of, on one rank.

    Attributes:
        tokens: Number of tokens of a micro-batch; context parallelism shares them out.
        element: Bytes of one number of an activation.
        shards: Number of ranks that share the residual stream by sequence parallelism.
        hidden: Bytes of one tensor of the residual stream, [s, b, h]; sequence parallelism cuts
            it.
        whole: Bytes of the same tensor before sequence parallelism cuts it.
        gathered: Bytes of the buffer in which sequence parallel layers gather their inputs.
        norm: Bytes that an RMSNorm saves beside its output: its input, or fp32 copies of it, and
            1 / rms in fp32.
    """

    tokens: float
    element: int
    shards: int
    hidden: float
    whole: float
    gathered: float
    norm: float

    @classmethod
    def of(cls, config: TrainConfig, model: ModelConfig, kernels: "SavedForBackward") -> "Sizes":
        """Computes the sizes.

        Args:
            config: The parallel sizes, the batch, and the number type.
            model: The model's shape.
            kernels: What the device's kernels save for the backward pass.
        """
        tokens = config.micro_batch_size * config.row_length / config.cp
        shards = config.tp if config.sequence_parallel else 1
        element = DTYPE_BYTES[config.dtype]
        whole = tokens * model.hidden_size * element
        copies = kernels.norm_copies * tokens * model.hidden_size * 4 / shards
        return cls(
            tokens=tokens,
            element=element,
            shards=shards,
            hidden=whole / shards,
            whole=whole,
            gathered=whole if shards > 1 else 0,
            norm=(copies or whole / shards) + tokens / shards * 4,
        )


def saved_by_layer(
    config: TrainConfig, model: ModelConfig, kernels: "SavedForBackward"
) -> dict[str, float]:
    """Returns the bytes that one layer saves for the backward pass of a micro-batch, by tensor.

    Args:
        config: The parallel sizes, the batch, the number type, and `recompute` where it is
            `selective`; layers that are recomputed as a whole save their input only and don't
            need this table.
        model: The model's shape.
        kernels: What the device's kernels save.
    """
    sizes = Sizes.of(config, model, kernels)
    ffn = sizes.tokens * model.ffn_hidden_size / config.tp * sizes.element
    saved = {
        "norms": (4 if model.sandwich_norms else 2) * sizes.norm,
        "norm outputs": 2 * sizes.hidden,
        **_saved_by_attention(config, model, kernels),
        "fc1 output": 2 * ffn,
        "fc2 input": ffn,
    }
    return saved | _changed_by_adapters(config, model, sizes) if config.is_adapted else saved


def _changed_by_adapters(config: TrainConfig, model: ModelConfig, sizes: Sizes) -> dict[str, float]:
    """Returns what adapters change in `saved_by_layer`, or add to it.

    Frozen weights need no inputs; adapters do, and A x. Dropout keeps a mask, of one byte for each
    input, and a DoRA the outputs that it rescales.
    """
    each, tp = sizes.tokens * sizes.element, config.tp
    query, ffn = each * model.query_size / tp, each * model.ffn_hidden_size / tp
    qkv = query + 2 * each * model.kv_size / tp
    inputs = {"qkv": sizes.hidden, "proj": query, "fc1": sizes.hidden, "fc2": ffn}
    outputs = {"qkv": qkv, "proj": sizes.hidden, "fc1": 2 * ffn, "fc2": sizes.hidden}
    targets = config.lora_targets
    changed = {
        "norm outputs": sum(inputs[target] for target in targets if target in ("qkv", "fc1")),
        "fc2 input": ffn * ("fc2" in targets),
        "reduced inputs": each * (config.lora_rank or 0) * len(targets),
    }
    if config.lora_dropout:
        masks = sum(inputs[target] for target in targets) / sizes.element
        changed |= {"masks": masks, "dropped contexts": query * ("proj" in targets)}
    if config.lora_variant == "dora":
        changed["adapted outputs"] = sum(outputs[target] for target in targets)
    return changed


def bytes_of_scores(config: TrainConfig, model: ModelConfig) -> float:
    """Returns the bytes of the scores of one layer in fp32, [b, heads, s, s], on one rank."""
    tokens = config.micro_batch_size * config.row_length
    return tokens * config.row_length * model.num_attention_heads / config.tp / config.cp * 4


def _saved_by_attention(
    config: TrainConfig, model: ModelConfig, kernels: "SavedForBackward"
) -> dict[str, float]:
    """Returns the part of `saved_by_layer` that belongs to attention."""
    sizes, tp, cp = Sizes.of(config, model, kernels), config.tp, config.cp
    each = sizes.tokens * sizes.element
    query, kv = model.query_size / tp, max(model.kv_size / tp, model.kv_channels)
    # With more ranks than groups, each gathers all of QKV, and takes its part as a view.
    few_groups = tp > model.num_query_groups
    qkv = model.query_size + 2 * model.kv_size if few_groups else query + 2 * kv
    if config.recompute == "selective":
        # Fused attention saves nothing large in between: its input and output remain.
        return {"qkv output": each * qkv, "queries": each * query, "context": each * query}
    # A context parallel rank has one group at least, of all positions.
    shared = each * max(kv, cp * model.kv_channels) if cp > 1 else each * kv
    saved = {
        "rotated queries": each * query,
        "rotated keys": shared,
        "softmax statistics": sizes.tokens * model.num_attention_heads / tp * kernels.statistics,
        "context": each * query,
    }
    if kernels.scores:  # in fp32, with the groups repeated for the heads
        saved["scores"] = bytes_of_scores(config, model)
        saved["scaled queries, keys and values"] = 3 * sizes.tokens * query * 4
    if cp > 1:
        return {**saved, "exchanged values": shared, "exchanged context": each * query}
    if kernels.copies_values:
        return {**saved, "values": shared}  # in the order of dimensions that the operator takes
    return {**saved, "qkv output": each * qkv}  # values are a view of it
