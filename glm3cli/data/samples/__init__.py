"""Turns token files into the samples and batches that training reads.

Begin with `datasets`: `build_samples` makes the training and validation samples of a `DataSpec`.
`splits` divides the documents among training and validation. `loader` cuts the samples of each step
into the micro-batches of a rank. `identity` checks that all ranks have the same data. `blend_table`
counts what each data set contributes; it imports neither torch nor megatron, so that the command
line can show its table early.

Training imports all of them, and `glm3 preprocess --build-index` imports `datasets`. Nothing here
imports `data.preprocess`.
"""
