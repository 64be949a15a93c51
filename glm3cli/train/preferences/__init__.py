"""Training on what people prefer: the objectives of `--method` dpo, orpo, simpo and kto.

`answers` sums the log-probabilities of each answer of a micro-batch. `pairs` has the objective of
pairs of a chosen and a rejected answer, with the formulas of DPO, ORPO and SimPO in `losses`, and
`feedback` that of KTO. `choose` picks the objective of a run. `reference` finds out, before a
training, what its reference thinks of the answers.

train/ imports this room: setup.py the objectives, and run.py the reference. Of train/ the
objectives import `objective` alone; the reference also goes through the train step.
"""
