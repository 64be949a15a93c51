"""The benchmarks that come with glm3: MMLU, C-Eval and CMMLU.

Begin with `mmlu`, whose two protocols show what a `suite.Suite` can say; `ceval` and `cmmlu` are of
the same kind. Another benchmark is another module with such a value, and a command in
cli/evaluate.py. `own` reads questions of one's own, `named` those that --eval-suite names and those
of an earlier result, and `in_training` asks questions of the model that trains.
"""
