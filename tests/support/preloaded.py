"""What every rank on the CPU needs; imported once by the process that ranks are forked from.

Only imports: threads, of torch or of gloo, would not live on in the ranks.
"""

import gc
import importlib
import os

from tests.support.ranks import on_cpu

os.environ["OMP_NUM_THREADS"] = "1"
on_cpu()
for part in ("train.setup", "checkpoint.load", "checkpoint.resume", "infer.engine"):
    importlib.import_module(f"glm3cli.{part}")  # and megatron-core beneath them
gc.freeze()  # what the ranks inherit needn't be looked through after each of their jobs
