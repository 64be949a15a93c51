"""Measures the memory that tensors hold while a rank trains, to the byte."""

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glm3cli.config.model import ModelConfig
from tests.support.tiny import Samples, train_config

# Large enough that hidden states, not the numbers beside them, make up the memory.
MODEL = ModelConfig(
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=768,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=32,
    padded_vocab_size=2048,
    seq_length=512,
    torch_dtype="fp32",
)


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of every storage from the operation that makes it until it is freed.

    Every operation passes here, those of the backward pass, too. The memory of the process would
    include the interpreter, the allocator's reserve, and the libraries; torch's profiler misses
    what other threads (gloo's) free. Memory that a kernel or a collective takes for itself isn't
    counted.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self._device = device
        self.peak = 0
        self._bytes = 0
        self._storages: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == self._device:
                self._add(leaf.untyped_storage())
        self.peak = max(self.peak, self._bytes)
        return result

    def restart(self) -> None:
        """Sets the peak to the bytes that are held now."""
        self.peak = self._bytes

    def _add(self, storage: torch.UntypedStorage) -> None:
        # The Python object lives as long as the storage; its number may be used again then.
        if id(storage) not in self._storages:
            self._storages[id(storage)] = storage.nbytes()
            self._bytes += storage.nbytes()
            weakref.finalize(storage, self._remove, id(storage))

    def _remove(self, number: int) -> None:
        self._bytes -= self._storages.pop(number)


def measure_peak(options: dict[str, Any], model: ModelConfig = MODEL) -> tuple[int, int]:
    """Returns this rank's stage, and the peak of its tensors in a run's second step, in bytes."""
    from glm3cli.parallel.groups import open_grid
    from glm3cli.train.setup import build_train_step, make_loader

    config = train_config(**options)
    with open_grid(config) as grid, LiveMemory() as memory:
        train_step = build_train_step(config, model, grid)
        with torch.no_grad():
            for chunk in train_step.chunks:
                for parameter in chunk.parameters():
                    parameter.uniform_(-0.02, 0.02)
        train_step.optimizer.reload_model_params()
        samples = Samples(config.seq_length, model.padded_vocab_size)
        # As if all tokens were trained: what a plan must be made for.
        loader = replace(make_loader(config, model, grid, samples), needs_all=True)
        train_step.run(loader, 0)  # makes the optimizer's state
        memory.restart()
        train_step.run(loader, config.global_batch_size)
        return grid.pp_rank, memory.peak
