"""Optimizer state for checkpoints, the same whether data parallel ranks share it out or not.

Of every weight there are its fp32 copy, `param`, and AdamW's `exp_avg` and `exp_avg_sq`, each in
the weight's shape and cut as the weight is. So any optimizer at any layout reads them.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

_PREFIX = "optimizer.state"


def common_state(optimizer: Any) -> dict[str, Any]:
    """What all ranks have alike: AdamW's number of steps, and fp16's loss scale."""
    part = _only(optimizer)
    steps = [int(state["step"]) for state in part.optimizer.state.values() if "step" in state]
    return {
        "step": max(steps, default=0),
        "grad_scaler": part.grad_scaler.state_dict() if part.config.fp16 else None,
    }


def sharded_moments(
    optimizer: Any, weights: dict[str, Any], metadata: dict[str, Any], *, is_loading: bool
) -> dict[int, Any]:
    """The state of this rank's weights as megatron-core's sharded tensors, by position.

    Args:
        optimizer: Either kind of megatron-core's.
        weights: The sharded state dict of the model.
        metadata: As for the model's.
        is_loading: Whether the values are about to be replaced.
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
    """Puts what was read for `sharded_moments` and `common_state` into the optimizer."""
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
    """The one optimizer of the chain that megatron-core makes."""
    [part] = getattr(optimizer, "chained_optimizers", [optimizer])
    return part


def _like(weight: Any, name: str, tensor: Tensor) -> Any:
    """`tensor` cut as `weight`, a sharded tensor or a factory of them."""
    values: dict[str, Any] = {"key": f"{_PREFIX}.{name}.{weight.key}", "data": tensor}
    if not isinstance(weight, ShardedTensorFactory):
        values["dtype"] = tensor.dtype
    return replace(weight, **values)


def _replicated(part: Any) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Every weight of the model, and its state by name, where each rank holds all of it."""
    for weight, main in _pairs(part):
        state = part.optimizer.state[main]
        names = ("exp_avg", "exp_avg_sq")
        yield weight, {"param": main.data, **{name: state[name] for name in names}}


def _pairs(part: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Every weight with what the optimizer updates: itself, or its fp32 copy."""
    if not hasattr(part, "float16_groups"):
        for group in part.optimizer.param_groups:
            yield from ((weight, weight) for weight in group["params"])
        return
    for weights, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
        yield from zip(weights, mains, strict=True)
    for weights in part.fp32_from_fp32_groups:
        yield from ((weight, weight) for weight in weights)


def _allocate(part: Any) -> None:
    """Gives torch's AdamW the state that it would make in its first step, where it has none yet."""
    inner = part.optimizer
    for group in inner.param_groups:
        for parameter in group["params"]:
            if not inner.state[parameter]:
                inner.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
