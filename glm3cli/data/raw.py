"""Preprocesses raw data that is given to `--data`, before the training begins.

The files are written into a cache. Their names have a key that depends on what they are made of
(paths, sizes and times of change of the inputs, the tokenizer, the settings), so that the next
start finds them. One process writes them, and all others that share the cache wait for its lock.
That happens before any process enters a collective operation, which would time out.
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
from glm3cli.data.preprocess.run import finished_before, preprocess, preview
from glm3cli.data.preprocess.writing.write import PreprocessProgress, Summary
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.errors import ConfigError, DataError
from glm3cli.host.fingerprints import fingerprint

# Seconds by which local rank 0 is ahead: it reports bad data, since the others don't print.
_HEAD_START = 1.0
_NAME = 120  # bytes of the name of a raw file in those of its preprocessed files
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RawData:
    """Raw data that an item of `--data` names, and the run of preprocess that it needs.

    Attributes:
        item: The path as the user gave it.
        kind: The kind of data that the training reads.
        config: The options of the run of preprocess that the data needs.
    """

    item: str
    kind: DataKind
    config: PreprocessConfig

    @classmethod
    def of(cls, item: str, kind: DataKind, training: TrainConfig, tokenizer: Path) -> "RawData":
        """Finds the input files of an item and the run of preprocess that it needs.

        Args:
            item: The path as the user gave it.
            kind: The kind of data that the training reads.
            training: The options of the training.
            tokenizer: The tokenizer.model file.

        Raises:
            DataError: The item is missing, or has no format that can be read.
        """
        cache = training.cache_folder
        name = _shortened(Path(item).absolute().name.split(".")[0])
        options = {"input": [Path(item)], "tokenizer": tokenizer, "output_prefix": cache / name}
        config = PreprocessConfig.parse(options | kind.preprocess_settings(training.seq_length))
        job = Job.of(config, find_files(config.inputs), Tokenizer.load(tokenizer))
        prefix = cache / f"{name}.{job.key}"
        return cls(item, kind, config.model_copy(update={"output_prefix": prefix}))

    @property
    def prefix(self) -> str:
        """The prefix of the preprocessed files, as `--data` takes it."""
        return self.kind.data_prefix(str(self.config.output_prefix))

    @property
    def fingerprint(self) -> str:
        """The sizes of the input files and the tokenizer, and a hash of their content.

        It depends neither on the sequence length, at which conversations are cut, nor on where the
        files are.
        """
        files = find_files(self.config.inputs)
        return fingerprint([*files, self.config.tokenizer_path])

    def look(self) -> Summary | None:
        """Returns the result of preprocess if an earlier start has run it, else None."""
        return finished_before(self.config)

    def check_first(self) -> None:
        """Encodes the first row, which finds bad data early, and writes nothing.

        Raises:
            DataError: The row is bad.
        """
        with _hints_name_preprocess():
            next(preview(self.config.model_copy(update={"preview": 1})), None)

    def prepare(self, report: Callable[[PreprocessProgress], None]) -> Summary:
        """Runs preprocess, or waits until another process has run it.

        Args:
            report: Called with the progress while this process runs preprocess.

        Raises:
            ConfigError: The cache can't be written or locked.
            DataError: The data is bad.
            StoppedError: The process received SIGTERM.
        """
        done = self.look()
        if done is not None:
            return done
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(_HEAD_START)
        with _hints_name_preprocess(), self._locked():
            return self.look() or preprocess(self.config, report)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the lock of these files, which is also released if the process is killed."""
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
            except OSError as error:  # some network file systems have no locks
                raise ConfigError(
                    f"{path.parent}, where --data {self.item} is preprocessed, can't be locked: "
                    f"{error.strerror}",
                    "give --data-cache with a folder on a local disk",
                ) from None
            yield


def _shortened(name: str) -> str:
    """Returns the beginning of a file's name, so that there is room behind it for endings.

    A name may have 255 bytes. The key that follows this one tells files apart.
    """
    return os.fsencode(name)[:_NAME].decode("utf-8", "ignore")


def _lock(descriptor: int, item: str) -> None:
    """Locks a file, and says so if another process holds the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _log.warning("waiting for another process that preprocesses --data %s", item)
        fcntl.flock(descriptor, fcntl.LOCK_EX)


@contextlib.contextmanager
def _hints_name_preprocess() -> Iterator[None]:
    """Adds to the hints of errors that the options they name are those of `glm3 preprocess`."""
    try:
        yield
    except DataError as error:
        raise DataError(
            error.message, f"{error.hint}; the options are those of `glm3 preprocess`"
        ) from None
