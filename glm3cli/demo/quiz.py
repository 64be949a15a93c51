"""The demo's mini-MMLU: bundled test questions, and documents that teach how to answer.

`MMLU_DIR` has the files in Hendrycks' form, so `glm3 eval mmlu --data-dir` reads it. A subject
asks for the kind of a word in one of three wordings. The documents show each word in the two
wordings that its test question doesn't have, so no test question is seen in training, though its
fact is. The four options of a subject keep one order: a model of this size learns where the kind
stands, not yet how to search for it.
"""

import csv
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from glm3cli.demo.words import SUBJECTS

MMLU_DIR = Path(__file__).parent / "mmlu"
LETTERS = "ABCD"
QUESTIONS_PER_DOCUMENT = 3


@dataclass(frozen=True)
class Question:
    """One question of a subject, about the word `word` in the wording number `wording`."""

    subject: str
    word: str
    wording: int

    @property
    def kind(self) -> str:
        """The right option."""
        kinds = SUBJECTS[self.subject].kinds
        return next(kind for kind, words in kinds.items() if self.word in words)

    @property
    def answer(self) -> str:
        """The letter of the right option."""
        return LETTERS[list(SUBJECTS[self.subject].kinds).index(self.kind)]

    @property
    def text(self) -> str:
        """The question without its options."""
        return SUBJECTS[self.subject].wordings[self.wording].format(word=self.word)

    @property
    def fact(self) -> str:
        """The sentence that answers it."""
        return SUBJECTS[self.subject].statement.format(word=self.word, kind=self.kind)

    @property
    def cells(self) -> list[str]:
        """Its line of an MMLU file."""
        return [self.text, *SUBJECTS[self.subject].kinds, self.answer]

    @property
    def prompt(self) -> str:
        """The question as it stands in MMLU's prompt, up to where the letter is due."""
        options = zip(LETTERS, SUBJECTS[self.subject].kinds, strict=True)
        return "\n".join([self.text, *(f"{letter}. {kind}" for letter, kind in options), "Answer:"])


def all_questions() -> list[Question]:
    """Every word of every subject in every wording."""
    return [
        Question(name, word, wording)
        for name, subject in SUBJECTS.items()
        for words in subject.kinds.values()
        for word in words
        for wording in range(len(subject.wordings))
    ]


def test_texts() -> set[str]:
    """The bundled test questions, without their options."""
    return {cells[0] for cells in _read_split("test")}


def _read_split(split: str) -> Iterator[list[str]]:
    for path in sorted((MMLU_DIR / split).glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            yield from csv.reader(file)


def facts() -> list[str]:
    """One sentence for every word of every subject."""
    return [question.fact for question in all_questions() if question.wording == 0]


def quiz_documents(number: int, seed: int) -> list[str]:
    """Draws `number` documents in the form of MMLU's prompt, none of them with a test question."""
    held_out = test_texts()
    allowed = [question for question in all_questions() if question.text not in held_out]
    rng = random.Random(seed)
    documents = []
    for _ in range(number):
        subject = rng.choice(sorted(SUBJECTS))
        candidates = [question for question in allowed if question.subject == subject]
        drawn = rng.sample(candidates, QUESTIONS_PER_DOCUMENT)
        header = f"The following are multiple choice questions (with answers) about {subject}."
        documents.append("\n\n".join([header, *(f"{item.prompt} {item.answer}" for item in drawn)]))
    return documents
