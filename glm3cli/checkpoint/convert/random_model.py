"""Writes models with random weights: what the demo begins from, and what the tests convert."""

from pathlib import Path

import torch

from glm3cli.checkpoint.files.staging import staged
from glm3cli.checkpoint.layouts.companions import copy_companions
from glm3cli.checkpoint.layouts.write_plan import WritePlan
from glm3cli.checkpoint.layouts.writers import open_writer
from glm3cli.checkpoint.names import slots
from glm3cli.checkpoint.random import RandomSource
from glm3cli.config.parallel import ModelParallelConfig


def write_random_model(
    folder: Path, source: RandomSource, companions: Path, dtype: torch.dtype = torch.float32
) -> None:
    """Writes random weights as a Hugging Face folder in the chatglm layout.

    Args:
        folder: The new folder, which must not exist.
        source: The random weights.
        companions: The folder whose tokenizer (and remote code, if any) is copied.
        dtype: The type that the weights are cast to.

    Raises:
        CheckpointError: The disk is full or failing.
        ConfigError: The folder exists.
    """
    dtypes = dict.fromkeys(slots(source.model), dtype)
    plan = WritePlan(source.model, ModelParallelConfig(), dtypes, shard_bytes=2**30)

    with staged(folder, force=False) as partial:
        writer = open_writer("chatglm", partial, plan, lambda _path, _end: None)
        for slot in writer.order:
            writer.fill(slot, source.read(*slot).to(dtype))
        writer.finish()
        copy_companions(companions, partial, source.model)
