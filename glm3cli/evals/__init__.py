"""Benchmarks: scores a model on questions and on lm-evaluation-harness's tasks.

Begin with `suite` (what a benchmark is; `mmlu`, `ceval` and `cmmlu` define one each) and with
`runner`, which asks all questions: `questions` reads the CSV files, `custom` the files of one's
own, `prompts` makes token ids of them, `judge` gets letters from the inference engine and `exact`
texts, `spread` shares the batches among the data parallel ranks, `resume` saves the answers as they
come, `results` counts them, `statistics` says how far they may be trusted, and the room `page`
writes results.html. `compare` takes two results. The room `harness` is the second way:
lm-evaluation-harness asks, and our engine answers.

The command line (`cli.evaluate`) calls `runner.run_benchmark` with a suite and a display of the
progress, `custom.run_custom`, `compare.run_compare` or `harness.run.run_harness`, and prints what
they return. Wrong files and options are reported before torch is imported.
"""
