"""Checkpoints of a training run: saving its state, resuming, and machines without a shared disk.

Begin with `resume`, which saves and restores the state (weights, optimizer, schedule, position in
the data); `moments` is the optimizer's part, and `queue_process` a small process of its writers.
`durable` gives a saved folder its name when everything is on the disk, and finds damage later.
Where machines have disks of their own, `holdings` finds out which files are where and brings them
together, and `exchange` sends them.

Only training imports this folder. It imports `parallel`, `model` and `device`, and of this room
`files` and the modules at the top, but nothing of `convert`.
"""
