"""The finished questions of a run that may be cut off: a file beside the result, a line each."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from glm3cli.checkpoint.locate import locate
from glm3cli.config.evaluation import EvalConfig
from glm3cli.errors import ConfigError
from glm3cli.evals.results import Answer
from glm3cli.host.files import write_text

# Options that leave every answer what it is; the prompts themselves are in the key.
_IRRELEVANT = {"output", "json", "resume", "nproc", "batch_size", "data_dir"}
_WEIGHTS = {".safetensors", ".bin", ".pt", ".distcp"}

Key = tuple[str, int]  # subject and index of a question


def run_key(config: EvalConfig, protocol: str, prompts_hash: str) -> str:
    """What two runs must share for one to use the other's answers: options, prompts, weights."""
    options = {k: v for k, v in config.to_options().items() if k not in _IRRELEVANT}
    facts = [options, protocol, prompts_hash, _weight_files(locate(config.model).folder)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _weight_files(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a model's files: reading the weights themselves takes too long."""
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix in _WEIGHTS]
    stats = [path.stat() for path in paths]
    return [
        (str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns)
        for path, stat in zip(paths, stats, strict=True)
    ]


class AnswerFile:
    """The file OUTPUT.partial.jsonl; only one rank has one."""

    def __init__(self, output: Path, key: str) -> None:
        self.path = output.with_name(output.name + ".partial.jsonl")
        self._key = key

    def read(self) -> dict[Key, Answer]:
        """The answers so far; none if there is no file.

        Raises:
            ConfigError: The file is of a run with other options, prompts or weights.
        """
        if not self.path.is_file():
            return {}
        lines = self.path.read_bytes().splitlines(keepends=True)
        # The last line may have been cut off with the run.
        rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
        if not rows or rows[0].get("key") != self._key:
            raise ConfigError(
                f"--resume: {self.path} is of a run with other options, prompts or weights",
                "run it with its own options, give another --output, or drop --resume",
            )
        return {(row["subject"], row["index"]): _answer(row) for row in rows[1:]}

    def start(self, answers: Mapping[Key, Answer]) -> None:
        """Begins the file anew with these answers."""
        write_text(self.path, json.dumps({"key": self._key}) + "\n")
        self.add(answers)

    def add(self, answers: Mapping[Key, Answer]) -> None:
        """Appends answers; they are on disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            for (subject, index), answer in answers.items():
                row = {"subject": subject, "index": index, **asdict(answer)}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Takes the file away: the result has it all."""
        self.path.unlink(missing_ok=True)


def _answer(row: Mapping[str, Any]) -> Answer:
    return Answer(tuple(row["scores"]), row["choice"], row["text"])
