"""Adapters that are chosen text by text, within one forward pass over weights that all share.

The product with a layer's weight is computed for the tokens of all texts together; then each
adapter adds its own for the tokens of the texts that use it. The weights stay as they are, so that
as many adapters as there is room for can be served side by side (Chen et al. 2023, "Punica").
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from glm3cli.model.adapters import AdaptedColumn, AdaptedRow, Adapter, AdapterShapes, attach

Multiply = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Extra:
    """What one adapter adds to one linear layer.

    Attributes:
        adapter: The matrices.
        ratio: What the rows of a DoRA are multiplied by, [outputs]; None for others.
        bias: The bias that the layer's output contains, [outputs]; None for none.
        send: Makes of this rank's A x what B is multiplied with.
    """

    adapter: Adapter
    ratio: Tensor | None
    bias: Tensor | None
    send: Callable[[Tensor], Tensor]

    def add(self, output: Tensor, hidden: Tensor) -> Tensor:
        """Returns the output of the layer with the adapter's product; [n, outputs]."""
        found = self.adapter(output.unsqueeze(1), hidden.unsqueeze(1), self.send).squeeze(1)
        if self.ratio is None:
            return found
        found = found * self.ratio
        return found if self.bias is None else found + self.bias * (1 - self.ratio)


class Selected:
    """The adapters of this rank's model by their names, and whose tokens a pass has."""

    def __init__(self) -> None:
        self._extras: dict[Module, dict[str, _Extra]] = {}
        # The adapters of the present pass, each with its tokens; None for all.
        self._groups: list[tuple[str, Tensor | None]] = []

    def add(
        self, name: str, layers: Sequence[Module], shapes: AdapterShapes, load: Callable[[], None]
    ) -> None:
        """Takes an adapter; the ranks of a tensor parallel group must call it together.

        Args:
            name: The name by which texts choose it.
            layers: The layers of this rank, built with `AdaptedColumn` and `AdaptedRow`, whose
                weights are loaded.
            shapes: The shapes of the adapter.
            load: Fills the adapters that the layers have been given.
        """
        linears: list[Any] = [
            one
            for layer in layers
            for one in layer.modules()
            if isinstance(one, AdaptedColumn | AdaptedRow)
        ]
        for linear in linears:
            linear.adapter = None
        attach(layers, shapes)
        load()
        for linear in linears:
            if linear.adapter is not None:
                self._extras.setdefault(linear, {})[name] = _extra(linear)
                linear.adapter = None

    def choose(self, names: Sequence[str | None], device: torch.device) -> None:
        """Says which adapter each token of the next pass uses.

        Args:
            names: The name for each token; None for none.
            device: The device that computes.
        """
        self._groups = []
        for name in dict.fromkeys(one for one in names if one is not None):
            rows = [row for row, one in enumerate(names) if one == name]
            whole = len(rows) == len(names)
            self._groups.append((name, None if whole else torch.tensor(rows, device=device)))

    def extend(self, linear: Module, multiply: Multiply) -> Multiply:
        """Returns what a layer computes with the adapters that its tokens use.

        Args:
            linear: The layer.
            multiply: What it computes without them, [n, inputs] -> [n, outputs].
        """
        extras = self._extras.get(linear)
        if extras is None:
            return multiply

        def extended(hidden: Tensor) -> Tensor:
            output = multiply(hidden)
            for name, rows in self._groups:
                extra = extras.get(name)
                if extra is None:
                    continue
                if rows is None:
                    output = extra.add(output, hidden)
                else:
                    output[rows] = extra.add(output[rows], hidden[rows])
            return output

        return extended


def _extra(linear: Any) -> _Extra:
    """Returns what the adapter of a layer adds, whose weight is still there."""
    adapter, ratio = linear.adapter, None
    if adapter.magnitude is not None:
        product = adapter.b.float() @ adapter.a.float()
        squares = (linear.weight.float() + adapter.scale * product).square().sum(dim=1)
        linear.add_up(squares)
        ratio = (adapter.magnitude.float() / squares.sqrt()).to(linear.weight.dtype).detach()
    is_column = isinstance(linear, AdaptedColumn)
    bias = linear.bias if is_column and not linear.skip_bias_add else None
    return _Extra(adapter, ratio, bias, linear.send)
