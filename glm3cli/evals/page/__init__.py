"""results.html: what an evaluation has found, on one page that loads nothing.

Begin with `write`, which writes the page of a benchmark, of a comparison, of a needle test or of
lm-evaluation-harness beside its JSON file. `parts` makes bars, drawings and tables of numbers, and
`results.html` is the frame, with the style and with the script that filters the questions.
"""
