"""Converts a model from any layout to any other, one tensor at a time.

Every tensor is read in its canonical form, cast, and handed to the writer of the new layout. The
files are hashed, and the tensors read back, close behind the writer, while they are in the page
cache. Then the whole new folder is verified (see `verify`), and a manifest is added (see
`files/manifest`).
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from glm3cli.checkpoint.adapter.pairs import Adapter
from glm3cli.checkpoint.adapter.reader import open_adapter
from glm3cli.checkpoint.convert.needs import Needs, check_needs, needs_of
from glm3cli.checkpoint.convert.preflight import check_legacy
from glm3cli.checkpoint.convert.read_back import ReadBack
from glm3cli.checkpoint.convert.report import Report, report_nothing
from glm3cli.checkpoint.convert.target import check_target
from glm3cli.checkpoint.convert.tensor_digests import slot_name
from glm3cli.checkpoint.convert.transfer import Transfer
from glm3cli.checkpoint.convert.verify import Verification, loaded_bytes, verify
from glm3cli.checkpoint.files.digests import Follower, file_digest
from glm3cli.checkpoint.files.manifest import FileEntry, Manifest, manifest_versions
from glm3cli.checkpoint.files.staging import Flusher, remove_stale, staged
from glm3cli.checkpoint.layouts.companions import copy_companions, tokenizer_file
from glm3cli.checkpoint.layouts.opening import open_source
from glm3cli.checkpoint.layouts.write_plan import Final, WritePlan
from glm3cli.checkpoint.locate import locate_adapter
from glm3cli.checkpoint.names import Layout, slots
from glm3cli.checkpoint.source import StoredSource
from glm3cli.config.convert import ConvertOptions
from glm3cli.config.model import ModelConfig
from glm3cli.device.dtypes import TORCH_DTYPES, dtype_name
from glm3cli.host.files import sync
from glm3cli.host.signals import started_pool

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConvertResult:
    """The result of a conversion; `--json` prints these fields.

    Attributes:
        source: The model that was converted.
        target: The new folder.
        layout: The layout of the new folder.
        bytes: The size of the new folder, in bytes.
        seconds: The wall time of the conversion, in seconds.
        peak_private_bytes: The highest memory of the process that isn't backed by a file, in bytes.
        tensors: The number of whole tensors.
        verified: Whether the written tensors were read back and compared.
        non_finite: The number of values that are NaN or infinite.
        merged: The number of tensors that an adapter was merged into.
        logits_difference: The largest absolute difference to the source's logits (with the adapter)
            on a fixed prompt; None if it wasn't computed, because the model is large or nothing was
            verified.
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
    logits_difference: float | None


def convert(
    source_path: Path,
    target_path: Path,
    options: ConvertOptions,
    report: Report = report_nothing,
) -> ConvertResult:
    """Converts a model.

    Args:
        source_path: The model, in any layout.
        target_path: The new folder.
        options: The new layout and how to write it.
        report: Called with the progress, as "converting" and "verifying".

    Raises:
        ConfigError: The target may not be written, the model can't be cut as asked, or the disk or
            the memory is too small.
        CheckpointError: The source is damaged or incomplete, the disk is full, or the new folder
            isn't what was to be written.
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
    adapter = _adapter(options, plan.model)
    check_needs(target_path, _needs(source, plan, adapter, options))
    if tokenizer_file(source_path) is None:
        _log.warning(
            "%s has no tokenizer.model or tokenizer.json, so %s can't be used by itself: put the "
            "model's tokenizer files beside its config.json",
            source_path,
            target_path,
        )
    with staged(target_path, force=options.force) as folder:
        copy_companions(source_path, folder, plan.model, options.layout)
        transfer = Transfer(source, plan, adapter, report)
        verified = _write(transfer, folder, target_path, options, report)
        _manifest(folder, transfer, options, source_path, verified.file_digests).write(folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return ConvertResult(
        source=str(source_path),
        target=str(target_path),
        layout=options.layout,
        bytes=size,
        seconds=time.monotonic() - start,
        peak_private_bytes=transfer.memory.peak,
        tensors=len(transfer.digests),
        verified=options.verify,
        non_finite=transfer.non_finite,
        merged=len(adapter.pairs),
        logits_difference=verified.logits_difference,
    )


def _write(
    transfer: Transfer, folder: Path, target: Path, options: ConvertOptions, report: Report
) -> Verification:
    """Writes the weights into a folder that has all other files, and verifies them.

    Args:
        transfer: The transfer of the weights.
        folder: The folder.
        target: The name that it is going to have, for messages.
        options: The layout, and whether it is verified.
        report: Called with the progress of the verification.
    """
    layout, found = options.layout, Verification({}, None)
    read_back = ReadBack(folder, target, transfer)
    with Follower() as follower, Flusher() as flusher, read_back, started_pool() as disk:
        followers = [flusher.note, follower.note] if options.verify else [flusher.note]
        written = read_back.note if options.verify else None
        transfer.write(layout, folder, partial(_note_all, followers), written)
        syncing = disk.submit(sync, folder)  # while the rest is read back
        if options.verify:
            found = verify(layout, folder, target, transfer, follower, read_back, report)
        syncing.result()
    return found


def _adapter(options: ConvertOptions, model: ModelConfig) -> Adapter:
    """Returns the adapter that is to be merged; without --lora, an empty one."""
    if options.lora is None:
        return Adapter({})
    return open_adapter(locate_adapter(options.lora), model)


def _note_all(followers: Sequence[Final], path: Path, end: int) -> None:
    """Calls every follower with a file and the byte before which nothing is going to change."""
    for follow in followers:
        follow(path, end)


def _plan(source: StoredSource, options: ConvertOptions) -> WritePlan:
    """Returns what is to be written, after checking that the model can be cut as asked."""
    model = source.model
    if options.layout in ("mcore", "legacy"):
        options.parallel.check_fits(model)
    if options.layout == "legacy":
        check_legacy(options.parallel, model)
    cast = None if options.dtype == "keep" else TORCH_DTYPES[options.dtype]
    dtypes = {slot: cast or source.dtype(*slot) for slot in slots(model)}
    plan = WritePlan(model, options.parallel, dtypes, options.shard_bytes)
    return WritePlan(_with_dtype(model, plan.main_dtype), plan.parallel, dtypes, plan.shard_bytes)


def _needs(
    source: StoredSource, plan: WritePlan, adapter: Adapter, options: ConvertOptions
) -> Needs:
    """Estimates the disk and the memory that the conversion takes."""
    largest = 0
    for slot, dtype in plan.dtypes.items():
        on_the_way = torch.float32 if slot in adapter.pairs else source.dtype(*slot)
        width = max(on_the_way.itemsize, dtype.itemsize)
        largest = max(largest, torch.Size(slot[0].shape(plan.model)).numel() * width)
    loaded = loaded_bytes(source) if options.verify and options.layout == "glm" else 0
    return needs_of(plan.total_bytes, largest, loaded)


def _with_dtype(model: ModelConfig, dtype: torch.dtype) -> ModelConfig:
    """Returns the model's shape with another type of its weights."""
    return model.model_copy(update={"torch_dtype": dtype_name(dtype)})


def _manifest(
    folder: Path,
    transfer: Transfer,
    options: ConvertOptions,
    source_path: Path,
    hashed: dict[Path, str],
) -> Manifest:
    """Returns the manifest of a finished folder.

    Args:
        folder: The folder, complete but for the manifest.
        transfer: What was written into it.
        options: The options of the conversion.
        source_path: The model that was converted.
        hashed: The SHA-256 of the files of weights.
    """
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        value = hashed.get(path) or file_digest(path) if options.verify else None
        files[path.relative_to(folder).as_posix()] = FileEntry(path.stat().st_size, value)
    source, parallel = transfer.source, options.parallel
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
        versions=manifest_versions(),
        verified=options.verify,
        non_finite=transfer.non_finite,
        files=files,
        tensors={slot_name(slot): transfer.digests[slot] for slot in transfer.plan.dtypes},
    )
