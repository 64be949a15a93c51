"""`Grid`: this rank's place among the parallel groups; `open_grid` makes the groups.

The ranks are cut along four axes, tensor (tp), context (cp), data (dp) and pipeline (pp): the world
size is the product of their sizes.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from glm3cli.config.parallel import ParallelConfig
from glm3cli.device import require_active
from glm3cli.errors import ConfigError
from glm3cli.parallel.join import join

# Long enough for one node to build a dataset index while the others wait.
_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Grid:
    """This rank's place among the parallel groups.

    Attributes:
        rank: This rank.
        world_size: The number of ranks.
        tp_rank: This rank's index in its tensor parallel group.
        tp_size: The tensor parallel size.
        pp_rank: This rank's index in its pipeline, the stage that it runs.
        pp_size: The number of pipeline stages.
        dp_rank: This rank's index in its data parallel group.
        dp_size: The data parallel size.
        cp_rank: This rank's index in its context parallel group.
        cp_size: The context parallel size.
        tp_group: The process group of the ranks that share each weight of this rank's layers.
        pp_group: The process group of the stages of this rank's pipeline.
        dp_group: The process group of the ranks that hold the same weights, and train on other
            samples; without the context parallel ranks.
        copy_group: The process group of the ranks that hold one copy of the model (tp x pp); its
            first rank is the first one of the first stage.
        closing: Callbacks that drop references to the groups; called before these are destroyed.
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
    copy_group: Any
    closing: ExitStack

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank runs the first pipeline stage, which has the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank runs the last pipeline stage, which has the output layer."""
        return self.pp_rank == self.pp_size - 1

    @property
    def leads_copy(self) -> bool:
        """Whether this rank is the first one of its copy of the model."""
        return self.rank == dist.get_global_rank(self.copy_group, 0)

    @property
    def last_stage_rank(self) -> int:
        """The rank that runs the last stage of this rank's pipeline."""
        return dist.get_global_rank(self.pp_group, self.pp_size - 1)


@contextmanager
def open_grid(config: ParallelConfig, seed: int = 0) -> Iterator[Grid]:
    """Makes the parallel groups for the block, and destroys all process groups after it.

    Joins the ranks that torchrun has started, unless this process has a default process group
    already; without torchrun it is the only rank. Seeds all random generators, megatron-core's
    included.

    Args:
        config: The parallel sizes.
        seed: The seed of the random generators.

    Yields:
        This rank's place.

    Raises:
        ConfigError: Groups are open in this process; megatron-core can hold one set at a time.
        DeviceError: The ranks don't find each other.
    """
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        raise ConfigError(
            "a model is open in this process, and only one can be at a time",
            "close it before you open the next",
        )
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
    """Reads this rank's place from megatron-core's module `parallel_state`."""
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
        copy_group=parallel_state.get_model_parallel_group(),
        closing=closing,
    )


def _seed_everything(seed: int) -> None:
    """Seeds Python's, numpy's, torch's and megatron-core's random generators."""
    import random

    import numpy as np
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    random.seed(seed)
    np.random.seed(seed % 2**32)  # megatron-core draws from the global generator
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
