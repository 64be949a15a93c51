"""The demo's mini-MMLU: bundled test questions, and documents that teach how to answer.

`MMLU_DIR` has CSV files in the form of Hendrycks' MMLU, so that `glm3 eval mmlu --data-dir` reads
it. A question asks for the kind of a word, in one of the subject's three wordings. The training
documents ask about each word in the two wordings that its test question doesn't have: training
shows the fact, but never the test question. The four options of a subject keep one order, because
a model of this size learns where the right kind stands, not yet how to search for it.
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
class QuizQuestion:
    """A question of the mini-MMLU for the kind of one word.

    Attributes:
        subject: The subject's name in `words.SUBJECTS`.
        word: The word that is asked about.
        wording: The position of the question's form among the subject's wordings, from 0.
    """

    subject: str
    word: str
    wording: int

    @property
    def kind(self) -> str:
        """The kind of the word: the right one of the four options."""
        kinds = SUBJECTS[self.subject].kinds
        return next(kind for kind, words in kinds.items() if self.word in words)

    @property
    def answer(self) -> str:
        """The letter of the right option."""
        return LETTERS[list(SUBJECTS[self.subject].kinds).index(self.kind)]

    @property
    def text(self) -> str:
        """The text of the question, without the options."""
        return SUBJECTS[self.subject].wordings[self.wording].format(word=self.word)

    @property
    def fact(self) -> str:
        """The sentence that answers the question, as training documents state it."""
        return SUBJECTS[self.subject].statement.format(word=self.word, kind=self.kind)

    @property
    def cells(self) -> list[str]:
        """The question's row in a CSV file of MMLU: the text, the four options, the letter."""
        return [self.text, *SUBJECTS[self.subject].kinds, self.answer]

    @property
    def prompt(self) -> str:
        """The question as it stands in a prompt of MMLU: text, options, and `Answer:`."""
        options = zip(LETTERS, SUBJECTS[self.subject].kinds, strict=True)
        return "\n".join([self.text, *(f"{letter}. {kind}" for letter, kind in options), "Answer:"])


def all_questions() -> list[QuizQuestion]:
    """Returns the questions about every word of every subject, in every wording."""
    return [
        QuizQuestion(name, word, wording)
        for name, subject in SUBJECTS.items()
        for words in subject.kinds.values()
        for word in words
        for wording in range(len(subject.wordings))
    ]


def test_texts() -> set[str]:
    """Returns the texts of the bundled test questions, without their options."""
    return {cells[0] for cells in _read_split("test")}


def _read_split(split: str) -> Iterator[list[str]]:
    for path in sorted((MMLU_DIR / split).glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            yield from csv.reader(file)


def facts() -> list[str]:
    """Returns the fact of every word of every subject, a sentence each."""
    return [question.fact for question in all_questions() if question.wording == 0]


def quiz_documents(number: int, seed: int) -> list[str]:
    """Draws training documents that teach the form of an MMLU prompt and the facts.

    Each document has the header of a prompt and three solved questions of one subject; none of
    them is a test question.

    Args:
        number: Number of documents.
        seed: Seed of the random draws; the same seed gives the same documents.
    """
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
