"""Weights on disk: reading, writing and converting them in five layouts, and training checkpoints.

Begin with `names`: the table of weights, with their names in every layout. Then `cuts` (pieces of
tensor-parallel ranks), `source` (what weights can be read from), `load` (weights into a model that
trains or generates), `random` (weights of a training from scratch), and `locate`, `headers`,
`wrappers`, `pickles` and `scratch`, which serve them. The folders import one way, and the modules
here import none of them:

    these modules < files < adapter < layouts < convert; run stands beside convert.

Other rooms open a model by `layouts.opening`, find its place by `locate`, load it by `load`, and
count or choose its weights by `names`. Training saves and resumes by `run`. The command line calls
`convert`. This room imports data, model, parallel and device, but nothing that trains, plans or
generates.
"""
