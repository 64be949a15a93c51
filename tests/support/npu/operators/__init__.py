"""CPU kernels for the operators of torch_npu that we call, written from its documentation.

Each kernel refuses what the operator on a card would refuse (torch_npu/_op_plugin_docs.py). It
computes in small steps and shares no code with the kernels that it is compared with.
"""

from tests.support.npu.operators import attention, decoding, few_bits, pointwise, sending
from tests.support.npu.operators.kernel import KERNELS, with_defaults

__all__ = ["KERNELS", "attention", "decoding", "few_bits", "pointwise", "sending", "with_defaults"]
