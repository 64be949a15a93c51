"""What a run knows about itself: plain data that its loop makes and its reports show.

`state` has what one step did (`StepOutcome`) and how far the run has come (`State`, which
checkpoints hold). `totals` adds up what the micro-batches of a step report. `phases` is the clock
that says where the time goes; `flops` turns tokens per second into TFLOP/s and MFU.

train/ and train/report/ import this room, and forecast/ takes `flops`; it imports nothing of
train/.
"""
