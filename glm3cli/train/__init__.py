"""Training: all that `glm3 pretrain` and `glm3 finetune` do.

Begin with `start.train`, which calls the rest in order. `prepare` checks, without torch, whatever
can be checked before; `run` is a training on one rank, from its process groups to its last
checkpoint; `setup` builds the model, the optimizer and the data loaders; `loop` repeats `step`, one
optimizer step through megatron-core's pipeline schedule, and `objective` is the loss that it
minimises. `checkpointer` writes and restores checkpoints, `candidates` chooses the one to go on
from among those that `resumable` finds, `origin` compares what goes on with what was saved,
`signals` lets the ranks agree to stop, and `profile` writes traces of steps. The room `preferences`
has the other objectives of finetune.

Imports go one way: this room imports `weights` (which of them are trained, or an adapter) and
`report` (what a run writes for people), which imports `progress` (plain data about a run).
cli/train.py calls `start.train`; forecast/ uses `prepare`, `start.dry_data`, `setup` and
`progress.flops`.
"""
