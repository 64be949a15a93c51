"""Saves the answers of a benchmark run as they come, so that a run that was cut off can go on.

The answers are in a JSON Lines file beside the result; `--resume` reads it. Its first line is the
run's key, each further line the answer to one question.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from glm3cli.checkpoint.locate import weight_stamps
from glm3cli.config.evaluation import QuestionOptions
from glm3cli.errors import ConfigError
from glm3cli.evals.results import Answer
from glm3cli.host.files import write_text

# Options that change no answer. (The data's folder changes the prompts, whose hash is in the key.)
_IRRELEVANT = {"output", "json", "resume", "nproc", "batch_size", "data_dir", "file", "shots_file"}

Key = tuple[str, int, int]  # subject and index of a question, and the places of its options


def run_key(config: QuestionOptions, protocol: str, prompts_hash: str) -> str:
    """Returns a hash (SHA-256 in hex) of all that determines a run's answers.

    Two runs with the same key may use each other's answers. It covers the options, the prompts, and
    the names, sizes and times of the weight files.

    Args:
        config: The options of the run.
        protocol: The suite's protocol.
        prompts_hash: `hash_texts` of the prompts' texts with all their shots.
    """
    options = {k: v for k, v in config.to_options().items() if k not in _IRRELEVANT}
    files = weight_stamps(config.model, config.lora)
    facts = [options, protocol, prompts_hash, files]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class AnswerFile:
    """The file OUTPUT.partial.jsonl, which holds a run's answers until its result is written.

    Every rank may read it; only rank 0 writes.

    Attributes:
        path: The file's path.
    """

    def __init__(self, output: Path, key: str) -> None:
        self.path = output.with_name(output.name + ".partial.jsonl")
        self._key = key

    def read(self) -> dict[Key, Answer]:
        """Reads the answers of the earlier run; there are none if there is no file.

        Raises:
            ConfigError: The file belongs to a run with other options, prompts or weights.
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
        return {(row["subject"], row["index"], row["rotation"]): _answer(row) for row in rows[1:]}

    def start(self, answers: Mapping[Key, Answer]) -> None:
        """Replaces the file by one with this run's key and `answers`."""
        write_text(self.path, json.dumps({"key": self._key}) + "\n" + _rows(answers))

    def add(self, answers: Mapping[Key, Answer]) -> None:
        """Appends `answers`; they are on the disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_rows(answers))
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Removes the file, whose answers are all in the result."""
        self.path.unlink(missing_ok=True)


def _rows(answers: Mapping[Key, Answer]) -> str:
    """Returns the lines of some answers."""
    rows = [
        {"subject": subject, "index": index, "rotation": rotation} | asdict(answer)
        for (subject, index, rotation), answer in answers.items()
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _answer(row: Mapping[str, Any]) -> Answer:
    return Answer(tuple(row["scores"]), row["choice"], row["text"], row["is_right"])
