"""`Pipeline`: this rank's part of a model, and forward passes through all of it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from glm3cli.checkpoint.load import load_weights
from glm3cli.checkpoint.source import WeightSource
from glm3cli.config.model import DType
from glm3cli.config.parallel import ParallelConfig
from glm3cli.device import require_active
from glm3cli.model.build import build_chunks, transformer_config, unwrap
from glm3cli.model.cache import CacheWindow, KVCache
from glm3cli.parallel.groups import Grid


class Pipeline:
    """This rank's part of a model, which runs forward passes together with the other ranks' parts.

    The ranks that share a copy of the model must call the same methods with the same arguments.
    """

    def __init__(
        self, source: WeightSource, parallel: ParallelConfig, dtype: DType, grid: Grid
    ) -> None:
        """Builds this rank's part of the model, and loads its weights.

        Args:
            source: The weights.
            parallel: The parallel sizes.
            dtype: The type in which the model runs.
            grid: This rank's place among the parallel groups.

        Raises:
            CheckpointError: The source lacks a tensor or can't be read.
        """
        self._grid = grid
        # A decoded token is one position: it can't be split over tensor parallel ranks.
        config = transformer_config(source.model, parallel, dtype, sequence_parallel=False)
        self._chunk = build_chunks(source.model, parallel, config)[0].eval()
        self._gpt = unwrap(self._chunk)
        load_weights([self._gpt], source, parallel, grid)
        self._keep = 1
        if grid.is_last_stage:
            self._gpt.output_layer.register_forward_pre_hook(self._last_positions)
        self._device = require_active().torch_device()

    def _last_positions(self, _layer: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Cuts the output layer's input, [s, b, h], to the last positions; a hook of that layer."""
        # Logits of a whole prompt are gigabytes; rows end at the last slot, so these suffice.
        return (args[0][-self._keep :], *args[1:])

    def left_padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, tuple[int, ...]]:
        """Pads prompts of token ids on the left to the length s of the longest.

        Returns:
            The token ids, [b, s], and the number of pads in front of each row.
        """
        longest = max(len(prompt) for prompt in prompts)
        rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        padding = tuple(longest - len(prompt) for prompt in prompts)
        return torch.tensor(rows, device=self._device), padding

    @contextmanager
    def cached(self, capacity: int, padding: tuple[int, ...]) -> Iterator[CacheWindow]:
        """Gives every layer a KV cache for the block.

        Args:
            capacity: The number of slots in a row of the cache, one per token.
            padding: The number of pads in front of each row.

        Yields:
            The window of slots that a forward pass works on, at the first slot.
        """
        window = CacheWindow(padding=padding)
        attentions = [layer.self_attention.core_attention for layer in self._gpt.decoder.layers]
        in_use = any(attention.cache is not None for attention in attentions)
        assert not in_use, "requests are running, whose cache this would replace"
        for attention in attentions:
            attention.cache = KVCache(window, capacity)
        try:
            yield window
        finally:
            for attention in attentions:
                attention.cache = None

    @contextmanager
    def keeping(self, num_positions: int) -> Iterator[None]:
        """Makes forward passes compute the logits of the last `num_positions`, instead of one."""
        self._keep = num_positions
        try:
            yield
        finally:
            self._keep = 1

    def forward(self, tokens: Tensor) -> Tensor | None:
        """Runs one forward pass through the pipeline, which adds to the KV caches.

        Args:
            tokens: The token ids, [b, slots].

        Returns:
            The logits of the last position, or of as many as `keeping` says, [b, positions,
            vocab]; None before the last stage.
        """
        collected = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter([tokens]),
            model=self._chunk,
            num_microbatches=1,
            seq_length=tokens.size(1),
            micro_batch_size=tokens.size(0),
            forward_only=True,
            collect_non_loss_data=True,
        )
        if not self._grid.is_last_stage:
            return None
        return gather_from_tensor_model_parallel_region(collected[0])

    def from_last_stage(self, tensor: Tensor) -> Tensor:
        """Returns the tensor that the last stage has; every rank of the pipeline must call it."""
        if self._grid.pp_size > 1:
            dist.broadcast(tensor, self._grid.last_stage_rank, group=self._grid.pp_group)
        return tensor


def _forward_step(
    tokens: Iterator[Tensor], model: torch.nn.Module
) -> tuple[Tensor, Callable[..., Tensor]]:
    """Runs the model on the next tokens, for megatron-core's pipeline schedule.

    Returns:
        The model's output, and a function that gives the schedule this output to collect.
    """
    return model(next(tokens), None, None), lambda output, non_loss_data: output
