"""Counts of floating-point operations of matrix products and attention, from their arguments.

Torch's own counter (torch.utils.flop_counter) knows neither causal attention, of which kernels
compute half, nor Ascend's operators, nor products that add to a tensor in place.
"""

from collections.abc import Callable
from typing import Any

# Gives the number of operations of one call for the operator's arguments by name.
Count = Callable[[dict[str, Any]], float]


def _product(left: str, right: str) -> Count:
    """Counts a product of two arguments, [..., n, k] times [..., k, m].

    Each of the n x k x m terms is a multiplication and an addition.
    """
    return lambda named: 2.0 * named[left].numel() * named[right].size(-1)


def _pairs(length: int) -> float:
    """Returns the pairs of a query and a key in causal attention: half of the square.

    Kernels compute attention in blocks and leave out those that are hidden.
    """
    return length * length / 2


def _flash(products: int) -> Count:
    """Counts torch's fused attention of tensors [b, heads, s, d] as that many products."""

    def count(named: dict[str, Any]) -> float:
        query, key = named["query"], named["key"]
        length, keys = query.size(-2), key.size(-2)
        pairs = _pairs(length) if named.get("is_causal") else length * keys
        return products * 2.0 * query.size(0) * query.size(1) * pairs * query.size(-1)

    return count


def _fusion(products: int) -> Count:
    """Counts Ascend's causal fused attention as that many products.

    Queries are [s, b, heads * d] (SBH) or, with several samples in one sequence of t positions,
    [t, heads, d] (TND).
    """

    def count(named: dict[str, Any]) -> float:
        query = named["query"]
        if named["input_layout"] == "TND":
            ends = named["actual_seq_qlen"]
            pairs = sum(_pairs(end - start) for start, end in zip([0, *ends], ends, strict=False))
            return products * 2.0 * pairs * query.size(1) * query.size(2)
        return products * 2.0 * query.size(1) * _pairs(query.size(0)) * query.size(2)

    return count


# How the operations of each matrix product are counted, by the operator's name.
MATRIX: dict[str, Count] = {
    "aten.mm": _product("self", "mat2"),
    "aten.bmm": _product("self", "mat2"),
    "aten.addmm": _product("mat1", "mat2"),
    "aten.addmm_": _product("mat1", "mat2"),
}
# The same for attention. Its forward pass has two products: queries with keys, and their scores
# with values. Its backward pass has five: the scores once more, and the gradients of scores,
# queries, keys, and values.
ATTENTION: dict[str, Count] = {
    "aten._scaled_dot_product_flash_attention_for_cpu": _flash(2),
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": _flash(5),
    "npu.npu_fusion_attention": _fusion(2),
    "npu.npu_fusion_attention_grad": _fusion(5),
}
