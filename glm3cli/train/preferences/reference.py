"""`Reference`: finds out, before a training, what its reference thinks of the answers.

The reference goes through the model of the training, before the weights to start from do, so that
no second model is in memory. Adapters are off meanwhile. What it thinks is kept in a file for each
data set, by the content of the model and of the data. A run that goes on finds it there, and one
that was killed meanwhile goes on with what was kept.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from glm3cli.checkpoint.layouts.opening import open_at
from glm3cli.checkpoint.load import load_weights
from glm3cli.checkpoint.source import WeightSource
from glm3cli.data.prefixes import Blend, data_fingerprint
from glm3cli.data.samples.loader import Batch, Loader
from glm3cli.data.samples.preferences import AnswersOfDocuments, Place, PreferenceDataset
from glm3cli.data.samples.references import References
from glm3cli.errors import DataError, StoppedError
from glm3cli.model.adapters import adapters_off
from glm3cli.model.build import unwrap
from glm3cli.parallel.groups import Grid
from glm3cli.parallel.storage import Storage, find_storage, tell, together
from glm3cli.train.objective import Losses
from glm3cli.train.origin import weights_fingerprint
from glm3cli.train.preferences.answers import sums_of_answers
from glm3cli.train.prepare import Prepared
from glm3cli.train.signals import StopFlag
from glm3cli.train.step import TrainStep

_SECONDS_BETWEEN_NOTES = 30.0


@dataclass
class Reference:
    """What the reference thinks of the answers that a training and its validations read.

    Attributes:
        prepared: The checked training.
        blend: The data sets that the training reads.
        start: Opens the weights that the training starts from.
        stop: The requests to stop.
        say: Shows a line to the user.
    """

    prepared: Prepared
    blend: Blend
    start: Callable[[], WeightSource]
    stop: StopFlag
    say: Callable[[str], None]

    @classmethod
    def of(
        cls,
        prepared: Prepared,
        blend: Blend,
        start: Callable[[], WeightSource],
        stop: StopFlag,
        say: Callable[[str], None],
    ) -> "Reference | None":
        """Returns the reference of a training; None if its method has none."""
        return cls(prepared, blend, start, stop, say) if prepared.config.compares else None

    def provide(self, train_step: TrainStep, reads: Sequence[tuple[Loader, int]]) -> None:
        """Gives the samples the log-probabilities under the reference; every rank must call it.

        What isn't known yet is computed with the model of the train step, whose weights are those
        of the reference afterwards.

        Args:
            train_step: Has the model.
            reads: The loaders of the samples to train and to validate on, with the number of
                samples that the run reads of each.

        Raises:
            CheckpointError: The reference can't be read.
            DataError: The disk is full or failing.
            StoppedError: The run was asked to stop; what was computed is kept.
        """
        folder = self.prepared.config.cache_folder
        with _disk_trouble(folder):
            storage = find_storage(folder)
        names = tell(self._names() if dist.get_rank() == 0 else {}, 0)
        parts = [(loader, *part) for loader, count in reads for part in _read(loader, count)]
        notes: dict[str, Note] = {}
        for _, dataset, _ in parts:
            if dataset.path not in notes:
                file = folder / names[dataset.path]
                notes[dataset.path] = Note.find(file, dataset.num_documents, storage)
        is_loaded = False
        for loader, dataset, documents in parts:
            note, mismatched = notes[dataset.path], self.prepared.config.method == "kto"
            places = [*note.table.missing(dataset, documents, mismatched=mismatched)]
            if places and not is_loaded:
                self._load(train_step)
                is_loaded = True
            if places:
                reader = replace(loader, dataset=AnswersOfDocuments(dataset, places))
                self._look(train_step, reader, places, note)
            note.keep()
        for _, dataset, _ in parts:
            notes[dataset.path].table.attach(dataset)

    def _content(self) -> str:
        """Returns what tells the reference from others: the content of its weights."""
        config = self.prepared.config
        location = self.prepared.reference or self.prepared.location
        if location is not None:
            return weights_fingerprint(location)
        shape = self.prepared.model.model_dump_json()
        return f"random weights {shape} {config.seed} {config.init_method_std}"

    def _names(self) -> dict[str, str]:
        """Returns the name of the file for each data set, by the path of its token ids.

        It depends on all that the numbers depend on.
        """
        config, kind = self.prepared.config, self.prepared.kind
        settings = {
            "model": self._content(),
            "dtype": config.dtype,
            "row_length": config.row_length,
            # They choose the answers of other prompts.
            "mismatched": [config.seed, config.split] if config.method == "kto" else None,
        }
        names = {}
        for prefix in self.blend.prefixes:
            text = json.dumps({**settings, "data": data_fingerprint(prefix, kind)}, sort_keys=True)
            key = hashlib.sha256(text.encode()).hexdigest()[:16]
            names[kind.main_file(prefix)] = f"{Path(prefix).name}.{key}.reference.npz"
        return names

    def _load(self, train_step: TrainStep) -> None:
        """Loads the reference into the model of the train step."""
        location = self.prepared.reference
        source = self.start() if location is None else open_at(location)
        gpts = [unwrap(chunk) for chunk in train_step.chunks]
        load_weights(gpts, source, self.prepared.config, train_step.grid)

    def _look(
        self, train_step: TrainStep, reader: Loader, places: Sequence[Place], note: "Note"
    ) -> None:
        """Computes the log-probabilities of answers, and notes them.

        Args:
            train_step: Has the model, with the reference's weights.
            reader: The loader of the answers.
            places: Where each sample of the loader is from.
            note: Is told the log-probabilities.

        Raises:
            StoppedError: The run was asked to stop.
        """
        begun = kept = time.monotonic()
        self.say(f"the reference looks at {len(places):,} samples for {note.file}")
        for first in range(0, len(places), reader.global_batch_size):
            for index, values in _answers_of(train_step, reader, first).items():
                if index < len(places):
                    note.table.note(places[index], values)
            ending = self.stop.is_ending()
            if ending or tell(time.monotonic() - kept > _SECONDS_BETWEEN_NOTES, 0):
                note.keep()
                kept = time.monotonic()
                seen = min(first + reader.global_batch_size, len(places))
                self.say(f"the reference has looked at {seen:,} of {len(places):,} samples")
            if ending:
                raise StoppedError(
                    f"stopped while the reference looked at the data: it has seen "
                    f"{note.table.num_known:,} answers, which are kept",
                    "run the same command again to go on",
                )
        self.say(f"the reference has looked at them in {time.monotonic() - begun:.1f} s")


@dataclass
class Note:
    """What is known of a data set, and the file that keeps it.

    Attributes:
        table: What is known.
        file: The file, on each storage.
        storage: The storage of this rank that the file's folder is on.
        kept: How many answers the file of this rank's storage has.
    """

    table: References
    file: Path
    storage: Storage
    kept: int

    @classmethod
    def find(cls, file: Path, num_documents: int, storage: Storage) -> "Note":
        """Reads the files of all storages, of which the fullest counts; every rank must call it."""
        table = References.read(file, num_documents)
        known = [0] * dist.get_world_size()
        dist.all_gather_object(known, table.num_known)
        kept = table.num_known
        if len(set(known)) > 1:
            table = tell(table, known.index(max(known)))
        return cls(table, file, storage, kept)

    def keep(self) -> None:
        """Writes the file where it lacks something; every rank must call it.

        Raises:
            DataError: The disk is full or failing.
        """
        with _disk_trouble(self.file.parent), together():
            if self.storage.is_leader and self.kept < self.table.num_known:
                self.table.write(self.file)
        self.kept = self.table.num_known


@contextmanager
def _disk_trouble(folder: Path) -> Iterator[None]:
    """Turns errors while a folder is written into one that names it.

    Raises:
        DataError: The disk is full or failing.
    """
    try:
        yield
    except OSError as error:
        raise DataError(
            f"can't write into {folder}, where it is kept what the reference thinks of the data: "
            f"{error.strerror}",
            "give --data-cache with a folder that you may write to and that has some room",
        ) from error


def _read(loader: Loader, num_samples: int) -> Iterator[tuple[PreferenceDataset, list[int]]]:
    """Yields the datasets of a loader's first samples, and the documents that are read of each."""
    used: dict[int, tuple[PreferenceDataset, set[int]]] = {}
    varied: Any = loader.dataset
    for index in range(num_samples):
        dataset, place = varied.locate(index)
        used.setdefault(id(dataset), (dataset, set()))[1].update(dataset.pack(place))
    for dataset, documents in used.values():
        yield dataset, sorted(documents)


def _answers_of(train_step: TrainStep, loader: Loader, first: int) -> dict[int, dict[int, float]]:
    """Returns the log-probabilities of the answers of a global batch; every rank must call it.

    Args:
        train_step: Has the model.
        loader: Cuts the samples into this rank's micro-batches.
        first: The position of the first sample.

    Returns:
        By the position of the sample and the answer's segment id - 1.
    """
    grid = train_step.grid
    with adapters_off(train_step.chunks):
        reports = train_step.run_forward(partial(_answers, train_step.grid), loader, first)
    rows = [row for report in reports for row in report["answers"].tolist()]
    here = [index for indices in loader.indices(first, grid.dp_rank) for index in indices]
    found: dict[int, dict[int, float]] = {}
    if grid.is_last_stage and grid.tp_rank == 0 and grid.cp_rank == 0:
        for index, row in zip(here, rows, strict=True):
            found[index] = {i: value for i, value in enumerate(row) if not np.isnan(value)}
    parts: list[Any] = [None] * grid.world_size
    dist.all_gather_object(parts, found)
    return {index: values for part in parts for index, values in part.items()}


def _answers(grid: Grid, batch: Batch, of_tokens: Tensor) -> Losses:
    """Returns no losses, and a report with the log-probabilities of a micro-batch's answers."""
    sums = sums_of_answers(batch, of_tokens, grid)
    logps = torch.where(sums[1] > 0, sums[0], torch.nan)
    nothing = of_tokens.new_zeros(())
    return nothing, nothing.to(torch.int), {"answers": logps.cpu()}
