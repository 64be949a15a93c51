"""What a run writes for people: its log, metrics.jsonl, report.html, and the tools' files.

Begin with `metrics.Metrics`, which the training loop calls for every step, validation and event.
`reporters` passes the numbers on to TensorBoard, Weights & Biases and SwanLab. `history` reads
metrics.jsonl into columns, and `report` makes the page report.html of them from the template of
that name beside it, with the drawings of `charts`.

train/ imports this room, never the reverse: it takes what it shows from `train.progress` and from
the files of the run. `reporters` can be imported without torch, to check early that the tools are
installed.
"""
