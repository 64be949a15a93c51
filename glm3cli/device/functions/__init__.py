"""Functions of plain torch with gradients of their own, which save less for the backward pass.

Kernels compute with them where a chip has no fused operator: pointwise.py has those that work on
single numbers, pairs and rows, and blocks.py has attention.
"""

from glm3cli.device.functions.blocks import attention
from glm3cli.device.functions.pointwise import cross_entropy, rms_norm, rotate, swiglu

__all__ = ["attention", "cross_entropy", "rms_norm", "rotate", "swiglu"]
