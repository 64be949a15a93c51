"""`Records`: the results of a prompts file, appended to --output so that a killed run can go on.

OUTPUT has one line for each line of the prompts file that isn't empty, in their order.
OUTPUT.run.json is written before the first of them and holds what determines the results, so that
--resume can tell whether they still fit.
"""

import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from glm3cli.checkpoint.locate import weight_stamps
from glm3cli.config.inference import GenerateConfig
from glm3cli.errors import ConfigError, DataError
from glm3cli.host.files import write_json
from glm3cli.host.parsing import parse_json, read_json
from glm3cli.host.versions import versions
from glm3cli.infer.prompts.lines import BadLine, PromptLine

# Options that change no result: where it goes, how bad lines are met, and on how many ranks it is
# computed.
_IRRELEVANT = {
    "as_json",
    "json",
    "layers_per_stage",
    "max_batch_size",
    "max_restarts",
    "nproc",
    "on_error",
    "output",
    "pp",
    "prompts_file",
    "resume",
    "stream",
    "tp",
}

_log = logging.getLogger(__name__)


class Records:
    """The file OUTPUT, to which results are appended."""

    def __init__(self, path: Path, config: GenerateConfig) -> None:
        """Prepares the file without opening it.

        Args:
            path: The file.
            config: The options of the run.
        """
        self.path = path
        self._note = path.with_name(f"{path.name}.run.json")
        self._config = config
        self._file: BinaryIO | None = None

    def check(self) -> None:
        """Checks, without changing anything, whether the run may write here.

        Raises:
            ConfigError: The file is there already and --resume isn't given, or what is in it was
                made with other options or weights.
        """
        if not self.path.exists() or not self.path.stat().st_size:
            return
        if not self._config.resume:
            raise ConfigError(
                f"--output {self.path} is there already",
                "--resume goes on with it; else remove it, or give another name",
            )
        try:
            noted = read_json(self._note)
        except (OSError, ValueError):
            raise ConfigError(
                f"--resume: {self._note}, which tells how {self.path} was made, can't be read",
                "remove both, or give another --output",
            ) from None
        now = json.loads(json.dumps(self._facts()))
        if differing := _differences(noted, now):
            raise ConfigError(
                f"--resume: {self.path} was made with {'; '.join(differing)}",
                "give the options of before, give another --output, or remove the file",
            )

    def open(self, lines: Iterator[PromptLine | BadLine]) -> int:
        """Opens the file for appending, and passes over the lines whose results it has.

        What a killed run has left of a result is cut off.

        Args:
            lines: The lines of the prompts file, of which those that are done are taken.

        Returns:
            The number of results that are there.

        Raises:
            ConfigError: Another run writes the file.
            DataError: The file can't be written, or its results are of other prompts.
        """
        try:
            self._file = self.path.open("a+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self.path.stat().st_size:
                write_json(self._note, {**self._facts(), "versions": versions("torch")})
            return self._pass_over(self._file, lines)
        except BlockingIOError:
            raise ConfigError(
                f"another run writes {self.path}", "wait for it, or give another --output"
            ) from None
        except OSError as error:
            raise self._trouble(error) from None

    def _pass_over(self, file: BinaryIO, lines: Iterator[PromptLine | BadLine]) -> int:
        """Compares the results in the file with the lines, and cuts off the rest of the last.

        A log line says if results have no digest of their row, as those of older versions.
        """
        file.seek(0)
        count = end = 0
        has_old = False
        for record in file:
            if not record.endswith(b"\n"):
                break
            line, found = next(lines, None), _parsed(record)
            if line is None or not _is_of(found, line):
                raise DataError(
                    f"--resume: result {count + 1:,} of {self.path} is of another prompt than "
                    + (f"line {line.number:,}" if line else "any line"),
                    "give the prompts file of before, which may have got more lines at its end",
                )
            count += 1
            has_old = has_old or "request" not in found
            end += len(record)
        if has_old:
            _log.warning(
                "%s has results of an older version, which are known by their prompts' texts "
                "alone, whatever else has changed in their lines",
                self.path,
            )
        file.truncate(end)
        file.seek(end)
        return count

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a result; it is the system's when this returns, whatever becomes of the run.

        Raises:
            DataError: The file can't be written.
        """
        assert self._file is not None
        text = json.dumps(record, ensure_ascii=False) + "\n"
        try:
            self._file.write(text.encode())
            self._file.flush()
        except OSError as error:
            raise self._trouble(error) from None

    def close(self) -> None:
        """Waits until all results are on the disk.

        Raises:
            DataError: The file can't be written.
        """
        if self._file is None:
            return
        try:
            with self._file as file:
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._trouble(error) from None

    def _facts(self) -> dict[str, Any]:
        """Returns what determines the results, apart from the prompts."""
        options = self._config.to_options()
        return {
            "settings": {name: options[name] for name in options if name not in _IRRELEVANT},
            "weights": weight_stamps(self._config.model, self._config.adapter),
        }

    def _trouble(self, error: OSError) -> DataError:
        """Returns the error for a file that can't be written."""
        return DataError(
            f"--output {self.path} can't be written: {error.strerror}",
            "the results that it has are whole; --resume goes on with them",
        )


def _parsed(record: bytes) -> dict[str, Any]:
    """Returns a result; nothing if it is none."""
    try:
        found = parse_json(record.decode())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_of(found: Mapping[str, Any], line: PromptLine | BadLine) -> bool:
    """Returns whether a result belongs to a line; one of a bad line may since have been mended."""
    if found.get("line") != line.number:
        return False
    if "error" in found:
        return True
    if isinstance(line, BadLine) or "prompt" not in found:
        return False
    return found["prompt"] == line.prompt and found.get("request", line.request) == line.request


def _differences(noted: Any, now: Mapping[str, Any]) -> list[str]:
    """Returns in words how a run was made otherwise than it would be now."""
    before = noted.get("settings") if isinstance(noted, dict) else None
    if not isinstance(before, dict):
        return ["unknown options"]
    settings = now["settings"]
    names = sorted(before.keys() | settings.keys())
    found = [
        f"{name} {json.dumps(before.get(name))}, not {json.dumps(settings.get(name))}"
        for name in names
        if before.get(name) != settings.get(name)
    ]
    if noted.get("weights") != now["weights"]:
        found.append("other weights")
    return found
