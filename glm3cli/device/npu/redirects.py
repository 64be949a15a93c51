"""What megatron-core does in a way that NPUs can't, or only by waiting, and what replaces it.

The rows of `REDIRECTS` hold with MindSpeed and without it: it mends the first by itself, and the
others at a higher --optimization-level than the one that glm3 asks it for.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glm3cli.device.redirects import Redirect

_LAYERS = "megatron.core.tensor_parallel.layers.VocabParallelEmbedding"
_LOSS = "megatron.core.tensor_parallel.cross_entropy.VocabParallelCrossEntropy"
_SCALER = "megatron.core.optimizer.grad_scaler.MegatronGradScaler"
_WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async.FileSystemWriterAsync"


def _waiting_preload(original: Callable[..., Any]) -> Any:
    """Replaces the copy of tensors to the host by one that waits for each of them.

    A copy that doesn't wait goes into memory that torch_npu pins with aclrtMallocHost
    (ToKernelNpu.cpp). The driver maps that with VM_DONTCOPY: in the processes that are forked to
    write the files it isn't there, and they hang or die.
    """
    return staticmethod(lambda buckets, _non_blocking=True: original(buckets, False))


def _embedding(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces the embedding's forward pass by one that indexes by no mask of booleans.

    torch_npu finds the elements of such a mask by nonzero, for whose result the host waits: once in
    each micro-batch, and for each token that is decoded.
    """

    def forward(self: Any, tokens: Tensor) -> Tensor:
        from megatron.core.tensor_parallel import mappings

        if self.tp_group.size() == 1:
            return original(self, tokens)
        is_other, places = _places(tokens, self.vocab_start_index, self.vocab_end_index)
        if self.deterministic_mode:
            output = self.weight[places]
        else:
            output = torch.nn.functional.embedding(places, self.weight)
        output = output.masked_fill(is_other.unsqueeze(-1), 0.0)
        if self.reduce_scatter_embeddings:  # [b, s, h] -> [s, b, h]
            output = output.transpose(0, 1).contiguous()
            return mappings.reduce_scatter_to_sequence_parallel_region(output, group=self.tp_group)
        return mappings.reduce_from_tensor_model_parallel_region(output, group=self.tp_group)

    return forward


def _places(ids: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
    """Returns which ids belong to other ranks, and the row of each id here; theirs is 0."""
    is_other = (ids < start) | (ids >= end)
    return is_other, (ids - start).masked_fill(is_other, 0)


def _predicted_logits(_original: Callable[..., Any]) -> Any:
    """Replaces the look-up of the right tokens' logits in the same way."""

    def calculate(
        logits: Tensor, target: Tensor, logits_max: Tensor, start: int, end: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        logits -= logits_max.unsqueeze(-1)  # in place, as they are large
        is_other, places = _places(target, start, end)
        predicted = logits.gather(-1, places.unsqueeze(-1)).squeeze(-1).masked_fill(is_other, 0.0)
        exponents = logits.exp_()
        return is_other, places.view(-1), predicted, exponents.sum(dim=-1), exponents

    return staticmethod(calculate)


def _inverse_scale(_original: Any) -> property:
    """Replaces the inverse of the loss scale by one that isn't computed in fp64.

    The scale is a power of two, unless a user wants another first one; a division in fp32 is exact.
    """
    return property(lambda scaler: scaler.scale.reciprocal())


REDIRECTS = (
    Redirect(
        _WRITER,
        "preload_tensors",
        _waiting_preload,
        "dist_checkpointing/strategies/filesystem_async.py: pinned copies before a fork",
    ),
    Redirect(
        _LAYERS, "forward", _embedding, "tensor_parallel/layers.py: masked_input[input_mask] = 0"
    ),
    Redirect(
        _LOSS,
        "calculate_predicted_logits",
        _predicted_logits,
        "tensor_parallel/cross_entropy.py: predicted_logits[target_mask] = 0",
    ),
    Redirect(_SCALER, "inv_scale", _inverse_scale, "optimizer/grad_scaler.py: _scale.double()"),
)
