"""Ascend's torch_npu on a machine without NPUs: its real operator schemas over CPU kernels.

`wheel` gets the package, `stubs` builds the shared libraries that it links to, `operators` has the
kernels, `card` follows which tensors are on the card and refuses what it must, and `emulation`
makes a device of them all for a child process.
"""
