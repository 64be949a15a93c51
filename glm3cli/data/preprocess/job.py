"""What a run of `preprocess` is told: two runs with equal jobs write the same bytes."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glm3cli import __version__
from glm3cli.config.preprocess import PreprocessConfig
from glm3cli.data.tokens.tokenizer import Tokenizer

# Options that change the files. A bad row ends a run or is left out; that is judged apart.
_SETTINGS = {"handler", "append_eod", "json_keys", "template", "seq_length", "pack"}


@dataclass(frozen=True)
class Job:
    """Inputs, tokenizer and settings.

    Attributes:
        version: Of glm3.
        inputs: Path, bytes and time of change (in ns) of every file; None for a pipe, which can't
            be read twice.
        tokenizer: SHA-256 of its file.
        settings: The options that change what is written.
    """

    version: str
    inputs: list[list[Any]] | None
    tokenizer: str
    settings: dict[str, Any]

    @classmethod
    def of(cls, config: PreprocessConfig, files: list[Path], tokenizer: Tokenizer) -> "Job":
        """The job of a run that reads these files."""
        stats = [path.stat() for path in files if path.is_file()]
        inputs = [
            [str(path.absolute()), stat.st_size, stat.st_mtime_ns]
            for path, stat in zip(files, stats, strict=False)
        ]
        return cls(
            version=__version__,
            inputs=inputs if len(stats) == len(files) else None,
            tokenizer=hashlib.sha256(tokenizer.path.read_bytes()).hexdigest(),
            settings=config.model_dump(
                mode="json",
                # There the length is that of training, and cuts nothing.
                include=_SETTINGS - {"seq_length"} if config.kind == "text" else _SETTINGS,
            ),
        )

    @property
    def key(self) -> str:
        """A short name for the job, which no other has."""
        told = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def equals(self, noted: object) -> bool:
        """Whether a job that was noted (as JSON) is this one and can be told from any other."""
        return self.inputs is not None and noted == asdict(self)
