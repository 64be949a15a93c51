"""The state of a training run in megatron-core's layout-free `dist` checkpoints.

Weights, optimizer, schedule, and data position can be read back at any tp, pp, vpp, and dp.
"""

import multiprocessing
import random
import signal
from collections.abc import Sequence
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from glm3cli.checkpoint.locate import kind_of
from glm3cli.errors import CheckpointError
from glm3cli.model.build import unwrap
from glm3cli.parallel.groups import Grid

# Optimizer state in the shape of the parameters, so that any data parallel size can read it.
_SHARDING = "fully_reshardable"
# What a new run may set differently from the one that it continues.
_OPTIMIZER_SETTINGS = ("lr", "max_lr", "min_lr", "weight_decay", "wd_mult", "betas", "eps")


def save_training(
    folder: Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: Any,
    scheduler: Any,
    progress: dict[str, int],
    grid: Grid,
) -> None:
    """Writes the whole state of the run into the empty `folder`; every rank must call it."""
    _allocate_moments(optimizer)  # they are still missing where every step so far was skipped
    state = _sharded_state(chunks, optimizer, is_loading=False)
    state["progress"] = progress
    state["schedule_steps"] = scheduler.num_steps
    state["grid"] = _layout(grid, len(chunks))
    state["optimizer_kind"] = _kind(optimizer)
    state["rng"] = _sharded_rng(grid)
    _keep_queue_from_signals()
    dist_checkpointing.save(state, str(folder), ("torch_dist", 1))


def _keep_queue_from_signals() -> None:
    """Starts the process that megatron-core's writers report to, deaf to stop signals.

    A scheduler may send SIGTERM to every process of a job. Upstream's own queue process
    (dist_checkpointing/strategies/filesystem_async.py 0.16.1, _get_write_results_queue) would end
    by it, and the save that the signal asks for would fail.
    """
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(signal.signal, (signal.SIGTERM, signal.SIG_IGN))
        filesystem_async._results_queue = manager.Queue()


def load_training(
    folder: Path, chunks: Sequence[torch.nn.Module], optimizer: Any, scheduler: Any, grid: Grid
) -> tuple[dict[str, int], list[str]]:
    """Restores what `save_training` wrote, at this run's layout.

    The settings of the optimizer and of the schedule are this run's; their state is restored.

    Returns:
        The progress, and what was not restored.

    Raises:
        CheckpointError: The folder holds no training state, or is damaged.
    """
    common = _load_common(folder)
    if common["optimizer_kind"] != _kind(optimizer):
        wanted = "--no-" if common["optimizer_kind"] == "replicated" else "--"
        raise CheckpointError(
            f"{folder} was saved with a {common['optimizer_kind']} optimizer, this run has a "
            f"{_kind(optimizer)} one",
            f"resume with {wanted}distributed-optimizer",
        )
    same_layout = common.get("grid") == _layout(grid, len(chunks))
    _allocate_moments(optimizer)
    state = _sharded_state(chunks, optimizer, is_loading=True)
    if same_layout:
        state["rng"] = _sharded_rng(grid)
    settings = [_settings(group) for group in optimizer.param_groups]
    try:
        loaded = dist_checkpointing.load(state, str(folder))
    except (Exception, CheckpointException) as error:  # damaged files raise nearly anything
        raise CheckpointError(
            f"{folder} can't be resumed from: {_reason(error)}",
            "resume from an older checkpoint, or with the model that it was saved with",
        ) from error
    for name, chunk in zip(_names(chunks), chunks, strict=True):
        unwrap(chunk).load_state_dict(loaded[name])
    _load_optimizer(optimizer, loaded["optimizer"])
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)
    scheduler.num_steps = int(common["schedule_steps"])
    scheduler.step(increment=0)
    if same_layout:
        _restore_rng(loaded["rng"])
    not_restored = [] if same_layout else ["random generators (another layout; nothing draws them)"]
    return common["progress"], not_restored


def _load_common(folder: Path) -> dict[str, Any]:
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
            f"{folder / 'common.pt'} is damaged: {_reason(error)}", older
        ) from error
    if "progress" not in common:
        raise CheckpointError(
            f"{folder} holds weights without training state",
            "start a new run from it with --model instead of --resume",
        )
    return dict(common)


def _reason(error: BaseException) -> str:
    """Why, in one line; torch wraps the error of each rank together with its traceback."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return (str(error).splitlines() or [type(error).__name__])[0]


def _names(chunks: Sequence[torch.nn.Module]) -> list[str]:
    return ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]


def _sharded_state(
    chunks: Sequence[torch.nn.Module], optimizer: Any, *, is_loading: bool
) -> dict[str, Any]:
    # Megatron-core adds the process group of this run to it: a new one for every call.
    metadata = {"distrib_optim_sharding_type": _SHARDING, "chained_optim_avoid_prefix": True}
    state: dict[str, Any] = {
        name: unwrap(chunk).sharded_state_dict(metadata=metadata)
        for name, chunk in zip(_names(chunks), chunks, strict=True)
    }
    state["optimizer"] = optimizer.sharded_state_dict(
        state, is_loading=is_loading, metadata=metadata
    )
    return state


def _load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Loads the optimizer, around a gap upstream.

    Megatron-core's distributed optimizer expects of a fully reshardable checkpoint every entry of
    AdamW's state, and leaves torch's `step` out of it (optimizer/distrib_optimizer.py 0.16.1,
    _set_main_param_and_optimizer_states); so the step counts stand aside for a moment. They come
    back as copies: upstream gives all parameters one tensor, which each of them would increment.
    """
    moments = state.pop("param_state", None)
    if moments is None:
        # Upstream leaves out a step count of 0 (optimizer/optimizer.py 0.16.1: `if step`).
        inner = state.get("optimizer", state)
        inner["state"].setdefault("common_step", torch.tensor(0.0))
        optimizer.load_state_dict(state)
        return
    optimizer.load_state_dict(state)
    [part] = optimizer.chained_optimizers
    states = part.optimizer.state
    steps = {parameter: values.pop("step", None) for parameter, values in states.items()}
    part.load_parameter_state_from_fully_reshardable(moments)
    for parameter, step in steps.items():
        if step is not None:
            states[parameter]["step"] = step.clone()


def _kind(optimizer: Any) -> str:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return "distributed" if isinstance(parts[0], DistributedOptimizer) else "replicated"


def _allocate_moments(optimizer: Any) -> None:
    """Gives torch's AdamW the state that it would make in its first step, where it has none yet.

    Megatron-core's distributed optimizer reads the step count of every parameter when it is asked
    what it saves or wants to load (optimizer/distrib_optimizer.py 0.16.1, state_dict).
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        if not isinstance(inner, torch.optim.AdamW):
            continue
        for group in inner.param_groups:
            for parameter in group["params"]:
                if inner.state[parameter]:
                    continue
                inner.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: group[key] for key in _OPTIMIZER_SETTINGS if key in group}


def _layout(grid: Grid, num_chunks: int) -> dict[str, int]:
    return {"tp": grid.tp_size, "pp": grid.pp_size, "dp": grid.dp_size, "vpp": num_chunks}


def _sharded_rng(grid: Grid) -> ShardedObject:
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
        (grid.pp_size, grid.tp_size, grid.dp_size),
        (grid.pp_rank, grid.tp_rank, grid.dp_rank),
        replica_id=0,
    )


def _restore_rng(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["tracker"])
