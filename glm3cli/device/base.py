"""`Device`: what the rest of the program may ask of a chip, and which device is active.

Call `activate()` before the first import of megatron. Whoever needs the device takes it from
`require_active()`, which fails if that was forgotten.
"""

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from glm3cli.device import peaks
from glm3cli.device.catalog import Chip
from glm3cli.device.choice import saved_without, without
from glm3cli.device.kernels import Kernels, SavedForBackward
from glm3cli.errors import DeviceError
from glm3cli.host.environment import number_of

_RELATED = ("GLM3_START_TIMEOUT", "OMP_NUM_THREADS")
_active: "Device | None" = None
# Computes on tensors that stay where they are, and returns one.
Work = Callable[[], torch.Tensor]


class Graphs:
    """Steps that a device has captured as graphs, to replay them without the host's part.

    All of them share the memory for what they compute.
    """

    def __init__(self, runtime: Any, graph: Callable[[], Any], device: torch.device) -> None:
        """Makes an empty collection.

        Args:
            runtime: `torch.cuda`, or what another chip has in its place.
            graph: The class of the runtime's graphs.
            device: The device of the steps.
        """
        self._runtime, self._graph, self._device = runtime, graph, device
        self._pool = runtime.graph_pool_handle()

    def capture(self, step: Work) -> Work:
        """Captures a step, and returns what replays it.

        The step runs once before, so that whatever is made at a first call is there. Its result is
        the same tensor each time, which holds until this or another step of the collection runs.

        Args:
            step: The step, whose shapes and numbers on the host never change.

        Raises:
            DeviceError: It does what can't be captured, or the memory is full.
        """
        runtime, graph = self._runtime, self._graph()
        try:
            with runtime.device(self._device):
                aside = runtime.Stream()
                aside.wait_stream(runtime.current_stream())
                with runtime.stream(aside):
                    step()
                runtime.current_stream().wait_stream(aside)
                # What other threads do, such as those that watch over collectives, may go on.
                with runtime.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    result = step()
        except RuntimeError as error:
            # What ends a capture that has failed raises another error after the first one.
            reason = str(error.__context__ or error).splitlines()[0]
            raise DeviceError(
                f"the device can't capture what decodes a token: {reason}",
                "--without-kernel decode-graph launches its operations one by one",
            ) from error

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay


class Device(ABC):
    """One kind of chip, as this process uses it.

    Attributes:
        name: The name that `--device` takes, which is torch's device type, too.
        backend: The collective backend of torch.distributed.
        stream_ordered: Whether memory that is freed is reused only after the work that was queued
            before. On a device without streams, a send that is still under way would read what is
            written there next.
        synchronizes_messages: Whether the host waits for the whole device after each batch of
            messages between pipeline stages, as megatron-core does against a race of NCCL's.
        fuses_gradient_accumulation: Whether a kernel adds a weight's gradient to megatron-core's
            `main_grad` while computing it.
        kernels_class: The class of the chip's kernels.
        fuses_adamw: Whether torch's fused AdamW exists for this chip, and is used.
        captures_steps: Whether the steps of decoding are captured as graphs.
        saved_for_backward: What the kernels save for the backward pass.
        kernels: The kernels that compute the parts of a layer: the chip's own, or plain torch.
        without_kernels: The operations that plain torch computes because a user wants it.
        remarks: Sentences about this chip that a user should know, which the log shows.
        environment: Environment variables that `activate` sets unless the user has set them.
        related: Prefixes of further variables that change what the chip and its network do; the
            log shows those that are set.
    """

    name: ClassVar[str]
    backend: ClassVar[str]
    stream_ordered: ClassVar[bool] = True
    synchronizes_messages: ClassVar[bool] = True
    fuses_gradient_accumulation: ClassVar[bool] = False
    kernels_class: ClassVar[type[Kernels]] = Kernels
    fuses_adamw: bool = False
    captures_steps: bool = False
    saved_for_backward: SavedForBackward = Kernels.saved_for_backward
    environment: ClassVar[Mapping[str, str]] = {}
    related: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self.remarks: tuple[str, ...] = ()
        self.leave_out(())

    def activate(self, without_kernels: Collection[str] = ()) -> None:
        """Prepares torch and megatron-core for this chip; a second call changes the kernels alone.

        Args:
            without_kernels: The operations that are computed in plain torch.

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
            self.leave_out(without_kernels)
            return
        if any(name.split(".")[0] == "megatron" for name in sys.modules):
            raise DeviceError(
                "megatron was imported before the device was activated",
                "call device.select(...).activate() before importing any part of the model",
            )
        self.leave_out(without_kernels)
        self._ours = {name for name in self.environment if name not in os.environ}
        os.environ.update({name: self.environment[name] for name in self._ours})
        self._prepare()
        _active = self

    @classmethod
    def described(cls, num_local_ranks: int) -> Chip:
        """Returns the description to plan with for the device that is here.

        The device needn't be active, and isn't afterwards.

        Args:
            num_local_ranks: Number of ranks on this machine.

        Raises:
            DeviceError: There is none, or glm3 has no description of it.
        """
        raise DeviceError(
            f"--device {cls.name}: the speed and the memory of the device aren't known",
            "measure it (glm3 doctor --numerics --chip-file mine.toml), and give --chip mine.toml",
        )

    def leave_out(self, names: Collection[str]) -> None:
        """Uses plain torch for the named operations, and the chip's kernels for all others."""
        self.without_kernels = tuple(dict.fromkeys(names))
        self.kernels = without(self.kernels_class(), names)
        self.saved_for_backward = saved_without(type(self).saved_for_backward, names)
        self.fuses_adamw = type(self).fuses_adamw and "adamw" not in names
        self.captures_steps = type(self).captures_steps and "decode-graph" not in names

    @abstractmethod
    def _prepare(self) -> None:
        """Imports and patches what the chip needs; called once, by `activate`.

        Raises:
            DeviceError: The chip isn't usable here.
        """

    def settings(self) -> dict[str, str]:
        """Returns the variables that matter to the chip, each as `VALUE (given)`.

        Instead of `given` it says `default of glm3` where `activate` has set the variable.
        """
        names = {name for name in os.environ if name.startswith((*_RELATED, *self.related))}
        return {
            name: f"{os.environ[name]} ({'default of glm3' if name in self._ours else 'given'})"
            for name in sorted({*self.environment, *names})
            if name in os.environ
        }

    def torch_device(self) -> torch.device:
        """Returns the device of this process's tensors; LOCAL_RANK picks the card."""
        return torch.device(self.name, number_of("LOCAL_RANK", 0))

    def make_deterministic(self) -> None:
        """Makes the same work give the same bits in every run, at the price of some speed."""
        torch.use_deterministic_algorithms(True)

    def tune_memory_for_training(self) -> None:  # noqa: B027 - most allocators do
        """Has freed memory kept, since every step asks for the same again."""

    def tune_memory_for_serving(self) -> None:  # noqa: B027 - caching allocators reuse theirs
        """Has freed memory returned, since no two steps ask for the same."""

    def new_graphs(self) -> Graphs:
        """Returns an empty collection of graphs; only where `captures_steps` is set.

        Raises:
            DeviceError: The device has no graphs.
        """
        raise DeviceError(f"--device {self.name}: the device has no graphs", "don't capture steps")

    def upload(self, numbers: Sequence[Sequence[int]], target: torch.Tensor) -> None:
        """Copies whole numbers of the host into a tensor, after the work that is queued."""
        target.copy_(torch.tensor(numbers))

    @abstractmethod
    def synchronize(self) -> None:
        """Waits until the device has done all queued work, so that a clock reads real time."""

    @abstractmethod
    def peak_memory(self) -> int:
        """Returns the most bytes that this process has had on the device since its start."""

    @abstractmethod
    def memory(self) -> int:
        """Returns the memory of the device that this process may fill, in bytes."""

    def memory_of_groups(self, count: int) -> int:
        """Returns the bytes that the network's library takes of a device's memory.

        Args:
            count: The number of process groups that exchange anything.
        """
        return 0

    def memory_left(self, num_groups: int) -> int:
        """Returns the memory of the device that so many process groups leave to fill, in bytes."""
        return self.memory() - self.memory_of_groups(num_groups)

    @abstractmethod
    def chip(self) -> str:
        """Returns the name that the driver has for the chip, such as NVIDIA A100-SXM4-80GB."""

    def peak_tflops(self, dtype: str) -> float | None:
        """Returns the chip's peak TFLOP/s in `bf16`, `fp16` or `fp32`; None if it isn't known."""
        return peaks.peak_tflops(self.chip(), dtype)

    def profiler(self) -> Any:
        """Returns a torch profiler of the host and the chip, which isn't started yet."""
        return torch.profiler.profile()


def upload_pinned(numbers: Sequence[Sequence[int]], target: torch.Tensor) -> None:
    """Does what `Device.upload` does, on devices that copy from pinned memory by themselves.

    torch gives the memory to nobody else before the copy is done.
    """
    target.copy_(torch.tensor(numbers, pin_memory=True), non_blocking=True)


@contextmanager
def standing_in(device: Device) -> Iterator[None]:
    """Within the block `device` is the active one.

    Nothing is prepared for it: it must work with what the really active device has prepared.

    Raises:
        DeviceError: No device is active.
    """
    global _active
    before, _active = require_active(), device
    try:
        yield
    finally:
        _active = before


def require_active() -> Device:
    """Returns the active device.

    Raises:
        DeviceError: `activate()` has not been called.
    """
    if _active is None:
        raise DeviceError("no device is active", "call device.select(...).activate() first")
    return _active
