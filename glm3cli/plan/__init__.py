"""Plans a run from shapes alone: its memory, its step time, and the parallel plans that fit.

Begin with `memory.memory_of_stage`, the memory of each rank of a pipeline stage; it sums
`parameters` (counts of weights, and of those that train) and `activations` (the tensors that
autograd saves of a layer). `estimate` predicts the step time by a formula, `search` tries all
parallel plans in order of that time, `fit` refuses a run that doesn't fit and names a plan that
does, and `describe` is the text of `--dry-run`. A forecast from real operators is in forecast/.

Nothing here imports torch at module level, so that a mistake is answered at once. This room imports
config/, errors and the table checkpoint/names.py, and within functions device/. train/, forecast/
and cli/ use it.
"""
