"""Ascend NPUs: the device, its kernels, and its operators' shapes.

Begin with `device.NpuDevice`, which imports torch_npu and MindSpeed, as no other file may.
`kernels` says what runs as which operator, and `operators` describes these for meta tensors, with
which a plan is made. base.py, kernels.py and doctor/ are what this room builds on.
"""
