"""`Decoder`: the forward pass of inference, over the weights that megatron-core's modules hold.

A decoded token passes through each layer alone, where megatron-core's own forward pass would spend
more time in Python than in the matrix products: it makes autograd's nodes, viewless tensors and
copies that only training needs. Here a layer is what it computes, some fifteen operations on
[tokens, h], with one rotation and one mask for all layers of a pass. Rows of all lengths stand one
after the other, without padding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.nn import Module

from glm3cli.config.model import ModelConfig
from glm3cli.device import require_active
from glm3cli.model.cache import KVCache, Run, Step
from glm3cli.model.gpt import ChatGLM
from glm3cli.model.quantized import quantize
from glm3cli.model.rotary import angles_at
from glm3cli.parallel.collectives import Collectives

Multiply = Callable[[Tensor], Tensor]


class Additions(Protocol):
    """What is added to the products of linear layers, text by text, such as adapters."""

    def choose(self, names: Sequence[str | None], device: torch.device) -> None:
        """Says what each token of the next pass gets.

        Args:
            names: The name for each token; None for nothing.
            device: The device that computes.
        """
        ...

    def extend(self, linear: Module, multiply: Multiply) -> Multiply:
        """Returns what a layer computes with what is added.

        Args:
            linear: The layer.
            multiply: What it computes without it, [n, inputs] -> [n, outputs].
        """
        ...


@dataclass(frozen=True)
class _Layer:
    """What a layer of this rank multiplies by."""

    input_norm: Tensor
    qkv: Multiply
    proj: Multiply
    mlp_norm: Tensor
    fc1: Multiply
    fc2: Multiply


@dataclass(frozen=True)
class _Queries:
    """The queries of a pass that has one in each of some rows.

    Attributes:
        rows: The row that gets the key and the value of each token.
        slots: The slot that gets them.
        num_rows: The number of rows that are read, from the first on.
        are_all: Whether each of these rows has a query, in their order.
        seen: What the kernels know of the slots that each row's query sees.
    """

    rows: Tensor
    slots: Tensor
    num_rows: int
    are_all: bool
    seen: Any

    @classmethod
    def of_runs(cls, runs: Sequence[Run], slots: Tensor, cache: KVCache) -> "_Queries":
        """Returns the queries of runs of one token, which have these slots."""
        device, ends = slots.device, {run.row: run.end for run in runs}
        num_rows = max(ends) + 1
        # A row between them that belongs to no run sees one slot, and nobody its context.
        seen = [ends.get(row, 1) for row in range(num_rows)]
        return cls(
            rows=torch.tensor([run.row for run in runs], device=device),
            slots=slots,
            num_rows=num_rows,
            are_all=list(ends) == list(range(num_rows)),
            seen=require_active().kernels.seen(seen, cache.slots.dtype, device),
        )

    @classmethod
    def of_step(cls, step: Step, cache: KVCache) -> "_Queries":
        """Returns the queries of a step, one in each row."""
        seen = require_active().kernels.seen_until(
            step.slots + 1, step.length, cache.capacity, cache.slots.dtype
        )
        return cls(step.rows, step.slots, len(step.rows), True, seen)


class Decoder:
    """The forward pass of this rank's layers, for tokens whose keys and values are cached.

    A linear layer that is megatron-core's own is multiplied by directly, in the layout that the
    device multiplies fastest by; its module loses the weight. Any other class, such as one that
    adds an adapter or holds a quantized weight, is called as the module that it is, unless each
    text chooses its adapter.
    """

    def __init__(
        self,
        gpt: ChatGLM,
        model: ModelConfig,
        tp_group: Any,
        bits: int | None = None,
        selected: Additions | None = None,
    ) -> None:
        """Takes the weights of a model chunk, which must be loaded.

        Args:
            gpt: The model chunk.
            model: The shape of the model.
            tp_group: The tensor parallel group.
            bits: The bits to which weights are rounded, 8 or 4; None leaves them as they are. The
                output layer, whose errors nothing evens out, always has 8.
            selected: What each text chooses to be added; None for nothing.
        """
        self._bits = bits
        self._selected = selected
        self._gpt = gpt
        self.collectives = Collectives(tp_group)
        self._group = tp_group
        self._kernels = require_active().kernels
        self._eps = model.layernorm_epsilon
        self._rope = (model.rotary_base, model.rope_factor)
        self._width, self._scale = model.kv_channels, model.kv_channels**-0.5
        # More ranks than groups: several share one, each with a part of its query heads.
        self._sharers = max(1, tp_group.size() // model.num_query_groups)
        self.groups = max(1, model.num_query_groups // tp_group.size())
        heads = model.num_attention_heads // tp_group.size()
        self._heads = heads // self.groups  # of a group
        self._layers = [self._layer(layer) for layer in gpt.decoder.layers]
        if gpt.post_process:
            self._final_norm = gpt.decoder.final_layernorm.weight
            self._bits = bits and 8
            self._output = self._column(gpt.output_layer)

    @property
    def num_layers(self) -> int:
        """The number of this rank's layers."""
        return len(self._layers)

    def _layer(self, layer: Any) -> _Layer:
        """Returns what a layer of megatron-core multiplies by."""
        return _Layer(
            input_norm=layer.input_layernorm.weight,
            qkv=self._column(layer.self_attention.linear_qkv),
            proj=self._normed(
                self._row(layer.self_attention.linear_proj), layer, "post_self_attn_layernorm"
            ),
            mlp_norm=layer.pre_mlp_layernorm.weight,
            fc1=self._column(layer.mlp.linear_fc1),
            fc2=self._normed(self._row(layer.mlp.linear_fc2), layer, "post_mlp_layernorm"),
        )

    def _normed(self, multiply: Multiply, layer: Any, name: str) -> Multiply:
        """Returns a product whose output is normalised if the layer has a norm of this name."""
        norm = getattr(layer, name, None)
        if norm is None:
            return multiply
        weight = norm.weight
        return lambda hidden: self._kernels.rms_norm(multiply(hidden), weight, self._eps)

    def _column(self, linear: Any) -> Multiply:
        """Returns what a layer computes whose output is cut: [n, in] -> [n, out / tp]."""
        if type(linear) is not ColumnParallelLinear and self._selected is None:
            return _called(linear)
        product = self._product(linear, self._bits)
        return self._selected.extend(linear, product) if self._selected else product

    def _row(self, linear: Any) -> Multiply:
        """Returns what a layer computes whose input is cut: [n, in / tp] -> [n, out]."""
        if type(linear) is not RowParallelLinear and self._selected is None:
            return _called(linear)
        product = self._product(linear, self._bits)

        def summed(hidden: Tensor) -> Tensor:
            partial = product(hidden)
            self.collectives.add_up(partial)
            return partial

        whole = product if self._group.size() == 1 else summed
        return self._selected.extend(linear, whole) if self._selected else whole

    def _product(self, linear: Any, bits: int | None) -> Multiply:
        """Takes a layer's weight, and returns the product with it, without communication."""
        kernels, bias = self._kernels, linear.bias
        weight = linear.weight.detach()
        if bits is not None:
            numbers = kernels.pack_quantized(quantize(weight, bits), weight.dtype)
            linear.weight.data = weight.new_empty(0)
            return lambda hidden: kernels.linear_quantized(hidden, numbers, bias)
        packed = kernels.pack(weight)
        if packed is not weight:
            linear.weight.data = weight.new_empty(0)
        return lambda hidden: kernels.linear(hidden, packed, bias)

    def embed(self, tokens: Tensor) -> Tensor:
        """Returns the hidden states of tokens before the first layer, [tokens, h]."""
        embedding = self._gpt.embedding.word_embeddings
        if self._group.size() == 1:
            return embedding(tokens)
        places = tokens - embedding.vocab_start_index
        is_elsewhere = (places < 0) | (places >= len(embedding.weight))
        hidden = embedding.weight.detach()[places.masked_fill(is_elsewhere, 0)]
        hidden.masked_fill_(is_elsewhere.unsqueeze(1), 0)
        self.collectives.add_up(hidden)
        return hidden

    def forward(self, hidden: Tensor, runs: Sequence[Run], cache: KVCache) -> Tensor:
        """Runs this rank's layers on new tokens, and caches their keys and values.

        Args:
            hidden: The hidden states, [tokens, h], run after run; overwritten.
            runs: The tokens, at most one run for each row.
            cache: The cache, whose rows have room for the tokens.

        Returns:
            The hidden states after the last layer, [tokens, h].
        """
        if self._selected is not None:
            names = [run.adapter for run in runs for _ in run.tokens]
            self._selected.choose(names, hidden.device)
        positions = [slot for run in runs for slot in range(run.start, run.end)]
        slots = torch.tensor(positions, device=hidden.device)
        if len(positions) > len(runs):
            return self._through_layers(hidden, slots, runs, cache)
        return self._through_layers(hidden, slots, _Queries.of_runs(runs, slots, cache), cache)

    def step(self, hidden: Tensor, step: Step, cache: KVCache) -> Tensor:
        """Does what `forward` does, with all that changes from step to step on the device.

        No text may have an adapter of its own.

        Args:
            hidden: The hidden states, [n, h]; overwritten.
            step: The tokens.
            cache: The cache, whose rows have room for the tokens.

        Returns:
            The hidden states after the last layer, [n, h].
        """
        return self._through_layers(hidden, step.slots, _Queries.of_step(step, cache), cache)

    def _through_layers(
        self, hidden: Tensor, slots: Tensor, queries: _Queries | Sequence[Run], cache: KVCache
    ) -> Tensor:
        """Runs the layers on tokens at these slots, which are their positions, too."""
        kernels = self._kernels
        turns = kernels.turns(angles_at(slots, self._width, *self._rope), cache.slots.dtype)
        for index, layer in enumerate(self._layers):
            normed = kernels.rms_norm(hidden, layer.input_norm, self._eps)
            context = self._attend(layer.qkv(normed), index, turns, queries, cache)
            hidden.add_(layer.proj(context))
            normed = kernels.rms_norm(hidden, layer.mlp_norm, self._eps)
            hidden.add_(layer.fc2(kernels.swiglu(layer.fc1(normed))))
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns this rank's part of the logits after the last layer, [n, vocabulary / tp]."""
        return self._output(self._kernels.rms_norm(hidden, self._final_norm, self._eps))

    def _attend(
        self,
        mixed: Tensor,
        layer: int,
        turns: Any,
        queries: _Queries | Sequence[Run],
        cache: KVCache,
    ) -> Tensor:
        """Rotates and caches what the QKV layer has given, and attends.

        Args:
            mixed: The query heads, the key and the value of each group, one group after the other.
            layer: The index of the layer among this rank's.
            turns: The rotation of the tokens.
            queries: The queries of a pass that has one in each of some rows, or else the runs.
            cache: The cache.

        Returns:
            The context, [tokens, heads / tp * d].
        """
        heads = self._own_heads(mixed).view(len(mixed), self.groups, self._heads + 2, self._width)
        self._kernels.turn(heads[:, :, :-1], turns)
        query, new = heads[:, :, :-2], heads[:, :, -2:]
        if isinstance(queries, _Queries):
            cache.write_one(layer, queries.rows, queries.slots, new)
            return self._attend_one(query, cache.slots[layer], queries).flatten(1)
        context = mixed.new_empty(len(mixed), self.groups * self._heads, self._width)
        first = 0
        for run in queries:
            own = slice(first, first + len(run.tokens))
            cache.write_chunk(layer, run.row, run.start, new[own])
            keys, values = cache.slots[layer, :, run.row]
            context[own] = self._kernels.attend_chunk(
                query[own].flatten(1, 2), keys, values, self._scale, run.start
            )
            first = own.stop
        return context.flatten(1)

    def _attend_one(self, query: Tensor, slots: Tensor, queries: _Queries) -> Tensor:
        """Attends with one query in each of some rows; [n, groups, heads / groups, d]."""
        keys, values = slots[:, : queries.num_rows]
        if queries.are_all:
            return self._kernels.attend_one(query, keys, values, self._scale, queries.seen)
        spread = query.new_zeros(queries.num_rows, *query.shape[1:])
        spread[queries.rows] = query
        context = self._kernels.attend_one(spread, keys, values, self._scale, queries.seen)
        return context[queries.rows]

    def _own_heads(self, mixed: Tensor) -> Tensor:
        """Returns this rank's query heads, and the key and value of its group, [n, ...].

        Ranks that share a group have parts of its rows from the QKV layer; they exchange them.
        """
        if self._sharers == 1:
            return mixed
        ranks, width = self._group.size(), self._width
        parts = self.collectives.gather(mixed)
        rows = parts.transpose(0, 1).reshape(len(mixed), ranks // self._sharers, -1, width)
        group, part = divmod(self._group.rank(), self._sharers)
        own = slice(part * self._heads, (part + 1) * self._heads)
        return torch.cat([rows[:, group, own], rows[:, group, -2:]], dim=1)


def _called(linear: Any) -> Multiply:
    """Returns the forward pass of a linear layer that isn't plain, on [n, in].

    Megatron-core's layers take [s, b, in], and return the bias apart, which none of ours has.
    """
    return lambda hidden: linear(hidden.unsqueeze(1))[0].squeeze(1)
