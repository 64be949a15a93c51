"""Starts torch.distributed and megatron-core's process groups, and tells this rank its place."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from glm3cli.config.parallel import ParallelConfig
from glm3cli.device import require_active
from glm3cli.parallel.join import join

# Long enough for one node to build a dataset index while the others wait.
_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Grid:
    """This rank's coordinates on the tp x cp x dp x pp grid, and the groups along its axes.

    Attributes:
        closing: What must let go of the groups, called before they are destroyed.
    """

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    tp_group: Any
    pp_group: Any
    dp_group: Any
    closing: ExitStack

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output layer."""
        return self.pp_rank == self.pp_size - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last stage in this rank's pipeline."""
        return dist.get_global_rank(self.pp_group, self.pp_size - 1)


@contextmanager
def open_grid(config: ParallelConfig, seed: int = 0) -> Iterator[Grid]:
    """Joins the ranks that torchrun started (or is alone) and leaves them at the end.

    A process that has a default group already keeps it until then.
    All random generators are seeded, megatron-core's per axis ones included.

    Raises:
        DeviceError: The ranks don't find each other.
    """
    from megatron.core import parallel_state

    if not dist.is_initialized():
        join(require_active().backend, _TIMEOUT)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tp,
            pipeline_model_parallel_size=config.pp,
            virtual_pipeline_model_parallel_size=config.vpp if config.vpp > 1 else None,
            context_parallel_size=config.cp,
            create_gloo_process_groups=False,
        )
        _seed_everything(seed)
        with ExitStack() as closing:
            yield _here(parallel_state, closing)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _here(parallel_state: Any, closing: ExitStack) -> Grid:
    return Grid(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        closing=closing,
    )


def _seed_everything(seed: int) -> None:
    import random

    import numpy as np
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    random.seed(seed)
    np.random.seed(seed % 2**32)  # megatron-core draws from the global generator
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
