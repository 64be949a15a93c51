"""Preference data: made-up answers as samples and one by one, and files of a project's rows."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Answer:
    """An answer with its prompt.

    Attributes:
        ids: The token ids of both.
        start: The number of tokens of the prompt.
        reference: What the reference is said to think of the answer: its log-probability.
    """

    ids: list[int]
    start: int
    reference: float


def row(answers: dict[int, Answer]) -> dict[str, np.ndarray]:
    """A sample of answers by their segment ids."""
    ids = [token for answer in answers.values() for token in answer.ids]
    segment_ids = [number for number, answer in answers.items() for _ in answer.ids]
    mask, reference = np.zeros(len(ids), dtype=np.float32), np.zeros(len(ids), dtype=np.float32)
    before = 0
    for answer in answers.values():
        mask[before + answer.start : before + len(answer.ids)] = 1
        reference[before + answer.start] = answer.reference
        before += len(answer.ids)
    return {
        "tokens": np.array(ids[:-1]),
        "labels": np.array(ids[1:]),
        "segment_ids": np.array(segment_ids[:-1]),
        "loss_mask": mask[1:],
        "reference": reference[1:],
    }


class Pairs:
    """Samples of pairs, each answer of up to half of `row_length` tokens."""

    def __init__(self, row_length: int, vocab_size: int) -> None:
        self._shape = row_length, vocab_size

    def __len__(self) -> int:
        return 10_000

    def answers(self, index: int) -> tuple[Answer, Answer]:
        """The chosen and the rejected answer of a sample."""
        row_length, vocab_size = self._shape
        random = np.random.default_rng(index)
        prompt = random.integers(0, vocab_size, random.integers(2, row_length // 6)).tolist()

        def one() -> Answer:
            size = random.integers(1, row_length // 3)
            ids = prompt + random.integers(0, vocab_size, size).tolist()
            return Answer(ids, len(prompt), float(-5 * size + random.normal()))

        return one(), one()

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        chosen, rejected = self.answers(index)
        return row({1: chosen, 2: rejected})

    def sizes(self, indices: Sequence[int]) -> np.ndarray:
        """The number of positions of each of some samples."""
        return np.array([len(self[index]["tokens"]) for index in indices])

    def locate(self, index: int) -> tuple["Pairs", int]:
        """The dataset that a sample comes from, and its place there."""
        return self, index


class PackedPairs(Pairs):
    """The same pairs, two in a row of twice the length."""

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        both = [answer for i in (2 * index, 2 * index + 1) for answer in self.answers(i)]
        return row(dict(enumerate(both, start=1)))


class LikedOrNot(Pairs):
    """The chosen answer or the rejected one; the mismatched one is the next sample's."""

    def is_liked(self, index: int) -> bool:
        """Whether the sample is a liked answer."""
        return index % 3 != 1

    def answer(self, index: int) -> Answer:
        """The answer of a sample."""
        chosen, rejected = self.answers(index)
        return chosen if self.is_liked(index) else rejected

    def other(self, index: int) -> Answer:
        """A mismatched answer: the prompt of a sample and the answer of the next one."""
        prompt, other = self.answer(index), self.answer(index + 1)
        answer = other.ids[other.start :]
        return Answer(prompt.ids[: prompt.start] + answer, prompt.start, -5.5 * len(answer))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return row({1 if self.is_liked(index) else 2: self.answer(index)})

    def mismatched(self, index: int) -> dict[str, np.ndarray]:
        """The sample of a mismatched answer."""
        return row({1: self.other(index)})


def write_rows(task: Path, folder: Path) -> tuple[Path, Path]:
    """Writes raw files of pairs and of feedback, made of a project's instructions.

    Args:
        task: The project's raw instructions.
        folder: The folder to write into.
    """
    rows = [json.loads(line) for line in task.read_text("utf-8").splitlines()]
    pairs, feedback = [], []
    for number, row in enumerate(rows):
        prompt = f"{row['instruction']} {row['input']}".strip()
        other = rows[(number + 7) % len(rows)]["output"] + " no"
        pairs.append({"prompt": prompt, "chosen": row["output"], "rejected": other})
        is_liked = number % 3 != 1
        answer = row["output"] if is_liked else other
        feedback.append({"prompt": prompt, "completion": answer, "label": is_liked})
    files = folder / "pairs.jsonl", folder / "feedback.jsonl"
    for file, lines in zip(files, (pairs, feedback), strict=True):
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return files
