"""`measure`: the speeds of this device that a plan is made with, as forecast/roofline.py uses them.

Products, attention and passes over memory run at shapes of ChatGLM3-6B, in the type that is trained
in there: bf16, and on the host fp32, of a model that is cut for eight ranks. All ranks measure at
the same time, as they work in a training. A machine may have other work: the best of many short
rounds counts, of each operator by itself.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from glm3cli.config.model import DType, ModelConfig
from glm3cli.device import Device
from glm3cli.device.dtypes import TORCH_DTYPES
from glm3cli.forecast.recorder import recording
from glm3cli.host.environment import number_of
from glm3cli.numerics.case import draw
from glm3cli.numerics.small_model import speck
from glm3cli.numerics.training_cases import SCALE, SHAPE, WIDTH, heads_at
from glm3cli.parallel.groups import Grid

_ROUNDS = 8
_SMALL, _LARGE = 8, 2**22  # fp32 numbers of a rank's message


@dataclass(frozen=True)
class Speeds:
    """What was measured, on the slowest rank.

    Attributes:
        matrix: Operations of matrix products, in operations/s.
        attention: Operations of causal attention, in operations/s.
        memory: Bytes that passes over activations read and write, in bytes/s.
        launch: Seconds of an operator that has next to nothing to do.
        latency: Seconds of a message that has next to nothing; 0 with one rank.
        link: Bandwidth between two ranks, in bytes/s one way; 0 with one rank.
        server: What a rank sends to all others of its server, in bytes/s; 0 with one rank.
        network: What a rank sends to all others of all servers, in bytes/s; 0 with one server.
    """

    matrix: float
    attention: float
    memory: float
    launch: float
    latency: float = 0.0
    link: float = 0.0
    server: float = 0.0
    network: float = 0.0

    @classmethod
    def slowest(cls, ranks: list[dict[str, float]]) -> "Speeds":
        """Returns the speeds of the slowest of some ranks, whose `to_dict` are given."""
        times = {"launch", "latency"}
        return cls(
            **{
                one.name: (max if one.name in times else min)(rank[one.name] for rank in ranks)
                for one in fields(cls)
            }
        )

    def to_dict(self) -> dict[str, float]:
        """Returns the numbers by their names."""
        return asdict(self)


def trained_type(device: Device) -> DType:
    """Returns the type that speeds are measured in."""
    return "fp32" if _is_host(device) else "bf16"


def measure(device: Device, grid: Grid) -> Speeds:
    """Measures this rank's device and its links; all ranks must call it.

    Args:
        device: The active device.
        grid: This rank's place; all ranks are data parallel.
    """
    device.tune_memory_for_training()
    network = _network(device) if grid.world_size > 1 else {}
    return Speeds(
        matrix=_matrix(device),
        attention=_attention(device),
        memory=_memory(device),
        launch=_launch(device, grid),
        **network,
    )


def _is_host(device: Device) -> bool:
    return device.torch_device().type == "cpu"


def _seconds(device: Device, run: Callable[[], object], times: int = 1) -> float:
    """Returns the seconds of a call, in the best of some rounds of several calls."""
    run()
    device.synchronize()
    found = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        for _ in range(times):
            run()
        device.synchronize()
        found.append((time.perf_counter() - started) / times)
    return min(found)


def _numbers(device: Device, *shape: int) -> Tensor:
    """Returns numbers on the device, of which the first few thousand come again and again."""
    some = draw(4099).to(device.torch_device(), TORCH_DTYPES[trained_type(device)])
    count = torch.Size(shape).numel()
    return some.repeat(-(-count // 4099))[:count].view(shape)


def _matrix(device: Device) -> float:
    """Measures the products of all linear layers, forward and backward, in operations/s."""
    tokens, tp = (128, 8) if _is_host(device) else (8192, 1)
    h, ffn = SHAPE.hidden_size, SHAPE.ffn_hidden_size // tp
    heads, groups = heads_at(tp)
    shapes = [(h, (heads + 2 * groups) * WIDTH), (heads * WIDTH, h), (h, 2 * ffn), (ffn, h)]
    parts = [
        (_numbers(device, tokens, rows), _numbers(device, columns, rows),
         _numbers(device, tokens, columns))
        for rows, columns in shapes
    ]  # fmt: skip

    products = [
        product
        for inputs, weight, grads in parts
        for product in ((inputs, weight.t()), (grads, weight), (grads.t(), inputs))
    ]
    seconds = sum(_seconds(device, partial(torch.mm, *product)) for product in products)
    operations = sum(3 * 2.0 * tokens * rows * columns for rows, columns in shapes)
    return operations / seconds


def _attention(device: Device) -> float:
    """Measures causal attention, forward and backward, in operations/s."""
    length, rows, tp = (256, 2, 4) if _is_host(device) else (8192, 1, 1)
    heads, groups = heads_at(tp)
    query = _numbers(device, length, rows, heads, WIDTH).requires_grad_()
    key, value = (_numbers(device, length, rows, groups, WIDTH).requires_grad_() for _ in range(2))
    grad = _numbers(device, length, rows, heads, WIDTH)

    def run() -> None:
        context = device.kernels.attention(query, key, value, SCALE, None)
        torch.autograd.backward(context, grad)

    # Two products forward and five backward, of half of all pairs (device/operations.py).
    pairs = rows * heads * length * length / 2
    return 7 * 2.0 * pairs * WIDTH / _seconds(device, run)


def _memory(device: Device) -> float:
    """Measures passes over activations like those of a layer, in bytes/s."""
    shape = (512, 2 * SHAPE.ffn_hidden_size // 8) if _is_host(device) else (8192, 27392)
    wide, other = _numbers(device, *shape), _numbers(device, *shape)

    # Ten tensors are read or written: three, two, three, and two.
    passes: list[Callable[[], Tensor]] = [
        lambda: torch.add(wide, other),
        lambda: torch.nn.functional.silu(wide),
        lambda: wide.add_(other, alpha=1e-9),
        lambda: wide.mul(0.5),
    ]
    seconds = sum(_seconds(device, one) for one in passes)
    return 10 * wide.numel() * wide.element_size() / seconds


def _launch(device: Device, grid: Grid) -> float:
    """Measures the mean seconds of an operator of a model that has next to nothing to compute."""
    step = speck(ModelConfig(**{**SHAPE.model_dump(), **_SPECK}), grid)
    seconds = _seconds(device, step)
    with recording() as operators:
        step()
    return seconds / len(operators)


_SPECK = {
    "num_layers": 4,
    "hidden_size": 16,
    "ffn_hidden_size": 16,
    "num_attention_heads": 8,
    "kv_channels": 4,
    "padded_vocab_size": 64,
    "seq_length": 8,
}


def _network(device: Device) -> dict[str, float]:
    """Measures messages of two ranks, of a server, and of all servers."""
    world, rank = dist.get_world_size(), dist.get_rank()
    local = number_of("LOCAL_WORLD_SIZE", world)
    pairs = [list(range(first, min(first + 2, world))) for first in range(0, world, 2)]
    servers = [list(range(first, first + local)) for first in range(0, world, local)]
    found = {}
    for name, groups in {"link": pairs, "server": servers}.items():
        handles = [dist.new_group(ranks) for ranks in groups]
        mine = next(i for i, ranks in enumerate(groups) if rank in ranks)
        found[name] = _exchange(device, handles[mine], len(groups[mine]))
    latency, server = found["server"]
    # A rank that is left over has no pair.
    speeds = {"latency": latency, "link": found["link"][1] or server, "server": server}
    if local < world:
        speeds["network"] = _exchange(device, dist.group.WORLD, world)[1]
    return speeds


def _exchange(device: Device, group: Any, count: int) -> tuple[float, float]:
    """Returns the seconds of a small gathering, and the bytes/s that a rank sends."""
    if count == 1:
        return 0.0, 0.0
    found = []
    for size, times in ((_SMALL, 20), (_LARGE, 2)):
        mine = torch.zeros(size, device=device.torch_device())
        whole = torch.empty(count * size, device=device.torch_device())

        def run(mine: Tensor = mine, whole: Tensor = whole) -> None:
            dist.all_gather_into_tensor(whole, mine, group=group)

        found.append(_seconds(device, run, times))
    small, large = found
    return small, (count - 1) * _LARGE * 4 / max(large - small, 1e-9)
