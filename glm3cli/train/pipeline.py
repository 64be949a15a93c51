"""`run_pipeline`: a global batch through megatron-core's pipeline schedule, at any lengths.

Micro-batches of different lengths make tensors of different shapes between the stages.
Megatron-core can have stages send each other these shapes before each tensor. That costs a message
and a wait each time, and its interleaved schedule can't do it with two stages: what they send to
each other in both directions would be mixed up. But every stage knows the lengths beforehand from
the index of the data, and so also the shape of each tensor that it will receive.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config

Shape = tuple[int, int, int]


def run_pipeline(
    forward_step: Callable[..., Any],
    iterators: list[Iterator[Any]],
    chunks: list[torch.nn.Module],
    *,
    micro_batch_size: int,
    lengths: Sequence[int],
    forward_only: bool,
) -> list[Any]:
    """Runs the forward passes of a global batch and, unless told otherwise, its backward passes.

    All ranks must call it.

    Args:
        forward_step: Runs the next micro-batch of an iterator through a chunk.
        iterators: The micro-batches of each chunk of this rank.
        chunks: This rank's model chunks.
        micro_batch_size: The number of samples of a micro-batch.
        lengths: The length of each micro-batch of this rank, over all context parallel ranks.
        forward_only: Whether to leave the backward passes out.

    Returns:
        The report of each micro-batch on the last stage; nothing on the others.
    """
    several = len(chunks) > 1
    pipeline: dict[str, Any] = {}
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        config = get_model_config(chunks[0])
        shapes = [_shape(config, length, micro_batch_size) for length in lengths]
        names = ["tp", "pp", "cp", "embd", "pos_embd", "dp_cp"]
        pipeline = {
            "p2p_communicator": KnownShapes(config, shapes, len(chunks)),
            "pg_collection": ProcessGroupCollection.use_mpu_process_groups(names),
        }
    reports: list[Any] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if several else iterators[0],
        model=chunks if several else chunks[0],
        num_microbatches=len(lengths),
        seq_length=max(lengths),
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
        **pipeline,
    )
    return reports


def _shape(config: Any, length: int, micro_batch_size: int) -> Shape:
    """Returns the shape of the hidden states of a micro-batch on one rank, [s, b, h]."""
    shards: int = parallel_state.get_context_parallel_world_size()
    if config.sequence_parallel:
        shards *= parallel_state.get_tensor_model_parallel_world_size()
    return length // shards, micro_batch_size, config.hidden_size


class KnownShapes(P2PCommunicator):
    """Megatron-core's messages between stages, with the shapes of tensors known beforehand.

    A stage sends the hidden states of all its forward passes in the order in which it runs them,
    and the gradients of all its backward passes likewise; only the output of the last chunk, and
    the gradient of the first one's input, go nowhere. All stages run the micro-batches of the
    chunks in the order of megatron-core's table, so that is the order in which tensors come.
    """

    def __init__(self, config: Any, shapes: Sequence[Shape], num_chunks: int) -> None:
        """Finds the order in which tensors come.

        Args:
            config: The TransformerConfig of the model.
            shapes: The shape of the hidden states of each micro-batch.
            num_chunks: The number of model chunks of a stage.
        """
        super().__init__(parallel_state.get_pipeline_model_parallel_group(), config)
        group = config.microbatch_group_size_per_vp_stage
        table = [
            (shapes[microbatch], chunk)
            for microbatch, chunk in get_schedule_table(len(shapes), num_chunks, group)
        ]
        first, last = self.pp_group.rank() == 0, self.pp_group.rank() == self.pp_group.size() - 1
        # The first stage gets what the last one sends of all chunks but the last. In backward
        # passes the chunks come in reverse, so that the same holds the other way round.
        inner = [shape for shape, chunk in table if chunk < num_chunks - 1]
        every = [shape for shape, _ in table]
        self._forward = iter(inner if first else every)
        self._backward = iter(inner if last else every)

    def _communicate_shapes(
        self, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[Shape, Shape]:
        """Returns the shapes of the tensors that come next from the stages before and behind."""
        nothing = (0, 0, 0)
        return (
            next(self._forward) if recv_prev else nothing,
            next(self._backward) if recv_next else nothing,
        )
