"""The ranks of a run: how they are started, find each other, and are grouped.

Begin with `groups.Grid`, this rank's place among the tensor, pipeline, context and data parallel
groups, and `open_grid`, which makes these groups and takes them down again. `launch` starts the
ranks of one machine (`--nproc`); `join` brings all ranks together, or says which of them are
missing; `collectives` adds up and gathers what the ranks of a group have; `storage` finds out which
ranks see the same folder, and runs what all ranks must do together.

This room imports config/, device/, host/ and errors of ours, and megatron.core for the groups.
train/, infer/, evals/, model/ (for `collectives`), checkpoint/ (for its run folder) and cli/ (for
`launch`) use it.
"""
