"""Saves and restores the state of a training run, as a checkpoint in the dist layout.

Weights, optimizer, learning rate schedule and data position can be restored at any tp, pp, vpp and
dp. The state of the random generators is restored only at the same parallel sizes.
"""

import multiprocessing
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from glm3cli.checkpoint.locate import kind_of
from glm3cli.checkpoint.run.durable import write_and_digest
from glm3cli.checkpoint.run.moments import common_state, load_moments, sharded_moments
from glm3cli.checkpoint.run.queue_process import ByteQueue, outlive_signals_alone
from glm3cli.errors import CheckpointError
from glm3cli.host.limits import socket_folder
from glm3cli.model.adapters import adapters_of, is_adapter
from glm3cli.model.build import unwrap
from glm3cli.model.gpt import ChatGLM
from glm3cli.parallel.groups import Grid

# How megatron-core is to shard the optimizer's state. It adds the process group of the run to the
# dictionary, so every call gets a copy.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}

# Each layer has keys of its own, where not every layer has the same tensors.
_BY_LAYER = {"non_homogeneous_layers": True}


def save_request(
    folder: Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: Any,
    scheduler: Any,
    progress: dict[str, int],
    grid: Grid,
) -> AsyncRequest:
    """Returns a request that writes the present state of the run into a folder.

    Every rank must call this and run the request: at once (`execute_sync`), or in a process of its
    own (megatron-core's AsyncCallsQueue).

    Args:
        folder: An empty folder that all ranks of this machine see.
        chunks: The model chunks of this rank, wrapped for data parallelism.
        optimizer: The megatron-core optimizer.
        scheduler: The megatron-core scheduler of the learning rate.
        progress: The counters of the run, such as its iteration.
        grid: This rank's place in the parallel groups.
    """
    gather_weights(chunks)
    state = _sharded_weights(chunks)
    state["optimizer"] = sharded_moments(
        optimizer, _sharded_trained(chunks, state), _METADATA, is_loading=False
    )
    state["optimizer_common"] = common_state(optimizer)
    state["progress"] = progress
    state["schedule_updates"] = scheduler.num_steps
    state["grid"] = _parallel_sizes(grid, len(chunks))
    state["rng"] = _sharded_rng(grid)
    _keep_queue_from_signals()
    request = dist_checkpointing.save(
        state, str(folder), ("torch_dist", 1), async_sharded_save=True
    )
    write = partial(write_and_digest, request.async_fn, folder, grid.rank)
    return request._replace(async_fn=write)


def gather_weights(chunks: Sequence[torch.nn.Module]) -> None:
    """Brings the weights of the last step to every data-parallel rank; all ranks must call it.

    With `overlap_param_gather` a rank has, until the next forward pass, only those new weights that
    it updated itself (megatron/core/distributed/distributed_data_parallel.py 0.16.1,
    _make_forward_pre_hook).

    Args:
        chunks: The model chunks of this rank, wrapped for data parallelism.
    """
    for chunk in chunks:
        wrapped: Any = chunk
        if wrapped.ddp_config.overlap_param_gather:
            wrapped.start_param_sync(force_sync=True)


def _keep_queue_from_signals() -> None:
    """Starts the process that collects the results of megatron-core's writers; it ignores SIGTERM.

    A scheduler may send SIGTERM to every process of a job. Upstream's own queue process
    (dist_checkpointing/strategies/filesystem_async.py 0.16.1, _get_write_results_queue) would end
    by it, and the save that the signal asks for would fail.
    """
    if filesystem_async._results_queue is None:
        # The manager's process would take the path of its socket from TMPDIR, however long.
        address = f"{socket_folder()}/results-{os.getpid()}"
        manager = SyncManager(address, ctx=multiprocessing.get_context("spawn"))
        manager.start(outlive_signals_alone)
        filesystem_async._results_queue = ByteQueue(manager.Queue())


def load_training(
    folder: Path, chunks: Sequence[torch.nn.Module], optimizer: Any, scheduler: Any, grid: Grid
) -> tuple[dict[str, int], list[str]]:
    """Restores the state that a `save_request` wrote, at the parallel sizes of this run.

    The state of the optimizer and of the learning rate schedule is restored; their settings stay
    those of this run.

    Args:
        folder: The checkpoint.
        chunks: The model chunks of this rank, wrapped for data parallelism.
        optimizer: The megatron-core optimizer.
        scheduler: The megatron-core scheduler of the learning rate.
        grid: This rank's place in the parallel groups.

    Returns:
        The counters of the run at the save, and the names of the parts that weren't restored.

    Raises:
        CheckpointError: The folder holds no training state, or is damaged.
    """
    common = _load_common(folder)
    same_sizes = common.get("grid") == _parallel_sizes(grid, len(chunks))
    state = _sharded_weights(chunks)
    state["optimizer"] = sharded_moments(
        optimizer, _sharded_trained(chunks, state), _METADATA, is_loading=True
    )
    if same_sizes:
        state["rng"] = _sharded_rng(grid)
    try:
        loaded = dist_checkpointing.load(state, str(folder))
    except (Exception, CheckpointException) as error:  # damaged files raise nearly anything
        raise CheckpointError(
            f"{folder} can't be resumed from: {reason(error)}",
            "resume from an older checkpoint, or with the model that it was saved with",
        ) from error
    for name, chunk in zip(_names(chunks), chunks, strict=True):
        gpt = unwrap(chunk)
        # A checkpoint has the adapters alone, if there are any.
        gpt.load_state_dict(loaded[name], strict=not adapters_of(gpt))
    load_moments(optimizer, loaded["optimizer"], common["optimizer_common"])
    scheduler.num_steps = schedule_position(common)
    scheduler.step(increment=0)
    if same_sizes:
        _restore_rng(loaded["rng"])
    not_restored = (
        [] if same_sizes else ["random generators (other parallel sizes; nothing draws them)"]
    )
    return common["progress"], not_restored


def _load_common(folder: Path) -> dict[str, Any]:
    """Reads the part of a checkpoint that all ranks have in common.

    Raises:
        CheckpointError: The folder holds no training state, or is damaged.
    """
    if kind_of(folder) != "dist":
        raise CheckpointError(
            f"{folder} is no checkpoint of a training run",
            "resume from a folder such as RUN/iter_0000030, or start from it with --model",
        )
    older = "resume from an older checkpoint"
    if not (folder / "common.pt").is_file():
        raise CheckpointError(f"{folder} is incomplete: it has no common.pt", older)
    try:
        common = dist_checkpointing.load_common_state_dict(str(folder))
    except Exception as error:  # a damaged pickle raises nearly anything
        raise CheckpointError(
            f"{folder / 'common.pt'} is damaged: {reason(error)}", older
        ) from error
    if "optimizer_common" not in common:
        raise CheckpointError(
            f"{folder} holds weights without training state",
            "start a new run from it with --model instead of --resume",
        )
    return dict(common)


def schedule_position(common: Mapping[str, Any]) -> int:
    """Returns the number of optimizer steps after which the schedule of the learning rate goes on.

    Older checkpoints count the samples of these steps, all of them of the same global batch size.

    Args:
        common: The part of a checkpoint that all ranks have in common.
    """
    if "schedule_updates" in common:
        return int(common["schedule_updates"])
    progress = common["progress"]
    batch_size = progress["consumed_samples"] // max(progress["iteration"], 1)
    return int(common["schedule_steps"]) // max(batch_size, 1)


def reason(error: BaseException) -> str:
    """Returns the reason of an error in one line.

    torch.distributed.checkpoint wraps the errors of the ranks, each with its traceback; the first
    of them is taken.
    """
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def disk_trouble(folder: Path) -> Iterator[None]:
    """Runs a block that writes a checkpoint, and turns errors of the disk into a sentence.

    Earlier checkpoints stay as they are.

    Args:
        folder: The checkpoint, for the message.

    Raises:
        CheckpointError: The block raised an OSError or torch's CheckpointException.
    """
    try:
        yield
    except (OSError, CheckpointException) as error:
        raise CheckpointError(
            f"{folder} can't be written: {reason(error)}",
            "free some space and run the same command again; it goes on from the checkpoint before",
        ) from error


def _names(chunks: Sequence[torch.nn.Module]) -> list[str]:
    """Returns the keys of the model chunks in a checkpoint."""
    return ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]


def _sharded_weights(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Returns the weights of this rank as megatron-core's sharded tensors.

    If the model has adapters, these are the adapters' matrices alone: the other weights stay those
    of the base model.
    """
    found = {}
    for name, gpt in _by_name(chunks):
        if adapters_of(gpt):
            sharded = gpt.sharded_state_dict(metadata=_METADATA | _BY_LAYER)
            found[name] = {key: value for key, value in sharded.items() if is_adapter(key)}
        else:
            found[name] = gpt.sharded_state_dict(metadata=dict(_METADATA))
    return found


def _sharded_trained(chunks: Sequence[torch.nn.Module], weights: dict[str, Any]) -> dict[str, Any]:
    """Returns the weights as sharded tensors after whose keys the optimizer's state is named.

    Args:
        chunks: The model chunks of this rank.
        weights: The result of `_sharded_weights`.
    """
    gpts = [gpt for _, gpt in _by_name(chunks)]
    # Every rank has to come to the same answer, and each has some of what is frozen.
    frozen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(
        frozen, any(not weight.requires_grad for gpt in gpts for weight in gpt.parameters())
    )
    if not any(frozen) or any(map(adapters_of, gpts)):
        return weights
    # One tensor of all layers would lack the layers that aren't trained.
    return {
        name: gpt.sharded_state_dict(metadata=_METADATA | _BY_LAYER)
        for name, gpt in _by_name(chunks)
    }


def _by_name(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, ChatGLM]]:
    """Yields the model chunks without their wrappers, by their keys in a checkpoint."""
    for name, chunk in zip(_names(chunks), chunks, strict=True):
        yield name, unwrap(chunk)


def _parallel_sizes(grid: Grid, num_chunks: int) -> dict[str, int]:
    """Returns the parallel sizes of the run by their names."""
    sizes = {"tp": grid.tp_size, "pp": grid.pp_size, "dp": grid.dp_size, "cp": grid.cp_size}
    return sizes | {"vpp": num_chunks}


def _sharded_rng(grid: Grid) -> ShardedObject:
    """Returns the states of this rank's random generators, as an object that each rank has."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys)).clone(), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject(
        "rng",
        state,
        (grid.pp_size, grid.tp_size, grid.dp_size, grid.cp_size),
        (grid.pp_rank, grid.tp_rank, grid.dp_rank, grid.cp_rank),
        replica_id=0,
    )


def _restore_rng(state: dict[str, Any]) -> None:
    """Restores the states of this rank's random generators."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["tracker"])
