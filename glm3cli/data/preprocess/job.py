"""`Job`: everything that the output of preprocess depends on."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glm3cli.config.preprocess import PreprocessConfig
from glm3cli.data.tokens.tokenizer import Tokenizer
from glm3cli.version import __version__

# The options that change the files. Not --on-error: a run without bad rows writes the same with
# either value, and whoever compares jobs looks at the number of bad rows, too.
_SETTINGS = {"handler", "append_eod", "json_keys", "template", "seq_length", "pack"}


@dataclass(frozen=True)
class Job:
    """The inputs, tokenizer and settings of a run; runs with equal jobs write the same bytes.

    Attributes:
        version: The version of glm3.
        inputs: The path, size in bytes, and time of change in ns of every input file; None if a
            pipe is among the inputs, since it can't be read twice.
        tokenizer: The SHA-256 of the tokenizer's file.
        settings: The values of the options that change what is written.
    """

    version: str
    inputs: list[list[Any]] | None
    tokenizer: str
    settings: dict[str, Any]

    @classmethod
    def of(cls, config: PreprocessConfig, files: list[Path], tokenizer: Tokenizer) -> "Job":
        """Returns the job of a run that reads these input files with this tokenizer."""
        settings = _SETTINGS | {"part"} if config.part else _SETTINGS
        stats = [path.stat() for path in files if path.is_file()]
        inputs = [
            [str(path.absolute()), stat.st_size, stat.st_mtime_ns]
            for path, stat in zip(files, stats, strict=False)
        ]
        return cls(
            version=__version__,
            inputs=inputs if len(stats) == len(files) else None,
            tokenizer=tokenizer.sha256,
            settings=config.model_dump(
                mode="json",
                # The sequence length of texts is only for --build-index: it cuts nothing.
                include=settings - {"seq_length"} if config.kind == "text" else settings,
            ),
        )

    @property
    def key(self) -> str:
        """A short name for the job: the first 16 hexadecimal digits of its SHA-256."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def equals(self, saved: object) -> bool:
        """Returns whether a saved job is this one; always False if a pipe is among the inputs.

        Args:
            saved: The fields of the other job, as read from JSON.
        """
        return self.inputs is not None and saved == asdict(self)
