"""Benchmarks: scores a model on multiple-choice questions and on lm-evaluation-harness's tasks.

Begin with `suite` (what a benchmark is; `mmlu`, `ceval` and `cmmlu` define one each) and with
`runner`, which asks all questions: `questions` reads the CSV files, `prompts` makes token ids of
them, `judge` gets the answers from the inference engine, `spread` shares the batches among the
data parallel ranks, `resume` saves the answers as they come, and `results` counts them.
`harness` and `scorer` are the second way: lm-evaluation-harness asks, and our engine answers.

The command line (`cli.evaluate`) calls `runner.run_benchmark` with a suite and a display of the
progress, or `harness.run_harness`, and prints the `results.EvalResult`. Wrong files and options are
reported before torch is imported: only `judge`, `spread` and `scorer` import numpy or torch, and
`runner` and `harness` import them once all checks have passed.
"""
