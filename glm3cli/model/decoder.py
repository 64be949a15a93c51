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
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.nn import Module

from glm3cli.config.model import ModelConfig
from glm3cli.device import require_active
from glm3cli.model.cache import KVCache
from glm3cli.model.gpt import ChatGLM
from glm3cli.model.quantized import quantize
from glm3cli.model.rotary import angles_at

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
class Run:
    """Tokens that stand one after the other in a row of the KV cache.

    Attributes:
        row: The row.
        start: The slot of the first token, which is its position, too.
        tokens: The token ids; at least one.
        adapter: The name of the adapter that they are computed with; None for the bare model.
    """

    row: int
    start: int
    tokens: Sequence[int]
    adapter: str | None = None

    @property
    def end(self) -> int:
        """The slot after the last token."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class _Layer:
    """What a layer of this rank multiplies by."""

    input_norm: Tensor
    qkv: Multiply
    proj: Multiply
    mlp_norm: Tensor
    fc1: Multiply
    fc2: Multiply


class _Pass:
    """What all layers of one forward pass share, made once on the device.

    Attributes:
        is_decoding: Whether every run has one token.
    """

    def __init__(
        self, runs: Sequence[Run], cache: KVCache, width: int, rope: tuple[float, float]
    ) -> None:
        """Prepares a pass of the heads' width, with the base and the divisor of the rotation."""
        device, dtype = cache.slots.device, cache.slots.dtype
        kernels = require_active().kernels
        self.runs = runs
        self.is_decoding = all(len(run.tokens) == 1 for run in runs)
        positions = [slot for run in runs for slot in range(run.start, run.end)]
        self.slots = torch.tensor(positions, device=device)
        self.turns = kernels.turns(angles_at(self.slots, width, *rope), dtype)
        if self.is_decoding:
            ends = {run.row: run.end for run in runs}
            self.num_rows = max(ends) + 1
            self.rows = torch.tensor([run.row for run in runs], device=device)
            self.are_all = list(ends) == list(range(self.num_rows))
            # A row between them that belongs to no run sees one slot, and nobody its context.
            seen = [ends.get(row, 1) for row in range(self.num_rows)]
            self.seen = kernels.seen(seen, dtype, device)


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
            dist.all_reduce(partial, group=self._group)
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

    def embed(self, runs: Sequence[Run]) -> Tensor:
        """Returns the hidden states of tokens before the first layer, [tokens, h]."""
        ids = [token for run in runs for token in run.tokens]
        weight = self._gpt.embedding.word_embeddings.weight
        return self._gpt.embedding.word_embeddings(torch.tensor(ids, device=weight.device))

    def forward(self, hidden: Tensor, runs: Sequence[Run], cache: KVCache) -> Tensor:
        """Runs this rank's layers on new tokens, and caches their keys and values.

        Args:
            hidden: The hidden states, [tokens, h], run after run; overwritten.
            runs: The tokens, at most one run for each row.
            cache: The cache, whose rows have room for the tokens.

        Returns:
            The hidden states after the last layer, [tokens, h].
        """
        kernels = self._kernels
        if self._selected is not None:
            names = [run.adapter for run in runs for _ in run.tokens]
            self._selected.choose(names, hidden.device)
        shared = _Pass(runs, cache, self._width, self._rope)
        for index, layer in enumerate(self._layers):
            normed = kernels.rms_norm(hidden, layer.input_norm, self._eps)
            context = self._attend(layer.qkv(normed), index, shared, cache)
            hidden.add_(layer.proj(context))
            normed = kernels.rms_norm(hidden, layer.mlp_norm, self._eps)
            hidden.add_(layer.fc2(kernels.swiglu(layer.fc1(normed))))
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns this rank's part of the logits after the last layer, [n, vocabulary / tp]."""
        return self._output(self._kernels.rms_norm(hidden, self._final_norm, self._eps))

    def _attend(self, mixed: Tensor, layer: int, shared: _Pass, cache: KVCache) -> Tensor:
        """Rotates and caches what the QKV layer has given, and attends.

        Args:
            mixed: The query heads, the key and the value of each group, one group after the other.
            layer: The index of the layer among this rank's.
            shared: What all layers of the pass share.
            cache: The cache.

        Returns:
            The context, [tokens, heads / tp * d].
        """
        heads = self._own_heads(mixed).view(len(mixed), self.groups, self._heads + 2, self._width)
        self._kernels.turn(heads[:, :, :-1], shared.turns)
        query, new = heads[:, :, :-2], heads[:, :, -2:]
        if shared.is_decoding:
            cache.write_one(layer, shared.rows, shared.slots, new)
            return self._attend_one(query, cache.slots[layer], shared).flatten(1)
        context = mixed.new_empty(len(mixed), self.groups * self._heads, self._width)
        first = 0
        for run in shared.runs:
            own = slice(first, first + len(run.tokens))
            cache.write_chunk(layer, run.row, run.start, new[own])
            keys, values = cache.slots[layer, :, run.row]
            context[own] = self._kernels.attend_chunk(
                query[own].flatten(1, 2), keys, values, self._scale, run.start
            )
            first = own.stop
        return context.flatten(1)

    def _attend_one(self, query: Tensor, slots: Tensor, shared: _Pass) -> Tensor:
        """Attends with one query in each of some rows; [n, groups, heads / groups, d]."""
        keys, values = slots[:, : shared.num_rows]
        if shared.are_all:
            return self._kernels.attend_one(query, keys, values, self._scale, shared.seen)
        spread = query.new_zeros(shared.num_rows, *query.shape[1:])
        spread[shared.rows] = query
        context = self._kernels.attend_one(spread, keys, values, self._scale, shared.seen)
        return context[shared.rows]

    def _own_heads(self, mixed: Tensor) -> Tensor:
        """Returns this rank's query heads, and the key and value of its group, [n, ...].

        Ranks that share a group have parts of its rows from the QKV layer; they exchange them.
        """
        if self._sharers == 1:
            return mixed
        ranks, width = self._group.size(), self._width
        parts = mixed.new_empty(ranks, *mixed.shape)
        dist.all_gather_into_tensor(parts, mixed.contiguous(), group=self._group)
        rows = parts.transpose(0, 1).reshape(len(mixed), ranks // self._sharers, -1, width)
        group, part = divmod(self._group.rank(), self._sharers)
        own = slice(part * self._heads, (part + 1) * self._heads)
        return torch.cat([rows[:, group, own], rows[:, group, -2:]], dim=1)


def _called(linear: Any) -> Multiply:
    """Returns the forward pass of a linear layer that isn't plain, on [n, in].

    Megatron-core's layers take [s, b, in], and return the bias apart, which none of ours has.
    """
    return lambda hidden: linear(hidden.unsqueeze(1))[0].squeeze(1)
