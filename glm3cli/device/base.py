"""`Device`: what the rest of the program may ask of a chip, and `select`, which finds it.

Call `activate()` before the first import of megatron; `require_active()` guards that order.
"""

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from glm3cli.device import peaks
from glm3cli.device.kernels import Kernels, SavedForBackward
from glm3cli.errors import DeviceError

_RELATED = ("GLM3_START_TIMEOUT", "OMP_NUM_THREADS")
_active: "Device | None" = None


class Device(ABC):
    """One kind of chip.

    Attributes:
        name: As in `--device`, and torch's device type.
        backend: torch.distributed's collective backend.
        stream_ordered: Whether memory that is freed waits for the work queued before. Without
            streams, a send that is still under way would read what comes there next.
        fuses_gradient_accumulation: Whether there is a kernel that adds a weight's gradient to
            megatron-core's `main_grad` where it is computed.
        fuses_adamw: Whether torch has its fused AdamW for this chip.
        saved_for_backward: What its kernels keep for the backward pass.
        kernels: What computes the parts of a layer.
        remarks: What a user should know of this chip here, as sentences.
        environment: Variables that are set unless the user has set them.
        related: How further variables begin that change what the chip and its network do.
    """

    name: ClassVar[str]
    backend: ClassVar[str]
    stream_ordered: ClassVar[bool] = True
    fuses_gradient_accumulation: ClassVar[bool] = False
    fuses_adamw: ClassVar[bool] = False
    saved_for_backward: ClassVar[SavedForBackward] = Kernels.saved_for_backward
    environment: ClassVar[Mapping[str, str]] = {}
    related: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self.kernels = Kernels()
        self.remarks: tuple[str, ...] = ()

    def activate(self) -> None:
        """Prepares torch and megatron-core for this chip; a second call does nothing.

        Raises:
            DeviceError: The chip isn't usable here, or another one is active.
        """
        global _active
        if _active is not None:
            if _active.name != self.name:
                raise DeviceError(
                    f"--device {self.name}: this process already runs on {_active.name}",
                    "start a new process",
                )
            return
        if any(name.split(".")[0] == "megatron" for name in sys.modules):
            raise DeviceError(
                "megatron was imported before the device was activated",
                "call device.select(...).activate() before importing any part of the model",
            )
        self._ours = {name for name in self.environment if name not in os.environ}
        os.environ.update({name: self.environment[name] for name in self._ours})
        self._prepare()
        _active = self

    @abstractmethod
    def _prepare(self) -> None:
        """Imports and patches what the chip needs."""

    def settings(self) -> dict[str, str]:
        """The variables that matter to the chip, with their values and where these come from."""
        names = {name for name in os.environ if name.startswith((*_RELATED, *self.related))}
        return {
            name: f"{os.environ[name]} ({'default of glm3' if name in self._ours else 'given'})"
            for name in sorted({*self.environment, *names})
            if name in os.environ
        }

    def torch_device(self) -> torch.device:
        """The device of this process's tensors; LOCAL_RANK picks the card."""
        return torch.device(self.name, int(os.environ.get("LOCAL_RANK", "0")))

    def make_deterministic(self) -> None:
        """Lets the same work give the same bits in every run, at the price of some speed."""
        torch.use_deterministic_algorithms(True)

    def keep_freed_memory(self) -> None:  # noqa: B027 - most allocators do
        """Lets the allocator keep what training frees, which asks for the same every step."""

    @abstractmethod
    def synchronize(self) -> None:
        """Waits until all queued work is done, so that a clock reads real time."""

    @abstractmethod
    def peak_memory(self) -> int:
        """Peak bytes allocated by this process on the device since its start."""

    @abstractmethod
    def memory(self) -> int:
        """Bytes of the device that this process may fill."""

    @abstractmethod
    def chip(self) -> str:
        """What the driver calls the chip, e.g. NVIDIA A100-SXM4-80GB."""

    def peak_tflops(self, dtype: str) -> float | None:
        """Peak TFLOP/s of the chip, or None where it isn't known."""
        return peaks.peak_tflops(self.chip(), dtype)

    def profiler(self) -> Any:
        """A torch profiler of the host and the chip, not yet started."""
        return torch.profiler.profile()


@contextmanager
def standing_in(device: Device) -> Iterator[None]:
    """Lets `device` be the active one for a while, on the preparations of the one that is."""
    global _active
    before, _active = require_active(), device
    try:
        yield
    finally:
        _active = before


def require_active() -> Device:
    """The active device.

    Raises:
        DeviceError: `activate()` has not been called.
    """
    if _active is None:
        raise DeviceError("no device is active", "call device.select(...).activate() first")
    return _active
