"""results.html: what an evaluation has found, on one page that loads nothing.

Begin with `write`, which writes a page beside its JSON file, also that of a benchmark; `comparison`
makes the parts of two results, `harness` those of lm-evaluation-harness, and a needle test its own.
`parts` makes bars, drawings and tables of numbers, and `results.html` is the frame, with the style
and with the script that filters the questions.
"""
