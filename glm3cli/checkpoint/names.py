"""The table of weights: their names in every layout, their shapes, and how they are cut.

A layout is how files name and cut the weights of a model. There are five:

- chatglm: Hugging Face files with the names of the original remote code;
- glm: Hugging Face files with the names of transformers' own GlmForCausalLM;
- legacy: per-rank files of Megatron's legacy models, as ModelLink writes them;
- mcore: per-rank files of megatron-core models;
- dist: megatron-core's distributed checkpoints, which any parallel sizes can load.

Readers, writers, training and tests all use the rows of the table. A model has ten of them, one
less without a bias of Q, K and V, and two more with the norms of GLM-4-0414. A new layout is one
more column here, one reader and one writer. A `/` in a legacy name separates levels of nested
dictionaries (the names themselves contain dots). A `+` in a glm name separates the names of the
tensors whose rows, one below another, make up the weight.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from glm3cli.config.model import ModelConfig

Layout = Literal["chatglm", "glm", "legacy", "mcore", "dist"]
HfLayout = Literal["chatglm", "glm"]


class Cut(Enum):
    """How a weight is cut into the pieces of the tensor-parallel ranks."""

    WHOLE = "a copy on every rank"
    VOCAB = "rows"
    QKV = "rows, after regrouping [Q|K|V] to [q..q,k,v] per query group"
    GATED = "rows of the gate and of the up half, side by side"
    COLS = "columns"


class Stage(Enum):
    """Which pipeline stage holds a weight."""

    FIRST = "the first"
    LAYER = "the one that has the layer"
    LAST = "the last"


@dataclass(frozen=True)
class Weight:
    """One row of the table: a weight that the model has once, or once in every layer.

    `{}` in a name stands for the layer's index.

    Attributes:
        logical: Our own name, the same in every layout.
        chatglm: The name in the chatglm layout.
        glm: The name in the glm layout. GlmForCausalLM's rotation is interleaved as ChatGLM's, so
            the rows keep their order (modeling_glm.py 5.23, rotate_half).
        legacy: The path below the model of a per-rank file in the legacy layout.
        mcore: The name in the mcore layout (megatron-core's local layer spec).
        dist: The key in the dist layout, where one tensor holds all layers. megatron-core 0.16
            (gpt_layer_specs.py, sharded_state_dict_keys_map) gives the two norms of a layer their
            Transformer Engine names there.
        cut: How the weight is cut over the tensor-parallel ranks.
        stage: The pipeline stage that holds the weight.
        sizes: The names of its dimensions, which `shape` turns into numbers.
        transformer_engine: The name in the mcore layout of models with a Transformer Engine layer
            spec, if that has another name for the weight; else None.
        others: Further names in the mcore layout, which other trainers give the weight.
        extra_state: Whether Megatron saves an (empty) `_extra_state` entry after the weight.
        glm_rows: The names of the numbers of rows of its tensors in the glm layout, if there are
            several.
        trait: The field of `ModelConfig` that says whether a model has the weight; None if all
            have it.
    """

    logical: str
    chatglm: str
    glm: str
    legacy: str
    mcore: str
    dist: str
    cut: Cut
    stage: Stage
    sizes: tuple[str, ...]
    transformer_engine: str | None = None
    others: tuple[str, ...] = ()
    extra_state: bool = False
    glm_rows: tuple[str, ...] = ()
    trait: str | None = None

    def is_in(self, model: ModelConfig) -> bool:
        """Returns whether a model has the weight."""
        return self.trait is None or bool(getattr(model, self.trait))

    def name(self, layout: Layout, layer: int | None = None) -> str:
        """Returns the weight's name in a layout.

        Args:
            layout: The layout.
            layer: The layer as the layout counts layers (legacy and mcore count from 0 in every
                chunk of a pipeline); None leaves `{}` in the name.
        """
        name: str = getattr(self, layout)
        return name if layer is None else name.replace("{}", str(layer))

    def names(self, layout: Layout, layer: int | None = None) -> tuple[str, ...]:
        """Returns all names that files in a layout may give the weight, the usual one first.

        Args:
            layout: The layout.
            layer: The layer as the layout counts layers; None for weights outside the layers.
        """
        others: tuple[str, ...] = ()
        if layout == "mcore":
            further = (self.transformer_engine, *self.others)
            others = tuple(name.format(layer) for name in further if name)
        if layout == "dist":
            # One entry per layer is what megatron-core writes for "non-homogeneous" models.
            inner = [n for n in (self.mcore, self.transformer_engine) if n and "{}" in n]
            others = (*(n.replace(".{}", "") for n in inner), *(n.format(layer) for n in inner))
        return tuple(dict.fromkeys((self.name(layout, layer), *others)))

    def parts(
        self, layout: HfLayout, model: ModelConfig, layer: int | None = None
    ) -> dict[str, tuple[int, ...]]:
        """Returns the name and shape of each tensor of the weight in a Hugging Face folder.

        Args:
            layout: The layout of the files.
            model: The model's shape.
            layer: The layer, counted from 0; None for weights outside the layers.
        """
        shape = self.shape(model)
        rows = self._sizes(model, self.glm_rows) if layout == "glm" else ()
        names = self.name(layout, layer).split("+")
        return {n: (r, *shape[1:]) for n, r in zip(names, rows or shape[:1], strict=True)}

    def has_extra_state(self, model: ModelConfig) -> bool:
        """Returns whether Megatron saves an `_extra_state` entry after the weight.

        There is one for each linear layer, after its last weight.
        """
        return self.extra_state or (self.logical == "qkv_weight" and not model.add_qkv_bias)

    def extra_state_name(self, layout: Layout, layer: int | None = None) -> str:
        """Returns the name of the `_extra_state` entry that goes with the weight's module."""
        return re.sub(r"[^./]+$", "_extra_state", self.name(layout, layer))

    def shape(self, model: ModelConfig) -> tuple[int, ...]:
        """Returns the shape of the whole (uncut) weight of one layer."""
        return self._sizes(model, self.sizes)

    @staticmethod
    def _sizes(model: ModelConfig, names: tuple[str, ...]) -> tuple[int, ...]:
        """Returns the numbers that names of dimensions stand for."""
        sizes = {
            "hidden": model.hidden_size,
            "query": model.query_size,
            "kv": model.kv_size,
            "qkv": model.query_size + 2 * model.kv_size,
            "ffn": model.ffn_hidden_size,
            "gated": 2 * model.ffn_hidden_size,
            "vocab": model.padded_vocab_size,
        }
        return tuple(sizes[name] for name in names)


WEIGHTS: tuple[Weight, ...] = (
    Weight(
        logical="embedding",
        chatglm="transformer.embedding.word_embeddings.weight",
        glm="model.embed_tokens.weight",
        legacy="language_model/embedding/word_embeddings/weight",
        mcore="embedding.word_embeddings.weight",
        dist="embedding.word_embeddings.weight",
        cut=Cut.VOCAB,
        stage=Stage.FIRST,
        sizes=("vocab", "hidden"),
    ),
    Weight(
        logical="input_norm",
        chatglm="transformer.encoder.layers.{}.input_layernorm.weight",
        glm="model.layers.{}.input_layernorm.weight",
        legacy="language_model/encoder/layers.{}.input_norm.weight",
        mcore="decoder.layers.{}.input_layernorm.weight",
        dist="decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        cut=Cut.WHOLE,
        stage=Stage.LAYER,
        sizes=("hidden",),
        transformer_engine="decoder.layers.{}.self_attention.linear_qkv.layer_norm_weight",
    ),
    Weight(
        logical="qkv_weight",
        chatglm="transformer.encoder.layers.{}.self_attention.query_key_value.weight",
        glm="+".join(f"model.layers.{{}}.self_attn.{p}_proj.weight" for p in "qkv"),
        legacy="language_model/encoder/layers.{}.self_attention.query_key_value.weight",
        mcore="decoder.layers.{}.self_attention.linear_qkv.weight",
        dist="decoder.layers.self_attention.linear_qkv.weight",
        cut=Cut.QKV,
        stage=Stage.LAYER,
        sizes=("qkv", "hidden"),
        glm_rows=("query", "kv", "kv"),
    ),
    Weight(
        logical="qkv_bias",
        chatglm="transformer.encoder.layers.{}.self_attention.query_key_value.bias",
        glm="+".join(f"model.layers.{{}}.self_attn.{p}_proj.bias" for p in "qkv"),
        legacy="language_model/encoder/layers.{}.self_attention.query_key_value.bias",
        mcore="decoder.layers.{}.self_attention.linear_qkv.bias",
        dist="decoder.layers.self_attention.linear_qkv.bias",
        cut=Cut.QKV,
        stage=Stage.LAYER,
        sizes=("qkv",),
        glm_rows=("query", "kv", "kv"),
        extra_state=True,
        trait="add_qkv_bias",
    ),
    Weight(
        logical="attention_out",
        chatglm="transformer.encoder.layers.{}.self_attention.dense.weight",
        glm="model.layers.{}.self_attn.o_proj.weight",
        legacy="language_model/encoder/layers.{}.self_attention.dense.weight",
        mcore="decoder.layers.{}.self_attention.linear_proj.weight",
        dist="decoder.layers.self_attention.linear_proj.weight",
        cut=Cut.COLS,
        stage=Stage.LAYER,
        sizes=("hidden", "query"),
        extra_state=True,
    ),
    Weight(
        logical="mlp_norm",
        chatglm="transformer.encoder.layers.{}.post_attention_layernorm.weight",
        glm="model.layers.{}.post_attention_layernorm.weight",
        legacy="language_model/encoder/layers.{}.post_attention_norm.weight",
        mcore="decoder.layers.{}.pre_mlp_layernorm.weight",
        dist="decoder.layers.mlp.linear_fc1.layer_norm_weight",
        cut=Cut.WHOLE,
        stage=Stage.LAYER,
        sizes=("hidden",),
        transformer_engine="decoder.layers.{}.mlp.linear_fc1.layer_norm_weight",
    ),
    Weight(
        logical="mlp_up",
        chatglm="transformer.encoder.layers.{}.mlp.dense_h_to_4h.weight",
        glm="model.layers.{}.mlp.gate_up_proj.weight",
        legacy="language_model/encoder/layers.{}.mlp.dense_h_to_4h.weight",
        mcore="decoder.layers.{}.mlp.linear_fc1.weight",
        dist="decoder.layers.mlp.linear_fc1.weight",
        cut=Cut.GATED,
        stage=Stage.LAYER,
        sizes=("gated", "hidden"),
        extra_state=True,
    ),
    Weight(
        logical="mlp_down",
        chatglm="transformer.encoder.layers.{}.mlp.dense_4h_to_h.weight",
        glm="model.layers.{}.mlp.down_proj.weight",
        legacy="language_model/encoder/layers.{}.mlp.dense_4h_to_h.weight",
        mcore="decoder.layers.{}.mlp.linear_fc2.weight",
        dist="decoder.layers.mlp.linear_fc2.weight",
        cut=Cut.COLS,
        stage=Stage.LAYER,
        sizes=("hidden", "ffn"),
        extra_state=True,
    ),
    Weight(
        logical="final_norm",
        chatglm="transformer.encoder.final_layernorm.weight",
        glm="model.norm.weight",
        legacy="language_model/encoder/final_norm.weight",
        mcore="decoder.final_layernorm.weight",
        dist="decoder.final_layernorm.weight",
        cut=Cut.WHOLE,
        stage=Stage.LAST,
        sizes=("hidden",),
    ),
    Weight(
        logical="output",
        chatglm="transformer.output_layer.weight",
        glm="lm_head.weight",
        legacy="language_model/output_layer/weight",
        mcore="output_layer.weight",
        dist="output_layer.weight",
        cut=Cut.VOCAB,
        stage=Stage.LAST,
        sizes=("vocab", "hidden"),
        extra_state=True,
    ),
    # The norms that GLM-4-0414 has more. They stand last, since random weights depend on the place.
    # Neither the original remote code nor ModelLink has them; what is there is slime's spelling
    # (github.com/THUDM/slime, its GLM-4 layer of megatron-core). MindSpeed-LLM calls the first one
    # otherwise (tasks/models/spec/gemma2_spec.py of its 2.3.0).
    Weight(
        logical="attention_out_norm",
        chatglm="transformer.encoder.layers.{}.post_self_attn_layernorm.weight",
        glm="model.layers.{}.post_self_attn_layernorm.weight",
        legacy="language_model/encoder/layers.{}.post_self_attn_norm.weight",
        mcore="decoder.layers.{}.post_self_attn_layernorm.weight",
        others=("decoder.layers.{}.post_attn_norm.weight",),
        dist="decoder.layers.post_self_attn_layernorm.weight",
        cut=Cut.WHOLE,
        stage=Stage.LAYER,
        sizes=("hidden",),
        trait="sandwich_norms",
    ),
    Weight(
        logical="mlp_out_norm",
        chatglm="transformer.encoder.layers.{}.post_mlp_layernorm.weight",
        glm="model.layers.{}.post_mlp_layernorm.weight",
        legacy="language_model/encoder/layers.{}.post_mlp_norm.weight",
        mcore="decoder.layers.{}.post_mlp_layernorm.weight",
        dist="decoder.layers.post_mlp_layernorm.weight",
        cut=Cut.WHOLE,
        stage=Stage.LAYER,
        sizes=("hidden",),
        trait="sandwich_norms",
    ),
)

# How the names of entries end that hold no weight: rotary frequencies are computed, and the extra
# state is empty.
IGNORED: tuple[str, ...] = ("rotary_pos_emb.inv_freq", "rotary_emb.inv_freq", "_extra_state")

# A weight and its layer, counted from 0; the layer is None for weights outside the layers.
Slot = tuple[Weight, int | None]


def is_ignored(name: str) -> bool:
    """Says whether an entry of this name in a checkpoint holds no weight."""
    return name.endswith(IGNORED)


def weights_of(model: ModelConfig) -> tuple[Weight, ...]:
    """Returns the rows of the table that a model has."""
    return tuple(weight for weight in WEIGHTS if weight.is_in(model))


def slots(model: ModelConfig, num_layers: int | None = None) -> Iterator[Slot]:
    """Yields every weight of a model with its layer: the first stage's, layer by layer, the last's.

    Args:
        model: The model's shape.
        num_layers: The number of layers, if it is that of a part of the model.
    """
    layers = range(model.num_layers if num_layers is None else num_layers)
    for stage in Stage:
        for layer in layers if stage is Stage.LAYER else (None,):
            for weight in weights_of(model):
                if weight.stage is stage:
                    yield weight, layer


def weight_of(mcore: str) -> Slot:
    """Returns a weight by its name in a megatron-core model, and its layer as the model counts."""
    found = re.search(r"\blayers\.(\d+)\.", mcore)
    layer = None if found is None else int(found[1])
    return _MCORE[re.sub(r"\blayers\.\d+\.", "layers.{}.", mcore)], layer


_MCORE = {weight.mcore: weight for weight in WEIGHTS}
