"""lm-evaluation-harness asks, and our engine answers: `glm3 eval harness`.

Begin with `run`, which finds the tasks and drives them: rank 0 alone runs lm-evaluation-harness,
and the others compute what its model is asked (`model`). `scorer` answers the three kinds of
requests. `options` reads the generation options of a task.

The package lm-eval is optional: it is imported inside functions only, once `run.check_installed`
has found it.
"""
