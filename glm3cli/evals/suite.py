"""Describes a multiple-choice benchmark: its files, its prompts' text, its subjects and categories.

A `Suite` is plain data, without tokens or models; `mmlu`, `ceval` and `cmmlu` define one each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

LETTERS = ("A", "B", "C", "D")


def titled(table: str) -> dict[str, str]:
    """Parses a table with a subject and its title (one word each) per line.

    Returns:
        The title of each subject, in the table's order.
    """
    return dict(line.split() for line in table.strip().splitlines())


@dataclass(frozen=True)
class Question:
    """One multiple-choice question: a row of a benchmark's CSV file, with unchanged strings.

    Attributes:
        subject: The subject whose file has the row.
        index: The row's position in its file, counted from 0.
        text: The question itself.
        choices: The four options, A to D.
        answer: The letter of the right option.
    """

    subject: str
    index: int
    text: str
    choices: tuple[str, str, str, str]
    answer: str


@dataclass(frozen=True)
class Suite:
    """A multiple-choice benchmark: where its files lie, and the text of its prompts.

    A prompt is `header`, then each shot (a solved question: question, cue, gap, letter) followed by
    `shot_end`, then the question that is asked, up to the cue.

    Attributes:
        name: The benchmark's name in results.json and on the command line.
        protocol: The name of the way in which it asks, as results.json has it.
        split: The folder of the questions; the shots are in the folder `dev`.
        columns: The names of the columns for the question, A to D, and the answer; None if the
            files have no header line and the columns stand in this order.
        header: The prompt's beginning, with `{subject}` where the subject's title goes.
        question: The form of a question, with `{text}`, and `{A}` to `{D}` for the options.
        cue: The text that asks for the answer.
        gap: The text between the cue and the letter.
        titles: The title of a subject in the header; a subject without one is named by its file,
            with spaces for underscores.
        categories: The subjects of each category; a subject may be in several.
        rest: The category of subjects that aren't the benchmark's own.
        shot_end: The text after each shot.
        last_shot_end: The text after the last shot in place of `shot_end`, or after the header if
            there are no shots; None if nothing differs.
        judge: How the model's choice is found: `letters` takes the likeliest of the four letters'
            tokens, `text` looks for a letter in the likeliest token of the whole vocabulary.
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
        """Returns the title of `subject` in the prompt's header."""
        return self.titles.get(subject, subject.replace("_", " "))

    def categories_of(self, subject: str) -> list[str]:
        """Returns the names of the categories in which `subject` counts."""
        found = [name for name, subjects in self.categories.items() if subject in subjects]
        return found or [self.rest]

    def knows(self, subject: str) -> bool:
        """Returns whether `subject` is one of the benchmark's own."""
        return any(subject in subjects for subjects in self.categories.values())

    def prompt(self, question: Question, shots: Sequence[Question]) -> str:
        """Returns the prompt's text for `question`, after the solved questions `shots`."""
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
