"""A tiny ChatGLM3 and made-up samples for tests that train."""

from pathlib import Path
from typing import Any

import numpy as np

from glm3cli.config.model import ModelConfig
from glm3cli.config.training import TrainConfig

TINY = ModelConfig(
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=8,
    padded_vocab_size=128,
    seq_length=64,
    torch_dtype="fp32",
)


class Samples:
    """Random samples with answers of very different lengths, so that token weighting shows."""

    def __init__(self, seq_length: int, vocab_size: int) -> None:
        self._shape = (seq_length, vocab_size)

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        seq_length, vocab_size = self._shape
        random = np.random.default_rng(index)
        tokens = random.integers(0, vocab_size, seq_length + 1)
        trained = random.integers(1, seq_length)
        mask = np.arange(seq_length) >= seq_length - trained
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": mask.astype(np.float32),
        }


def train_config(**changes: Any) -> TrainConfig:
    """A run of the tiny model in fp32."""
    options: dict[str, Any] = {
        "from_scratch": True,
        "shape": "tiny",
        "data": ["unused"],
        "save": Path("unused"),
        "train_iters": 20,
        "seq_length": 32,
        "micro_batch_size": 1,
        "global_batch_size": 8,
        "dtype": "fp32",
        "lr": 1e-2,
        "min_lr": 1e-3,
        "lr_warmup_iters": 2,
        "init_method_std": 0.05,
        **changes,
    }
    return TrainConfig.parse(options)
