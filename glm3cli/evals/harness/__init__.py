"""lm-evaluation-harness asks, and our engine answers: `glm3 eval harness`.

Begin with `run`, which finds the tasks and drives them: rank 0 alone runs lm-evaluation-harness,
and the others compute what its model is asked (`model`). `scorer` answers the three kinds of
requests. `options` reads the generation options of a task, `template` the turns of a chat,
`published` the files of authors in place of the hub, and `code` runs what a model has written, each
program by the file `confined`.

The package lm-eval is optional: it is imported inside functions only, once `run.check_installed`
has found it.
"""
