"""Converts a model between layouts: one loop over the table of weights, whatever the layouts are.

Every tensor is read in canonical form, cast, and handed to the target's writer, one at a time. The
files are hashed close behind the writer, while they are in the page cache. Afterwards the written
folder is opened as any other model and compared, tensor by tensor, and a manifest is added (see
`manifest`).
"""

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from glm3cli.checkpoint.companions import copy_companions
from glm3cli.checkpoint.digests import (
    Follower,
    digest,
    file_digest,
    slot_name,
    tensor_digests,
)
from glm3cli.checkpoint.lora import Adapter, open_adapter
from glm3cli.checkpoint.manifest import FileEntry, Manifest, versions
from glm3cli.checkpoint.names import Layout, Slot, Weight, slots
from glm3cli.checkpoint.needs import Needs, check_needs, needs_of
from glm3cli.checkpoint.pace import ReadAhead
from glm3cli.checkpoint.preflight import check_legacy
from glm3cli.checkpoint.progress import PrivateMemory, Progress
from glm3cli.checkpoint.source import StoredSource, open_source
from glm3cli.checkpoint.staging import check_target, remove_stale, staged, sync
from glm3cli.checkpoint.writers import Final, Plan, write
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
        merged: Number of tensors that an adapter was merged into.
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
    merged: int


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
    adapter = open_adapter(options.lora, plan.model) if options.lora else Adapter({})
    check_needs(target_path, _needs(source, plan, adapter))
    with staged(target_path, force=options.force) as folder:
        work = _Work(source, plan, adapter)
        with Follower() as follower, ThreadPoolExecutor(1) as disk:
            work.write(options.layout, folder, follower.note if options.verify else _ignore)
            copy_companions(source_path, folder, plan.model, options.layout)
            syncing = disk.submit(sync, folder)  # while all is read back
            hashed = _verify(folder, target_path, plan, work, follower) if options.verify else {}
            syncing.result()
        _manifest(folder, source, plan, work, options, source_path, hashed).write(folder)
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
        merged=len(adapter.pairs),
    )


def _ignore(_path: Path, _end: int) -> None:
    pass


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


def _needs(source: StoredSource, plan: Plan, adapter: Adapter) -> Needs:
    largest = 0
    for slot, dtype in plan.dtypes.items():
        on_the_way = torch.float32 if slot in adapter.pairs else source.dtype(*slot)
        width = max(on_the_way.itemsize, dtype.itemsize)
        largest = max(largest, torch.Size(slot[0].shape(plan.model)).numel() * width)
    return needs_of(plan.total_bytes, largest)


def _with_dtype(model: ModelConfig, dtype: torch.dtype) -> ModelConfig:
    name = next(name for name, value in _DTYPES.items() if value is dtype)
    return model.model_copy(update={"torch_dtype": name})


@dataclass(frozen=True)
class _Prepared:
    """A canonical tensor in the type of the target, and what is noted about it."""

    tensor: Tensor
    digest: str
    non_finite: int


class _Work:
    """The tensors on their way; while one is written, a second thread prepares the next.

    Attributes:
        digests: The digest of every tensor that was made.
        non_finite: Number of values that are NaN or infinite.
    """

    def __init__(self, source: StoredSource, plan: Plan, adapter: Adapter) -> None:
        self._source, self._plan, self._adapter = source, plan, adapter
        self.digests: dict[Slot, str] = {}
        self.non_finite = 0
        self.memory = PrivateMemory()
        self._order = slots(plan.model.num_layers)
        self._ahead = ReadAhead(source.reading_order())
        self._pool = ThreadPoolExecutor(1)
        self._coming: tuple[Slot, Future[_Prepared]] | None = None

    def write(self, layout: Layout, folder: Path, final: Final) -> None:
        """Writes all tensors."""
        try:
            with Progress(self._plan.total_bytes, "converting") as self._progress:
                self._prepare_next()
                write(layout, folder, self._plan, self._produce, final)
            assert self._coming is None, "a source tensor was not used"
        finally:
            self._pool.shutdown(cancel_futures=True)

    def _produce(self, weight: Weight, layer: int | None) -> Tensor:
        assert self._coming is not None, "there are no more tensors"
        slot, coming = self._coming
        assert slot == (weight, layer), f"{_name(slot)} was to be asked for"
        prepared = coming.result()
        self._prepare_next()
        self.digests[slot] = prepared.digest
        if prepared.non_finite:
            self.non_finite += prepared.non_finite
            kind = self._plan.model.torch_dtype
            count = prepared.non_finite
            _log.warning("%d values of %s are NaN or infinite in %s", count, _name(slot), kind)
        self.memory.sample()
        self._progress.advance(prepared.tensor.nbytes)
        return prepared.tensor

    def _prepare_next(self) -> None:
        slot = next(self._order, None)
        self._coming = None if slot is None else (slot, self._pool.submit(self._prepare, slot))

    def _prepare(self, slot: Slot) -> _Prepared:
        tensor = self._source.read(*slot)
        self._ahead.advance(tensor.nbytes)
        tensor = self._adapter.merge(*slot, tensor)
        tensor = tensor.to(self._plan.dtypes[slot])
        return _Prepared(tensor, digest(tensor), _count_non_finite(tensor))


def _count_non_finite(tensor: Tensor) -> int:
    low, high = torch.aminmax(tensor)  # NaN if any value is; needs no memory
    if torch.isfinite(low) and torch.isfinite(high):
        return 0
    return int((~torch.isfinite(tensor)).sum())


def _name(slot: Slot) -> str:
    return slot[0].logical + ("" if slot[1] is None else f" of layer {slot[1]}")


def _verify(
    folder: Path, target_path: Path, plan: Plan, work: _Work, follower: Follower
) -> dict[Path, str]:
    """Opens the written folder as any other model and compares every tensor.

    Returns:
        The SHA-256 of the files of weights, as they were read back.

    Raises:
        CheckpointError: A tensor is missing, or isn't what was to be written.
    """
    written = open_source(folder)
    hashed = follower.finish(written.files())
    with Progress(plan.total_bytes, "verifying") as progress:
        for slot, value, num_bytes in tensor_digests(written):
            if value != work.digests[slot]:
                raise CheckpointError(
                    f"{target_path}: {_name(slot)} reads back differently",
                    "the disk may be failing or full; nothing was kept",
                )
            work.memory.sample()
            progress.advance(num_bytes)
    return hashed.result()


def _manifest(
    folder: Path,
    source: StoredSource,
    plan: Plan,
    work: _Work,
    options: ConvertOptions,
    source_path: Path,
    hashed: dict[Path, str],
) -> Manifest:
    """What is noted of the finished `folder`; `hashed` are the digests of its weights' files."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        value = hashed.get(path) or file_digest(path) if options.verify else None
        files[path.relative_to(folder).as_posix()] = FileEntry(path.stat().st_size, value)
    parallel = options.parallel
    return Manifest(
        source={
            "path": str(source_path.absolute()),
            "layout": source.layout,
            "iteration": source.iteration,
        },
        settings={
            "layout": options.layout,
            "tp": parallel.tp,
            "pp": parallel.pp,
            "vpp": parallel.vpp,
            "layers_per_stage": parallel.layers_per_stage,
            "dtype": options.dtype,
            "lora": str(options.lora.absolute()) if options.lora else None,
        },
        versions=versions(),
        verified=options.verify,
        non_finite=work.non_finite,
        files=files,
        tensors={slot_name(slot): work.digests[slot] for slot in plan.dtypes},
    )
