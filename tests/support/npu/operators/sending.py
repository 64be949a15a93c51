"""Matrix products that send while they multiply (MC2)."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.npu.operators.kernel import FLOATS, kernel, require


def _check_mc2(rows: Tensor, matrix: Tensor, world_size: int) -> None:
    require(rows.dtype in FLOATS[:2] and matrix.dtype == rows.dtype, f"MC2: no {rows.dtype}")
    require(rows.dim() == matrix.dim() == 2, "MC2: not two dims")
    require(256 <= rows.size(1) < 65535, "MC2: k is not in [256, 65535)")
    require(rows.size(1) == matrix.size(0), "MC2: k differs")
    require(rows.is_contiguous(), "MC2: the input is transposed")
    require(world_size in (2, 4, 8), "MC2: not 2, 4 or 8 ranks")


def _group(name: str, world_size: int) -> Any:
    group = dist.distributed_c10d._resolve_process_group(name)
    require(group.size() == world_size, "MC2: world_size is not the group's")
    return group


@kernel
def npu_all_gather_base_mm(
    rows: Tensor, matrix: Tensor, hcom: str, world_size: int, bias: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor]:
    _check_mc2(rows, matrix, world_size)
    require(bias is None, "MC2: no bias")
    parts = [torch.empty_like(rows) for _ in range(world_size)]
    dist.all_gather(parts, rows, group=_group(hcom, world_size))
    gathered = torch.cat(parts)
    return gathered @ matrix, gathered


@kernel
def npu_mm_reduce_scatter_base(
    rows: Tensor,
    matrix: Tensor,
    hcom: str,
    world_size: int,
    reduce_op: str,
    bias: Tensor | None,
    *others: Any,
) -> Tensor:
    _check_mc2(rows, matrix, world_size)
    require(bias is None and reduce_op == "sum", "MC2: sums without bias alone")
    require(rows.size(0) % world_size == 0, "MC2: m is not a multiple of world_size")
    group = _group(hcom, world_size)
    product = (rows @ matrix).float()
    dist.all_reduce(product, group=group)
    return product.chunk(world_size)[dist.get_rank(group)].to(rows.dtype)
