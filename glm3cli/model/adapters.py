"""Low-rank adapters (LoRA) on the linear layers of a model, cut over tensor parallel ranks.

A linear layer with the weight W [outputs, inputs] gets two small matrices, A [rank, inputs] and
B [outputs, rank], and computes W x + scale B A x (Hu et al. 2021, "LoRA: low-rank adaptation of
large language models"). Where W is cut by rows, so is B, and every rank has all of A; where W is
cut by columns, so is A, and every rank has all of B. Only A x is sent between the ranks, which has
`rank` numbers per position.

A DoRA also has the length m of each row of W + scale B A, and divides by the present length (Liu et
al. 2024, "DoRA: weight-decomposed low-rank adaptation"). A PiSSA begins with the principal part of
W in A and B (Meng et al. 2024, "PiSSA: principal singular values and singular vectors adaptation").
The others take that part out of W; here W stays, and the product that A and B began with is
subtracted, so that a model without its adapter is the base model, to the bit.

`AdaptedColumn` and `AdaptedRow` are megatron-core's layers with a place for an adapter; `attach`
puts the adapters there; `adapters_off` makes a model compute without them for a while.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import Module, Parameter

# The modules of a layer that can have an adapter, by the name of the target.
MODULES = {
    "qkv": "self_attention.linear_qkv",
    "proj": "self_attention.linear_proj",
    "fc1": "mlp.linear_fc1",
    "fc2": "mlp.linear_fc2",
}
_NAME = "adapter"


@dataclass(frozen=True)
class AdapterShape:
    """What the adapter of one linear layer looks like.

    Attributes:
        rank: The number of rows of A and of columns of B.
        scale: The factor by which B A is multiplied.
        has_magnitude: Whether the adapter is a DoRA.
        has_start: Whether the product that the matrices begin with is subtracted (PiSSA).
    """

    rank: int
    scale: float
    has_magnitude: bool = False
    has_start: bool = False


# The shape of the adapter of each adapted module, by its target and its layer, counted from 0.
AdapterShapes = Mapping[tuple[str, int], AdapterShape]


class Adapter(Module):
    """The matrices of one adapter, or this rank's pieces of them.

    Attributes:
        scale: The factor by which B A is multiplied.
        enabled: Whether the layer computes with the adapter.
        dropout: Drops some elements of the layer's input, [s, b, inputs], in training; None drops
            none.
        a: The matrix A, [rank, inputs].
        b: The matrix B, [outputs, rank].
        magnitude: The length m of each row of the adapted weight, [outputs]; None but for a DoRA.
        start_a: What A began with, if its product is subtracted, else None.
        start_b: What B began with, likewise.
    """

    start_a: Tensor | None
    start_b: Tensor | None

    def __init__(self, shape: AdapterShape, weight: Tensor) -> None:
        """Makes matrices with arbitrary values.

        Args:
            shape: The rank and the scale.
            weight: The weight of the layer, or this rank's piece of it, [outputs, inputs].
        """
        super().__init__()
        outputs, inputs = weight.shape
        self.scale = shape.scale
        self.enabled = True
        self.dropout: Callable[[Tensor], Tensor] | None = None
        self.a = Parameter(weight.new_empty(shape.rank, inputs))
        self.b = Parameter(weight.new_empty(outputs, shape.rank))
        self.magnitude: Parameter | None = None
        if shape.has_magnitude:
            self.magnitude = Parameter(weight.new_empty(outputs))
        self.register_buffer("start_a", torch.empty_like(self.a) if shape.has_start else None)
        self.register_buffer("start_b", torch.empty_like(self.b) if shape.has_start else None)
        self._squares: tuple[int, Tensor] | None = None

    def forward(self, output: Tensor, hidden: Tensor, send: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns output + scale B A hidden.

        The matrices are used in a forward pass of this module, because DDP waits for a module's
        parameters before its forward pass.

        Args:
            output: The output of the layer, [s, b, outputs].
            hidden: The input of the layer, [s, b, inputs].
            send: Makes of this rank's A hidden what B is multiplied with.
        """
        drops = self.training and self.dropout is not None
        dropped = self.dropout(hidden) if drops and self.dropout else hidden
        reduced = torch.nn.functional.linear(dropped, self.a)
        b: Tensor = self.b
        if self.start_a is not None and self.start_b is not None:
            first = torch.nn.functional.linear(hidden, self.start_a)
            reduced, b = torch.cat([reduced, first], dim=-1), torch.cat([b, -self.start_b], dim=1)
        reduced = send(reduced)
        flat = torch.addmm(output.flatten(0, 1), reduced.flatten(0, 1), b.t(), alpha=self.scale)
        return flat.view(output.shape)

    def rescaled(
        self, output: Tensor, weight: Tensor, bias: Tensor | None, add_up: Callable[[Tensor], None]
    ) -> Tensor:
        """Gives the rows of the adapted weight the lengths of `magnitude`, where there is one.

        Their present lengths are taken for constants in the backward pass, as the paper and peft
        (tuners/lora/dora.py) do.

        Args:
            output: What `forward` has returned, [s, b, outputs].
            weight: The weight of the layer, or this rank's piece of it.
            bias: The bias that the output contains; None for none.
            add_up: Adds up a tensor in place over the ranks that have other columns of the rows.
        """
        if self.magnitude is None:
            return output
        with torch.no_grad():
            squares = self._squared_lengths(weight)
            add_up(squares)
        ratio = (self.magnitude.float() / squares.sqrt()).to(output.dtype)
        return output * ratio if bias is None else torch.addcmul(bias * (1 - ratio), output, ratio)

    def _squared_lengths(self, weight: Tensor) -> Tensor:
        """Returns the squared length of each row of W + scale B A, in fp32, without making it.

        With w, a row of W, and b, that of B, it is w w' + 2 scale b (A w') + scale^2 b (A A') b'.
        """
        if self._squares is None or self._squares[0] != weight._version:
            self._squares = weight._version, weight.float().square().sum(dim=1)
        a, b = self.a.float(), self.b.float()
        cross = ((weight @ self.a.t()).float() * b).sum(dim=1)
        own = ((b @ (a @ a.t())) * b).sum(dim=1)
        return self._squares[1] + 2 * self.scale * cross + self.scale**2 * own


class AdaptedColumn(ColumnParallelLinear):
    """Megatron-core's column parallel layer, whose weight is cut by rows, with an adapter.

    Attributes:
        adapter: The adapter; None leaves the layer as it is.
    """

    def __init__(self, *args: Any, **megatron: Any) -> None:
        super().__init__(*args, **megatron)
        self.adapter: Adapter | None = None

    def forward(self, input_: Tensor, *args: Any, **megatron: Any) -> tuple[Tensor, Tensor | None]:
        """Multiplies as megatron-core's layer does, and adds the adapter's product.

        Args:
            input_: The input, [s, b, inputs]; sequence parallelism cuts s.
            args: What megatron-core's layer takes.
            megatron: The same, by names.

        Returns:
            The output, [s, b, outputs / tp], and the bias that is left to be added, if any.
        """
        output, bias = super().forward(input_, *args, **megatron)
        adapter = self.adapter
        if adapter is None or not adapter.enabled:
            return output, bias
        output = adapter(output, input_, self.send)
        included = None if self.skip_bias_add else self.bias
        return adapter.rescaled(output, self.weight, included, self.add_up), bias

    def add_up(self, squares: Tensor) -> None:
        """Leaves the squared lengths of rows, [outputs / tp], as they are: the rows are whole."""

    def send(self, reduced: Tensor) -> Tensor:
        """Gives every rank the whole A x, [s, b, rank]."""
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(reduced, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(reduced, group=self.tp_group)

    def attach(self, shape: AdapterShape) -> None:
        """Gives the layer an adapter with arbitrary values, and marks its pieces and copies."""
        self.adapter = Adapter(shape, self.weight)
        for rows in filter(_is_there, (self.adapter.b, self.adapter.magnitude)):
            set_tensor_model_parallel_attributes(rows, True, 0, 1)
        self.adapter.a.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Returns megatron-core's sharded tensors of the layer and of its adapter."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        axes = dict.fromkeys(("b", "magnitude", "start_b"), 0)
        adapter = _sharded_adapter(self, axes, prefix, sharded_offsets, metadata)
        if prefix.endswith(f"{MODULES['fc1']}."):
            # Its rows are those of the gate and of the up half, side by side.
            adapter |= {
                name: apply_swiglu_sharded_factory(value, sharded_offsets)
                for name, value in adapter.items()
                if name.rpartition(".")[2] in axes
            }
        return sharded | adapter


class AdaptedRow(RowParallelLinear):
    """Megatron-core's row parallel layer, whose weight is cut by columns, with an adapter.

    Attributes:
        adapter: The adapter; None leaves the layer as it is.
    """

    def __init__(self, *args: Any, **megatron: Any) -> None:
        super().__init__(*args, **megatron)
        self.adapter: Adapter | None = None

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Multiplies as megatron-core's layer does, and adds the adapter's product.

        Args:
            input_: This rank's part of the input, [s, b, inputs / tp].

        Returns:
            The output, [s, b, outputs], where sequence parallelism cuts s; and the bias that is
            left to be added, if any.
        """
        output, bias = super().forward(input_)
        adapter = self.adapter
        if adapter is None or not adapter.enabled:
            return output, bias
        output = adapter(output, input_, self.send)
        return adapter.rescaled(output, self.weight, None, self.add_up), bias

    def add_up(self, squares: Tensor) -> None:
        """Adds up the ranks' parts of the squared lengths of rows, [outputs], in place."""
        if self.tp_group.size() > 1:
            torch.distributed.all_reduce(squares, group=self.tp_group)

    def send(self, reduced: Tensor) -> Tensor:
        """Adds up the ranks' parts of A x, [s, b, rank]; sequence parallelism cuts s of the sum."""
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(reduced, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(reduced, group=self.tp_group)

    def attach(self, shape: AdapterShape) -> None:
        """Gives the layer an adapter with arbitrary values, and marks its pieces and copies."""
        self.adapter = Adapter(shape, self.weight)
        set_tensor_model_parallel_attributes(self.adapter.a, True, 1, 1)
        for copy in filter(_is_there, (self.adapter.b, self.adapter.magnitude)):
            copy.sequence_parallel = self.sequence_parallel  # type: ignore[union-attr]

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Returns megatron-core's sharded tensors of the layer and of its adapter."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return sharded | _sharded_adapter(
            self, {"a": 1, "start_a": 1}, prefix, sharded_offsets, metadata
        )


def _is_there(parameter: Any) -> bool:
    """Says whether an adapter has a parameter."""
    return parameter is not None


def _sharded_adapter(
    layer: AdaptedColumn | AdaptedRow,
    axes: dict[str, int],
    prefix: str,
    sharded_offsets: tuple[Any, ...],
    metadata: dict[str, Any] | None,
) -> dict[str, Any]:
    """Returns megatron-core's sharded tensors of a layer's adapter; none if it has no adapter.

    Args:
        layer: The layer.
        axes: The dimension in which each matrix is cut; those that aren't named are copies.
        prefix: The name of the layer, with a dot behind it.
        sharded_offsets: What megatron-core passes on.
        metadata: The same.
    """
    if layer.adapter is None:
        return {}
    sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
        layer.adapter.state_dict(prefix="", keep_vars=True),
        f"{prefix}{_NAME}.",
        axes,
        sharded_offsets,
        tp_group=layer.tp_group,
        dp_cp_group=(metadata or {})["dp_cp_group"],
    )
    return sharded


def attach(layers: Iterable[Module], shapes: AdapterShapes) -> None:
    """Gives layers their adapters, with arbitrary values.

    Args:
        layers: Transformer layers of megatron-core, built with `AdaptedColumn` and `AdaptedRow`.
        shapes: The adapters of the whole model; those of other layers are left out.
    """
    for layer in layers:
        index = int(layer.layer_number) - 1  # type: ignore[arg-type]
        for target, module in MODULES.items():
            if (target, index) in shapes:
                linear: Any = layer.get_submodule(module)
                linear.attach(shapes[target, index])


def is_adapter(name: str) -> bool:
    """Says whether a parameter or an entry of this name belongs to an adapter."""
    return f".{_NAME}." in name


def adapters_of(model: Module) -> dict[tuple[str, int], Adapter]:
    """Returns the adapters of a model chunk by target and layer, the latter counted from 0.

    Args:
        model: A GPTModel of megatron-core, or a wrapper of one.
    """
    return {key: linear.adapter for key, linear in _adapted(model)}


def _adapted(model: Module) -> Iterator[tuple[tuple[str, int], Any]]:
    """Yields the linear layers that have an adapter, with their targets and layers."""
    for layer in model.modules():
        if not hasattr(layer, "layer_number") or not hasattr(layer, "self_attention"):
            continue
        for target, module in MODULES.items():
            linear = layer.get_submodule(module)
            if getattr(linear, _NAME, None) is not None:
                yield (target, int(layer.layer_number) - 1), linear  # type: ignore[arg-type]


def keep_lengths(model: Module) -> None:
    """Replaces NaN in the lengths of DoRAs by the lengths that rows have in the weights.

    The ranks of a tensor parallel group must call it together.
    """
    for _, linear in _adapted(model):
        magnitude = linear.adapter.magnitude
        if magnitude is not None:
            squares = linear.weight.detach().float().square().sum(dim=1)
            linear.add_up(squares)
            lengths = squares.sqrt().to(magnitude.dtype)
            magnitude.data.copy_(torch.where(magnitude.isnan(), lengths, magnitude))


@contextmanager
def adapters_off(chunks: Iterable[Module]) -> Iterator[None]:
    """Lets models compute without their adapters, as the base model does, while the block runs.

    Args:
        chunks: The model chunks of this rank, with or without wrappers.
    """
    adapters = [adapter for chunk in chunks for adapter in adapters_of(chunk).values()]
    before = [adapter.enabled for adapter in adapters]
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter, enabled in zip(adapters, before, strict=True):
            adapter.enabled = enabled
