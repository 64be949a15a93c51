"""What a multiple-choice benchmark is: where its questions lie and how they become a prompt.

A `Suite` is data. It knows nothing of tokens and models: `prompts` and `runner` do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

LETTERS = ("A", "B", "C", "D")


def titled(table: str) -> dict[str, str]:
    """A table with a subject and its title (one word each) per line, as a dict."""
    return dict(line.split() for line in table.strip().splitlines())


@dataclass(frozen=True)
class Question:
    """One row of a benchmark's file, its strings as they are in the file.

    Attributes:
        index: Position in its file, from 0.
        answer: The right letter.
    """

    subject: str
    index: int
    text: str
    choices: tuple[str, str, str, str]
    answer: str


@dataclass(frozen=True)
class Suite:
    """A benchmark and the text of its prompts.

    A prompt is `header`, then each shot (question, cue, gap, its letter) followed by `shot_end`,
    then the question up to the cue.

    Attributes:
        split: Folder of the questions; the shots are in `dev`.
        columns: Names of the columns question, A to D and answer; None if files have no header.
        header: Has `{subject}` where the subject's title goes.
        question: Has `{text}`, and `{A}` to `{D}` for the choices.
        cue: What asks for the answer.
        gap: What stands between the cue and the letter.
        last_shot_end: Stands after the last shot in place of `shot_end`, or after the header if
            there are no shots; None where nothing differs.
        judge: How the choice is found: the likeliest of the four letters, or a letter in the
            likeliest token of all.
        titles: A subject's name in the header; without a title it is its name with spaces.
        categories: The subjects of each category; a subject may be in several.
        rest: Category of subjects that the suite doesn't know.
    """

    name: str
    protocol: str
    split: str
    columns: tuple[str, ...] | None
    header: str
    question: str
    cue: str
    gap: str
    titles: Mapping[str, str]
    categories: Mapping[str, Sequence[str]]
    rest: str
    shot_end: str = "\n\n"
    last_shot_end: str | None = None
    judge: Literal["letters", "text"] = "letters"

    def title(self, subject: str) -> str:
        """The subject as the header names it."""
        return self.titles.get(subject, subject.replace("_", " "))

    def categories_of(self, subject: str) -> list[str]:
        """The categories that `subject` counts in."""
        found = [name for name, subjects in self.categories.items() if subject in subjects]
        return found or [self.rest]

    def knows(self, subject: str) -> bool:
        """Whether `subject` is one of the benchmark's own."""
        return any(subject in subjects for subjects in self.categories.values())

    def prompt(self, question: Question, shots: Sequence[Question]) -> str:
        """The text in front of the answer."""
        solved = [self._asked(shot) + self.gap + shot.answer for shot in shots]
        text = self.header.format(subject=self.title(question.subject)) + self.shot_end.join(solved)
        if self.last_shot_end is not None:
            text += self.last_shot_end
        elif solved:
            text += self.shot_end
        return text + self._asked(question)

    def _asked(self, question: Question) -> str:
        choices = dict(zip(LETTERS, question.choices, strict=True))
        return self.question.format(text=question.text, **choices) + self.cue
