"""Converts a model between layouts: one loop over the table of weights, whatever the layouts are.

Every tensor is read in canonical form, cast, and handed to the target's writer, one at a time.
Afterwards the written folder is opened as any other model and compared, tensor by tensor.
"""

import hashlib
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from glm3cli.checkpoint.companions import copy_companions
from glm3cli.checkpoint.hf_writer import bytes_of
from glm3cli.checkpoint.names import Layout, Slot, Weight, slots
from glm3cli.checkpoint.preflight import check_legacy
from glm3cli.checkpoint.progress import PrivateMemory, Progress
from glm3cli.checkpoint.source import StoredSource, open_source
from glm3cli.checkpoint.staging import check_space, check_target, remove_stale, staged
from glm3cli.checkpoint.writers import Plan, write
from glm3cli.config.convert import ConvertOptions
from glm3cli.config.model import DType, ModelConfig
from glm3cli.errors import CheckpointError

_DTYPES: dict[DType, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConvertResult:
    """What a conversion did.

    Attributes:
        bytes: Size of the new folder.
        peak_private_bytes: Highest memory of the process that isn't backed by a file.
        tensors: Number of whole tensors.
        verified: Whether the written tensors were read back and compared.
        non_finite: Number of values that are NaN or infinite.
    """

    source: str
    target: str
    layout: Layout
    bytes: int
    seconds: float
    peak_private_bytes: int
    tensors: int
    verified: bool
    non_finite: int


def convert(source_path: Path, target_path: Path, options: ConvertOptions) -> ConvertResult:
    """Converts the MODEL `source_path` to the new folder `target_path`.

    Raises:
        ConfigError: The target may not be written, or the model can't be cut as asked.
        CheckpointError: The source is damaged or incomplete, the disk is full, or the written
            folder differs.
    """
    start = time.monotonic()
    remove_stale(target_path)
    check_target(target_path, source_path, force=options.force)
    source = open_source(source_path)
    if source.config is None:
        _log.warning(
            "%s has no config.json: its shape comes from the saved arguments, which don't tell the "
            "rotary base; rope_ratio %s is assumed",
            source_path,
            source.model.rope_ratio,
        )
    plan = _plan(source, options)
    total = sum(plan.num_bytes(slot) for slot in plan.dtypes)
    check_space(target_path, total)
    with staged(target_path, force=options.force) as folder:
        work = _Work(source, plan)
        with Progress(total, "converting") as progress:
            work.progress = progress
            write(options.layout, folder, plan, work.produce)
        assert work.digests.keys() == plan.dtypes.keys(), "a source tensor was not used"
        copy_companions(source_path, folder, plan.model)
        if options.verify:
            _verify(folder, target_path, plan, work)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return ConvertResult(
        source=str(source_path),
        target=str(target_path),
        layout=options.layout,
        bytes=size,
        seconds=time.monotonic() - start,
        peak_private_bytes=work.memory.peak,
        tensors=len(work.digests),
        verified=options.verify,
        non_finite=work.non_finite,
    )


def _plan(source: StoredSource, options: ConvertOptions) -> Plan:
    model = source.model
    if options.layout in ("mcore", "legacy"):
        options.parallel.check_fits(model)
    if options.layout == "legacy":
        check_legacy(options.parallel, model)
    cast = None if options.dtype == "keep" else _DTYPES[options.dtype]
    dtypes = {slot: cast or source.dtype(*slot) for slot in slots(model.num_layers)}
    plan = Plan(model, options.parallel, dtypes, options.shard_bytes)
    return Plan(_with_dtype(model, plan.main_dtype), plan.parallel, dtypes, plan.shard_bytes)


def _with_dtype(model: ModelConfig, dtype: torch.dtype) -> ModelConfig:
    name = next(name for name, value in _DTYPES.items() if value is dtype)
    return model.model_copy(update={"torch_dtype": name})


@dataclass
class _Work:
    """The tensors on their way, and what is noted about them."""

    source: StoredSource
    plan: Plan
    progress: Progress | None = None
    digests: dict[Slot, str] = field(default_factory=dict)
    non_finite: int = 0
    memory: PrivateMemory = field(default_factory=PrivateMemory)

    def produce(self, weight: Weight, layer: int | None) -> Tensor:
        """The canonical tensor in the type of the target."""
        slot = weight, layer
        assert slot not in self.digests, f"{weight.logical} {layer} was used before"
        tensor = self.source.read(weight, layer).to(self.plan.dtypes[slot])
        self._count_non_finite(tensor, slot)
        self.digests[slot] = digest(tensor)
        self.memory.sample()
        if self.progress is not None:
            self.progress.advance(tensor.nbytes)
        return tensor

    def _count_non_finite(self, tensor: Tensor, slot: Slot) -> None:
        low, high = torch.aminmax(tensor)  # NaN if any value is; needs no memory
        if torch.isfinite(low) and torch.isfinite(high):
            return
        count = int((~torch.isfinite(tensor)).sum())
        if count:
            self.non_finite += count
            kind = self.plan.model.torch_dtype
            _log.warning("%d values of %s are NaN or infinite in %s", count, _name(slot), kind)


def _name(slot: Slot) -> str:
    return slot[0].logical + ("" if slot[1] is None else f" of layer {slot[1]}")


def digest(tensor: Tensor) -> str:
    """The SHA-256 of a tensor's bytes."""
    return hashlib.sha256(bytes_of(tensor)).hexdigest()


def _verify(folder: Path, target_path: Path, plan: Plan, work: _Work) -> None:
    """Opens the written folder as any other model and compares every tensor.

    Raises:
        CheckpointError: A tensor is missing, or isn't what was to be written.
    """
    written = open_source(folder)
    total = sum(plan.num_bytes(slot) for slot in plan.dtypes)
    with Progress(total, "verifying") as progress:
        for slot, expected in work.digests.items():
            tensor = written.read(*slot)
            if digest(tensor) != expected:
                raise CheckpointError(
                    f"{target_path}: {_name(slot)} reads back differently",
                    "the disk may be failing or full; nothing was kept",
                )
            work.memory.sample()
            progress.advance(tensor.nbytes)
