"""Builds this rank's part of ChatGLM3 as megatron-core GPTModels.

`transformer_config` is the one function that maps our configs to megatron-core's.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from glm3cli.config.model import DType, ModelConfig
from glm3cli.config.parallel import ParallelConfig
from glm3cli.device import require_active
from glm3cli.device.dtypes import TORCH_DTYPES
from glm3cli.model.adapters import AdaptedColumn, AdaptedRow, AdapterShapes, attach
from glm3cli.model.attention import CoreAttention
from glm3cli.model.gpt import ChatGLM
from glm3cli.model.layers import RMSNorm, SwiGLU
from glm3cli.model.mc2 import GatheringLinear, ScatteringLinear
from glm3cli.model.sandwich import SandwichLayer


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    dtype: DType,
    *,
    sequence_parallel: bool,
    **training: Any,
) -> TransformerConfig:
    """Returns the TransformerConfig of megatron-core for a model.

    Args:
        model: The shape of the model.
        parallel: The parallel sizes.
        dtype: The type of the weights and of the activations.
        sequence_parallel: Whether norms work on a part of the sequence on each tensor parallel
            rank; has no effect with one.
        training: Further fields of the TransformerConfig, such as those for recomputation.
    """
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        layernorm_epsilon=model.layernorm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        use_te_activation_func=True,  # takes the activation from the layer spec, which has ours
        add_bias_linear=False,
        add_qkv_bias=model.add_qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=require_active().fuses_gradient_accumulation,
        params_dtype=TORCH_DTYPES[dtype],
        pipeline_dtype=TORCH_DTYPES[dtype],
        fp16=dtype == "fp16",
        bf16=dtype == "bf16",
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        pipeline_model_parallel_layout=_pipeline_layout(parallel),
        sequence_parallel=sequence_parallel and parallel.tp > 1,
        # The weights come from a checkpoint, or from our own initialisation, which is the same at
        # all parallel sizes.
        perform_initialization=False,
        use_cpu_initialization=True,
        calculate_per_token_loss=True,
        **training,
    )


def _pipeline_layout(parallel: ParallelConfig) -> list[list[str]] | None:
    """Returns the modules of each pipeline stage by megatron-core's names, for uneven stages.

    None lets megatron-core give every stage the same number of layers.
    """
    if parallel.stage_sizes is None:
        return None
    stages = [["decoder"] * size for size in parallel.stage_sizes]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


@dataclass(frozen=True)
class LinearLayers:
    """The classes that a layer's four matrix products are made of.

    What replaces or wraps linear layers gives classes of its own here; each is built with the
    arguments of the megatron-core class that it stands for.

    Attributes:
        column: The class of the layers whose outputs are cut over tensor parallel ranks (QKV and
            fc1); a `ColumnParallelLinear` or a subclass.
        row: The class of the layers whose inputs are cut (proj and fc2); a `RowParallelLinear` or
            a subclass.
    """

    column: type[tensor_parallel.ColumnParallelLinear]
    row: type[tensor_parallel.RowParallelLinear]


class _AdaptedGathering(AdaptedColumn, GatheringLinear):
    """The column parallel layer that gathers the sequence within its product, with an adapter."""


class _AdaptedScattering(AdaptedRow, ScatteringLinear):  # type: ignore[misc]
    """The row parallel layer that scatters sums within its product, with an adapter."""


PLAIN = LinearLayers(tensor_parallel.ColumnParallelLinear, tensor_parallel.RowParallelLinear)
MC2 = LinearLayers(GatheringLinear, ScatteringLinear)
ADAPTED = LinearLayers(AdaptedColumn, AdaptedRow)
ADAPTED_MC2 = LinearLayers(_AdaptedGathering, _AdaptedScattering)


def linear_layers(
    parallel: ParallelConfig, config: TransformerConfig, *, adapted: bool = False
) -> LinearLayers:
    """Returns the classes of a model's linear layers: MC2's if --mc2 is on, else plain ones.

    Args:
        parallel: The parallel sizes, and whether --mc2 is on.
        config: The settings of the model.
        adapted: Whether the layers can have adapters.
    """
    # Without sequence parallelism there is nothing to gather: decoding never does.
    if parallel.mc2 and config.sequence_parallel:
        return ADAPTED_MC2 if adapted else MC2
    return ADAPTED if adapted else PLAIN


def layer_spec(model: ModelConfig, linears: LinearLayers = PLAIN) -> ModuleSpec:
    """Returns the specification of a layer, from which megatron-core builds it.

    The layer is made of megatron-core's own modules, those without Transformer Engine, and of ours.

    Args:
        model: The shape of the model.
        linears: The classes of the linear layers.
    """
    return ModuleSpec(
        module=SandwichLayer if model.sandwich_norms else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linears.column,
                    core_attention=ModuleSpec(
                        module=CoreAttention,
                        params={
                            "rotary_base": model.rotary_base,
                            "rotary_factor": model.rope_factor,
                        },
                    ),
                    linear_proj=linears.row,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=linears.column,
                    linear_fc2=linears.row,
                    activation_func=SwiGLU,
                ),
            ),
            mlp_bda=get_bias_dropout_add,
            # Like megatron-core's own specification without Transformer Engine: the norms are saved
            # under Transformer Engine's names, so that models of both kinds read each other's
            # checkpoints.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def build_chunks(
    model: ModelConfig,
    parallel: ParallelConfig,
    config: TransformerConfig,
    adapters: AdapterShapes | None = None,
) -> list[torch.nn.Module]:
    """Builds this rank's model chunks, `vpp` of them, with uninitialised weights.

    The parallel groups must be open. A chunk in a 16-bit type is wrapped in megatron-core's
    Float16Module, so that its logits are in fp32.

    Args:
        model: The shape of the model.
        parallel: The parallel sizes.
        config: What `transformer_config` has made of both.
        adapters: The shapes of the model's adapters; None builds a model without any.
    """
    return [
        _build_chunk(model, parallel, config, adapters or {}, chunk)
        for chunk in range(parallel.vpp)
    ]


def _build_chunk(
    model: ModelConfig,
    parallel: ParallelConfig,
    config: TransformerConfig,
    adapters: AdapterShapes,
    chunk: int,
) -> torch.nn.Module:
    """Builds the model chunk of this rank that has the index `chunk`; see `build_chunks`."""
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    num_layers = len(parallel.layers_of(model.num_layers, pp_rank, chunk))
    spec = layer_spec(model, linear_layers(parallel, config, adapted=bool(adapters)))
    # Megatron-core would make the weights on the host, whose memory they don't need to fill first.
    with require_active().torch_device():
        gpt = ChatGLM(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(
                layer_specs=[spec] * num_layers, layer_norm=RMSNorm
            ),
            vocab_size=model.padded_vocab_size,
            max_sequence_length=model.seq_length,
            pre_process=pp_rank == 0 and chunk == 0,
            post_process=pp_rank == parallel.pp - 1 and chunk == parallel.vpp - 1,
            parallel_output=True,
            share_embeddings_and_output_weights=False,
            position_embedding_type="none",  # core attention rotates
            vp_stage=chunk if parallel.vpp > 1 else None,
        )
    gpt.model_type = ModelType.encoder_or_decoder
    attach(gpt.decoder.layers, adapters)
    _mark_pieces(gpt)
    gpt.to(require_active().torch_device())
    return Float16Module(config, gpt) if config.fp16 or config.bf16 else gpt


def _mark_pieces(gpt: ChatGLM) -> None:
    """Marks the weights that are cut over tensor parallel ranks.

    Megatron-core does so while it initialises weights, which we don't let it. Without the mark, the
    gradient norm would take the pieces for copies, and count those of one rank alone.
    """
    columns = (tensor_parallel.ColumnParallelLinear, tensor_parallel.VocabParallelEmbedding)
    for module in gpt.modules():
        if isinstance(module, (*columns, tensor_parallel.RowParallelLinear)):
            dim = 0 if isinstance(module, columns) else 1
            tensor_parallel.set_tensor_model_parallel_attributes(module.weight, True, dim, 1)
    for parameter in gpt.parameters():
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)


def unwrap(module: torch.nn.Module) -> ChatGLM:
    """Returns the ChatGLM inside of its wrappers, such as DDP and Float16Module."""
    inner: Any = module
    while not isinstance(inner, ChatGLM):
        inner = inner.module
    return inner
