"""Predicts the step time on a device that isn't here, from the operators that a run really calls.

Begin with `forecast.forecast`. It lets `record` run the real model and optimizer of each pipeline
stage on meta tensors, in a world of ranks that aren't there, while `recorder` lists every operator
with its operations, bytes, or message. `roofline` turns each operator into seconds on a described
device (device/catalog.py), and `schedule` puts the stages' passes into the order of megatron-core's
pipeline. `dry_run` is all of `--dry-run`: the checked settings, the plan, and the forecast.

Formulas that compare hundreds of parallel plans in a moment are in plan/estimate.py. Only cli/ and
the benchmarks use this room. It imports train/, whose real step it records, and all that is below.
"""
