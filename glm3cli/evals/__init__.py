"""Benchmarks: scores a model on questions and on lm-evaluation-harness's tasks.

Begin with `suite` (what a benchmark is; the room `suites` defines those that come along) and with
`runner`, which asks all questions: `questions` reads the CSV files, `custom` the files of one's
own, `prompts` makes token ids of them, `judge` gets letters from the inference engine and `exact`
texts, `spread` shares the batches among the data parallel ranks, `ledger` keeps the answers as they
come, `resume` saves them, `results` and `summary` count them, `statistics` says how far they may be
trusted, and the room `page` writes results.html. `compare` takes two results. The room `harness` is
the second way: lm-evaluation-harness asks, and our engine answers. `needle` makes its own texts.

The command line (`cli.evaluate`) calls `runner.run_benchmark` with a suite and a display of the
progress, `custom.run_custom`, `compare.run_compare` or `harness.run.run_harness`, and prints what
they return. Wrong files and options are reported before torch is imported.
"""
