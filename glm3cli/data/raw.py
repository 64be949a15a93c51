"""`--data` that is raw: what preprocess reads, turned into its files before a training begins.

The files lie in a cache under a name of what they are made of (the inputs' paths, sizes and times
of change, the tokenizer, the settings), so that the next start finds them. One process makes them
and all others that share the cache wait for its lock: long before any of them enters a collective,
whose patience would end.
"""

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from glm3cli.config.preprocess import PreprocessConfig
from glm3cli.config.training import TrainConfig
from glm3cli.data.files import find_files
from glm3cli.data.kinds import DataKind
from glm3cli.data.preprocess.job import Job
from glm3cli.data.preprocess.run import (
    PreprocessProgress,
    Summary,
    finished_before,
    preprocess,
    preview,
)
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.errors import ConfigError, DataError

FOLDER = "data"  # of a run, where no --data-cache is given
# Local rank 0 goes first: if the data is bad, the rank that speaks is the one that tells it.
_HEAD_START = 1.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RawData:
    """A raw item of `--data`.

    Attributes:
        item: As the user gave it.
        kind: The kind of data that the training reads.
        config: The run of preprocess that it needs.
    """

    item: str
    kind: DataKind
    config: PreprocessConfig

    @classmethod
    def of(cls, item: str, kind: DataKind, training: TrainConfig, tokenizer: Path) -> "RawData":
        """Returns the raw data that a training reads, with the run of preprocess that it needs.

        Raises:
            DataError: The item is missing, or has no format that can be read.
        """
        cache = training.data_cache or training.save / FOLDER
        name = Path(item).absolute().name.split(".")[0]
        options = {"input": [Path(item)], "tokenizer": tokenizer, "output_prefix": cache / name}
        config = PreprocessConfig.parse(options | kind.preprocess_settings(training.seq_length))
        job = Job.of(config, find_files(config.inputs), Tokenizer.load(tokenizer))
        prefix = cache / f"{name}.{job.key}"
        return cls(item, kind, config.model_copy(update={"output_prefix": prefix}))

    @property
    def prefix(self) -> str:
        """The prefix of the files that training reads."""
        return self.kind.data_prefix(str(self.config.output_prefix))

    def look(self) -> Summary | None:
        """The result of an earlier start, or None where preprocess is still to run."""
        return finished_before(self.config)

    def check_first(self) -> None:
        """Reads and encodes the first row, and writes nothing.

        Raises:
            DataError: The row is bad.
        """
        with _ways_out():
            next(preview(self.config.model_copy(update={"preview": 1})), None)

    def prepare(self, report: Callable[[PreprocessProgress], None]) -> Summary:
        """Runs preprocess, or waits until another process has done it.

        Raises:
            DataError: The data is bad, or the cache can't be written.
            StoppedError: SIGTERM came.
        """
        done = self.look()
        if done is not None:
            return done
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(_HEAD_START)
        with _ways_out(), self._alone():
            return self.look() or preprocess(self.config, report)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Holds the lock of these files; a process that is killed lets go of it."""
        prefix = self.config.output_prefix
        path = prefix.with_name(f".{prefix.name}.lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a")
        except OSError as error:
            raise ConfigError(
                f"can't write into {path.parent}, where --data {self.item} is preprocessed: "
                f"{error.strerror}",
                "give --data-cache with a folder that you may write to",
            ) from None
        with file:
            try:
                _lock(file.fileno(), self.item)
            except OSError as error:  # some network file systems know no locks
                raise ConfigError(
                    f"{path.parent}, where --data {self.item} is preprocessed, can't be locked: "
                    f"{error.strerror}",
                    "give --data-cache with a folder on a local disk",
                ) from None
            yield


def _lock(descriptor: int, item: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _log.warning("waiting for another process that preprocesses --data %s", item)
        fcntl.flock(descriptor, fcntl.LOCK_EX)


@contextlib.contextmanager
def _ways_out() -> Iterator[None]:
    """Says where the options are that the errors of preprocess advise."""
    try:
        yield
    except DataError as error:
        raise DataError(
            error.message, f"{error.hint}; the options are those of `glm3 preprocess`"
        ) from None
