"""results.html: what an evaluation has found, on one page that loads nothing.

Begin with `write`, which writes a page beside its JSON file, also that of a benchmark; a comparison
and a needle test make their own parts, and `harness` those of lm-evaluation-harness. `parts` makes
bars, drawings and tables of numbers, and `results.html` is the frame, with the style and with the
script that filters the questions.
"""
