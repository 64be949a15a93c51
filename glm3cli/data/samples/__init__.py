"""Turns token files into the samples and batches that training reads.

Begin with `spec`: a `DataSpec` determines the samples of a training. `datasets` makes them: texts
by megatron-core, instructions by `instructions`, and pairs and feedback by `preferences`, without
those that `fitting` finds to have nothing to train on, and with the weights that `weighting` gives
their tokens. `references` keeps what a reference thinks of answers. `order` blends data sets and
groups samples by length. `splits` divides the documents among training and validation. `loader`
cuts the samples of each step into the micro-batches of a rank, and `padding` makes their lengths
equal. `identity` checks that all ranks have the same data. `blend_table` counts what each data set
contributes, and `first_look` shows what is trained and warns; they import neither torch nor
megatron, so that the command line can show them early.

Training imports all of them, and `glm3 preprocess --build-index` imports `datasets`. Nothing here
imports `data.preprocess`.
"""
