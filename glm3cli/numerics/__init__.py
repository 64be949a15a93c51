"""The self-test of `glm3 doctor --numerics`: does this machine's device compute what it should?

Begin with `run.run_numerics`. A `case.Case` is an operation of the device layer beside its formula
in fp64 on the host (`plain`), with inputs that every type has exactly; `training_cases` and
`decoding_cases` are those of ChatGLM3-6B, traps included. `traps` asks torch's own operators about
overflow, NaN, and choices, `collectives` the network, and `small_model` trains, saves and generates
beside a whole model in fp64 (`plain_model`). Each finds `outcome.Outcome`s: an error, its limit,
the reason for the limit, and what a user can do without the operator.

Only cli/ uses this room. It imports train/, infer/, and all that is below; what it computes on the
host shares no code with what it compares.
"""
