"""Saves and restores AdamW's state, so that either kind of optimizer can read what the other wrote.

Megatron-core's optimizer replicates the state on all data-parallel ranks; its distributed optimizer
shards it over them. A checkpoint holds for every weight its fp32 copy, `param`, and AdamW's moments
`exp_avg` and `exp_avg_sq`, each in the weight's shape and cut as the weight is. So the state can be
restored at any parallel sizes.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

_PREFIX = "optimizer.state"


def common_state(optimizer: Any) -> dict[str, Any]:
    """Returns the part of the state that is the same on all ranks; every rank must call it.

    Args:
        optimizer: The megatron-core optimizer, of either kind.

    Returns:
        AdamW's number of steps under "step", and the state of fp16's loss scaler under
        "grad_scaler" (None for other types).
    """
    part = _only(optimizer)
    steps = [int(state["step"]) for state in part.optimizer.state.values() if "step" in state]
    # A stage of which nothing is trained has counted no steps.
    counts: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(counts, max(steps, default=0))
    return {
        "step": max(counts),
        "grad_scaler": part.grad_scaler.state_dict() if part.config.fp16 else None,
    }


def sharded_moments(
    optimizer: Any, weights: dict[str, Any], metadata: dict[str, Any], *, is_loading: bool
) -> dict[int, Any]:
    """Returns the state of this rank's weights as megatron-core's sharded tensors.

    Args:
        optimizer: The megatron-core optimizer, of either kind.
        weights: The sharded state dict of the model.
        metadata: The metadata with which that state dict was made.
        is_loading: Whether the values are about to be replaced by those of a checkpoint.

    Returns:
        The sharded tensors by the position of the weight in the optimizer.
    """
    part = _only(optimizer)
    _allocate(part)  # they are still missing where every step so far was skipped
    if isinstance(part, DistributedOptimizer):
        return part.sharded_param_state_fully_reshardable(
            weights, is_loading=is_loading, metadata=dict(metadata)
        )
    sharded = {id(value.data): value for value in nested_values(weights) if hasattr(value, "data")}
    return {
        index: {name: _like(sharded[id(weight)], name, tensor) for name, tensor in tensors.items()}
        for index, (weight, tensors) in enumerate(_replicated(part))
    }


def load_moments(optimizer: Any, moments: dict[int, Any], common: dict[str, Any]) -> None:
    """Puts the state from a checkpoint into the optimizer.

    Args:
        optimizer: The megatron-core optimizer, of either kind.
        moments: The result of `sharded_moments`, filled with the values from the checkpoint.
        common: The result of `common_state` at the time of the save.
    """
    part = _only(optimizer)
    states = part.optimizer.state
    if isinstance(part, DistributedOptimizer):
        # Upstream copies every entry of a state but looks for none of `step`
        # (optimizer/distrib_optimizer.py 0.16.1, _set_main_param_and_optimizer_states).
        steps = {parameter: values.pop("step") for parameter, values in states.items()}
        part.load_parameter_state_from_fully_reshardable(moments)
        for parameter, step in steps.items():
            states[parameter]["step"] = step
    else:
        with torch.no_grad():
            for index, (_, tensors) in enumerate(_replicated(part)):
                for name, tensor in tensors.items():
                    tensor.copy_(moments[index][name])
    for values in states.values():
        values["step"].fill_(common["step"])
    if common["grad_scaler"] is not None and part.config.fp16:
        part.grad_scaler.load_state_dict(common["grad_scaler"])


def _only(optimizer: Any) -> Any:
    """Returns the only optimizer in the chain of optimizers that megatron-core makes."""
    [part] = getattr(optimizer, "chained_optimizers", [optimizer])
    return part


def _like(weight: Any, name: str, tensor: Tensor) -> Any:
    """Returns a part of the state as a sharded tensor that is cut as its weight is.

    Args:
        weight: The sharded tensor of the weight, or the factory of its sharded tensors.
        name: The name of the part, such as exp_avg.
        tensor: Its values on this rank, in the weight's shape.
    """
    values: dict[str, Any] = {"key": f"{_PREFIX}.{name}.{weight.key}", "data": tensor}
    if not isinstance(weight, ShardedTensorFactory):
        values["dtype"] = tensor.dtype
    return replace(weight, **values)


def _replicated(part: Any) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yields every weight and its state by name, for the optimizer that replicates the state."""
    for weight, main in _pairs(part):
        state = part.optimizer.state[main]
        names = ("exp_avg", "exp_avg_sq")
        yield weight, {"param": main.data, **{name: state[name] for name in names}}


def _pairs(part: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields every weight with the tensor that the optimizer updates: itself, or its fp32 copy."""
    if not hasattr(part, "float16_groups"):
        for group in part.optimizer.param_groups:
            yield from ((weight, weight) for weight in group["params"])
        return
    for weights, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
        yield from zip(weights, mains, strict=True)
    for weights in part.fp32_from_fp32_groups:
        yield from ((weight, weight) for weight in weights)


def _allocate(part: Any) -> None:
    """Gives weights without state the one that torch's AdamW would make in its first step."""
    inner = part.optimizer
    for group in inner.param_groups:
        for parameter in group["params"]:
            if not inner.state[parameter]:
                # The fused operator reads the number of steps on the device, the other on the host.
                place = parameter.device if group.get("fused") else "cpu"
                inner.state[parameter] = {
                    "step": torch.zeros((), device=place),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
