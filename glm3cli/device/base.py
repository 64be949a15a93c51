"""`Device`: what the rest of the program may ask of a chip, and `select`, which finds it.

Call `activate()` before the first import of megatron; `require_active()` guards that order.
"""

import os
import sys
from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from glm3cli.errors import DeviceError

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
    """

    name: ClassVar[str]
    backend: ClassVar[str]
    stream_ordered: ClassVar[bool] = True
    fuses_gradient_accumulation: ClassVar[bool] = False
    fuses_adamw: ClassVar[bool] = False

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
        self._prepare()
        _active = self

    @abstractmethod
    def _prepare(self) -> None:
        """Imports and patches what the chip needs."""

    def torch_device(self) -> torch.device:
        """The device of this process's tensors; LOCAL_RANK picks the card."""
        return torch.device(self.name, int(os.environ.get("LOCAL_RANK", "0")))

    def keep_freed_memory(self) -> None:  # noqa: B027 - most allocators do
        """Lets the allocator keep what training frees, which asks for the same every step."""

    @abstractmethod
    def synchronize(self) -> None:
        """Waits until all queued work is done, so that a clock reads real time."""

    @abstractmethod
    def peak_memory(self) -> int:
        """Peak bytes allocated by this process on the device since its start."""


def require_active() -> Device:
    """The active device.

    Raises:
        DeviceError: `activate()` has not been called.
    """
    if _active is None:
        raise DeviceError("no device is active", "call device.select(...).activate() first")
    return _active
