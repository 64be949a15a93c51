"""The CPU as a device, with gloo as collective backend.

Megatron-core assumes CUDA. A table of redirects (`REDIRECTS`) replaces what it calls of CUDA, so
that it runs on a CPU; torch_npu's transfer_to_npu does the same for NPUs. This is how glm3 runs on
a laptop, and how everything is tested.
"""

import ctypes
import functools
import os
import platform
import resource
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch.utils._device import _device_constructors

from glm3cli.device.base import Device, require_active
from glm3cli.device.catalog import Chip, find_chip
from glm3cli.device.cpu_kernels import PRODUCTS, CpuKernels
from glm3cli.device.gloo import EXCHANGES
from glm3cli.device.kernels import Kernels, SavedForBackward
from glm3cli.device.redirects import Redirect, Redirects, compile_nothing
from glm3cli.host.environment import number_of
from glm3cli.host.memory import total_memory

_CPU = torch.device("cpu")


def _here() -> torch.device:
    """Returns the torch device that stands for CUDA: the CPU, or meta in a plan."""
    return require_active().torch_device()


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a tensor factory so that `device="cuda"` means the active device."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if isinstance(device, str) and device.startswith("cuda"):
            kwargs["device"] = _here()
        return factory(*args, **kwargs)

    return make


def _tensor_type(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps Tensor.type so that it names CUDA's types for tensors of any device."""

    @functools.wraps(original)
    def type_of(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, *args, **kwargs)
        return f"torch.cuda.{original(self).rpartition('.')[2]}"

    return type_of


def _stay(_original: Any) -> Callable[..., torch.Tensor]:
    """Replaces a method that would move a tensor by one that returns it as it is."""
    return lambda self, *_args, **_kwargs: self


def _nothing(_original: Any) -> Callable[..., None]:
    """Replaces a function by one that does nothing."""
    return lambda *_args, **_kwargs: None


class _Stream:
    """Stands for a CUDA stream on a device that runs everything at once and in order."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def wait_stream(self, _other: "_Stream") -> None:
        """Returns at once, since nothing is ever queued."""

    def synchronize(self) -> None:
        """Returns at once, since nothing is ever queued."""


def _stream(_original: Any) -> Callable[..., _Stream]:
    """Replaces a function that returns a CUDA stream."""
    return lambda *_args, **_kwargs: _Stream()


def _set_rng_state(_original: Any) -> Callable[..., None]:
    """Replaces the setter of CUDA's random state by that of the CPU."""
    return lambda state, *_args, **_kwargs: torch.set_rng_state(state)


def _get_rng_state(_original: Any) -> Callable[..., torch.Tensor]:
    """Replaces the getter of CUDA's random state by that of the CPU."""
    return lambda *_args, **_kwargs: torch.get_rng_state()


_FACTORIES = {
    "tensor": "optimizer/grad_scaler.py, optimizer/clip_grads.py: tensor(..., device='cuda')",
    "zeros": "pipeline_parallel/schedules.py: the token count",
    "ones": "transformer/utils.py: the default causal mask",
    "empty_like": "dist_checkpointing/exchange_utils.py: receive buffers",
    "empty": "dist_checkpointing/exchange_utils.py: receive buffers",
}
# The order counts: the last rows import megatron, which then binds some of the names of the rows
# before them and decorates functions with torch.compile.
REDIRECTS = (
    *(Redirect("torch", name, _on_cpu, why) for name, why in _FACTORIES.items()),
    *EXCHANGES,
    Redirect("torch", "compile", compile_nothing, "jit.py: the fuser needs a C++ compiler"),
    Redirect("torch.Tensor", "cuda", _stay, "models/common/language_module: weight.data.cuda()"),
    Redirect("torch.Tensor", "type", _tensor_type, "optimizer/optimizer.py: 'torch.cuda.' types"),
    Redirect(
        "torch.cuda",
        "current_device",
        lambda _: _here,
        "everywhere: device=torch.cuda.current_device()",
    ),
    Redirect("torch.cuda", "synchronize", _nothing, "pipeline_parallel/p2p_communication.py"),
    Redirect("torch.cuda", "empty_cache", _nothing, "optimizer/optimizer.py: offload_to_cpu"),
    Redirect("torch.cuda", "Stream", lambda _: _Stream, "distributed/distributed_data_parallel.py"),
    Redirect("torch.cuda", "current_stream", _stream, "distributed/param_and_grad_buffer.py"),
    Redirect("torch.cuda", "default_stream", _stream, "distributed/param_and_grad_buffer.py"),
    Redirect(
        "torch.cuda",
        "stream",
        lambda _: lambda *_args: nullcontext(),
        "distributed/param_and_grad_buffer.py",
    ),
    Redirect("torch.cuda", "manual_seed", lambda _: torch.manual_seed, "tensor_parallel/random.py"),
    Redirect("torch.cuda", "get_rng_state", _get_rng_state, "tensor_parallel/random.py: fork"),
    Redirect("torch.cuda.random", "get_rng_state", _get_rng_state, "tensor_parallel/random.py:55"),
    Redirect(
        "megatron.core.tensor_parallel.random",
        "_set_cuda_rng_state",
        _set_rng_state,
        "tensor_parallel/random.py: queues the call until CUDA is initialised, which never comes",
    ),
    *PRODUCTS,
)


# oneDNN compiles a matrix product for each number of rows, in inference for each number of tokens,
# and keeps the last 1024: 0.6 MB each, half of it in the cache of torch's layer over it (ideep's
# lru_cache). A server meets all numbers. Those of a few tokens are in use all the time, and stay.
_COMPILED = dict.fromkeys(("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"), "256")
# Training uses ten products for each length of a micro-batch, of 2 MB each, since the weights stay
# as they are: more than three lengths would only fill the caches with what isn't used again.
_COMPILED_IN_TRAINING = "32"
# Has torch's allocator (alloc_cpu.cpp) ask for pages of 2 MiB for tensors that fill one. Most Linux
# systems give them to those who ask; from pages of 4 KiB a core reads weights half as fast.
_HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
# malloc.h's M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_MAX.
_KEEP_FREED = {-1: 2**31 - 1, -2: 2**26, -4: 0}
# M_MMAP_THRESHOLD, glibc's first value: as long as nobody sets it, it grows to 32 MiB.
_RETURN_FREED = {-3: 2**17}
# Apex's extension, which megatron-core's linear layers call to add to `main_grad` (layers.py
# 0.16.1).
_APEX = "fused_weight_gradient_mlp_cuda"


def _set_malloc(options: dict[int, int]) -> None:
    """Sets options of glibc's allocator; another libc has its own way."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for option, value in options.items():
            libc.mallopt(option, value)


def _gradient_accumulation() -> ModuleType:
    """Makes a module that stands for Apex's extension."""
    module = ModuleType(_APEX)
    module.wgrad_gemm_accum_fp32 = _accumulate  # type: ignore[attr-defined]
    return module


def _accumulate(inputs: torch.Tensor, grads: torch.Tensor, main_grad: torch.Tensor) -> None:
    """Adds the gradient of a linear layer's weight to `main_grad`.

    Args:
        inputs: The layer's inputs, [n, in].
        grads: The gradients of its outputs, [n, out].
        main_grad: The sum over micro-batches, [out, in].
    """
    if inputs.dtype == main_grad.dtype:
        main_grad.addmm_(grads.t(), inputs)
    else:
        main_grad.add_(grads.t().matmul(inputs))


class CpuDevice(Device):
    """The CPU, the default device, which every machine has."""

    name: ClassVar[str] = "cpu"
    backend: ClassVar[str] = "gloo"
    stream_ordered: ClassVar[bool] = False
    fuses_gradient_accumulation: ClassVar[bool] = True
    kernels_class: ClassVar[type[Kernels]] = CpuKernels
    fuses_adamw: bool = True
    saved_for_backward: SavedForBackward = CpuKernels.saved_for_backward
    environment: ClassVar[Mapping[str, str]] = _COMPILED | _HUGE_PAGES
    related: ClassVar[tuple[str, ...]] = ("GLOO_",)

    def __init__(self) -> None:
        super().__init__()
        self._redirects = Redirects(REDIRECTS)

    @classmethod
    def described(cls, num_local_ranks: int) -> Chip:
        """Returns chips.toml's CPU with a rank's share of this machine's or container's memory."""
        return replace(find_chip("CPU"), memory_gib=total_memory() / num_local_ranks / 2**30)

    def _prepare(self) -> None:
        """Silences advice about GPUs, and applies the redirects.

        Raises:
            DeviceError: A library lacks an attribute that a redirect replaces.
        """
        # Advice about GPUs (Apex, Transformer Engine, launch order) that a CPU has no use for.
        warnings.filterwarnings("ignore", module=r"megatron\.")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        sys.modules.setdefault(_APEX, _gradient_accumulation())
        # When it first meets `with torch.device(...)`, torch notes the factories that this concerns
        # (torch/utils/_device.py). They must be the originals, which the redirects below call.
        _device_constructors()
        self._redirects.apply()

    def torch_device(self) -> torch.device:
        """Returns the CPU, whatever the rank."""
        return _CPU

    def tune_memory_for_training(self) -> None:
        """Tells glibc to keep freed memory, and to map none for a single tensor.

        Each large tensor would otherwise be mapped anew, and its pages zeroed one fault at a time.
        What oneDNN has compiled is kept for fewer lengths than in inference.
        """
        os.environ.update(dict.fromkeys(self._ours & _COMPILED.keys(), _COMPILED_IN_TRAINING))
        _set_malloc(_KEEP_FREED)

    def tune_memory_for_serving(self) -> None:
        """Tells glibc to map each large tensor by itself.

        Between tensors of ever other sizes, and what is compiled for these, the heap would get
        holes that nothing fits in, and grow.
        """
        _set_malloc(_RETURN_FREED)

    def synchronize(self) -> None:
        """Returns at once: the CPU has no queue of work."""

    def peak_memory(self) -> int:
        """Returns the peak of this process's resident memory, in bytes."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def memory(self) -> int:
        """Returns this rank's share of the machine's or its container's memory, in bytes.

        The ranks of the machine (LOCAL_WORLD_SIZE) share it evenly.
        """
        return total_memory() // number_of("LOCAL_WORLD_SIZE", 1)

    def chip(self) -> str:
        """Returns the processor's architecture, since no table of processors has their peaks."""
        return platform.machine()
