"""Linear layers that communicate while they multiply, for tensor with sequence parallelism.

Megatron-core gathers the sequence before the first matrix product of a block and scatters sums
after the second; nothing else runs meanwhile. The fused kernels of some chips (MC2, "matrix
computation and communication") do both in pieces, so that one piece is multiplied while the next
one travels. On other chips the same layers communicate first and multiply then.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from glm3cli.device import require_active


class GatheringLinear(ColumnParallelLinear):
    """Megatron-core's column parallel layer, which gathers the sequence within its product."""

    def _forward_impl(
        self, input: Tensor, weight: Tensor, *, bias: Tensor | None, **_megatron: Any
    ) -> Tensor:
        product = _GatherMatmul.apply(input, weight, self.tp_group)  # type: ignore[no-untyped-call]
        return product if bias is None else product + bias


class ScatteringLinear(RowParallelLinear):
    """Megatron-core's row parallel layer without bias, which scatters sums within its product."""

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        """Multiplies, [s, b, in / tp] -> [s / tp, b, out]; the None stands for the bias."""
        return _MatmulScatter.apply(input_, self.weight, self.tp_group), None  # type: ignore[no-untyped-call]


class _GatherMatmul(torch.autograd.Function):
    """Gathers hidden states and multiplies: [s / tp, b, in], [out / tp, in] -> [s, b, out / tp]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, group: Any) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.group = group
        rows = hidden.flatten(0, 1)
        product, _ = require_active().kernels.gather_matmul(rows, weight.t(), group)
        return product.view(-1, hidden.size(1), weight.size(0))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor | None, None]:
        hidden, weight = ctx.saved_tensors
        grad = grads[0].flatten(0, 1).contiguous()
        if not ctx.needs_input_grad[1]:
            of_hidden = require_active().kernels.matmul_scatter(grad, weight, ctx.group)
            return of_hidden.view(hidden.shape), None, None
        # Gathered again instead of saved, while the input's gradient is multiplied and sent.
        gathered = hidden.new_empty(grad.size(0), hidden.size(2))
        rows = hidden.flatten(0, 1).contiguous()
        handle = dist.all_gather_into_tensor(gathered, rows, group=ctx.group, async_op=True)
        of_hidden = require_active().kernels.matmul_scatter(grad, weight, ctx.group)
        handle.wait()
        return of_hidden.view(hidden.shape), grad.t().matmul(gathered), None


class _MatmulScatter(torch.autograd.Function):
    """Multiplies and scatters the sums: [s, b, in / tp], [out, in / tp] -> [s / tp, b, out]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, group: Any) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.group = group
        rows = hidden.flatten(0, 1)
        sums = require_active().kernels.matmul_scatter(rows, weight.t(), group)
        return sums.view(-1, hidden.size(1), weight.size(0))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor | None, None]:
        hidden, weight = ctx.saved_tensors
        grad = grads[0].flatten(0, 1).contiguous()
        of_hidden, gathered = require_active().kernels.gather_matmul(grad, weight, ctx.group)
        of_weight = gathered.t().matmul(hidden.flatten(0, 1)) if ctx.needs_input_grad[1] else None
        return of_hidden.view(hidden.shape), of_weight, None
