"""Ascend's torch_npu on a machine without Ascend: its real operator schemas over CPU kernels.

`wheel` gets the package, `stubs` builds the shared libraries that it links to, `operators` are the
kernels, and `emulation` makes of all that the device of a child process.
"""
