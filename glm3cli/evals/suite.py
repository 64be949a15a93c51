"""Describes a benchmark: its files, its prompts' text, its subjects and categories.

A `Suite` is plain data, without tokens or models; `mmlu`, `ceval` and `cmmlu` define one each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from string import ascii_uppercase
from typing import Literal

# The letters of options, of which a question has as many as it has options.
LETTERS = tuple(ascii_uppercase)


def titled(table: str) -> dict[str, str]:
    """Parses a table with a subject and its title (one word each) per line.

    Returns:
        The title of each subject, in the table's order.
    """
    return dict(line.split() for line in table.strip().splitlines())


@dataclass(frozen=True)
class Question:
    """One question: a row of a benchmark's file, with unchanged strings.

    Attributes:
        subject: The subject whose file has the row.
        index: The row's position in its file, counted from 0.
        text: The question itself.
        choices: The options: A, B, and so on; none if the answer is a text.
        answer: The letter of the right option, or the right text.
        also_right: Other texts that are right, too.
        rotation: By how many places the options have moved up from where they stand in the file.
    """

    subject: str
    index: int
    text: str
    choices: tuple[str, ...]
    answer: str
    rotation: int = 0
    also_right: tuple[str, ...] = ()

    @property
    def letters(self) -> tuple[str, ...]:
        """The letters of the options."""
        return LETTERS[: len(self.choices)]

    def rotated(self, places: int) -> "Question":
        """Returns the question with every option so many letters further up; A follows Z."""
        count = len(self.choices)
        choices = (*self.choices[places:], *self.choices[:places])
        answer = LETTERS[(LETTERS.index(self.answer) - places) % count]
        return replace(self, choices=choices, answer=answer, rotation=places)


@dataclass(frozen=True)
class Suite:
    """A multiple-choice benchmark: where its files lie, and the text of its prompts.

    A prompt is `header`, then each shot (a solved question: question, options, cue, gap, letter)
    followed by `shot_end`, then the question that is asked, up to the cue. As a chat, the questions
    are the turns of a user, the first of which begins with the header, and the cues begin the turns
    of the assistant.

    Attributes:
        name: The benchmark's name in results.json and on the command line.
        protocol: The name of the way in which it asks, as results.json has it.
        split: The folder of the questions; the shots are in the folder `dev`.
        columns: The names of the columns that must be there, for the question, A to D, and the
            answer; None if the files have no header line and the columns stand in this order.
        header: The prompt's beginning, with `{subject}` where the subject's title goes.
        question: The form of a question, with `{text}`.
        option: The form of each option below it, with `{letter}` and `{option}`.
        cue: The text that asks for the answer.
        gap: The text between the cue and the letter.
        titles: The title of a subject in the header; a subject without one is named by its file,
            with spaces for underscores.
        categories: The subjects of each category; a subject may be in several.
        rest: The category of subjects that aren't the benchmark's own.
        shot_end: The text after each shot.
        last_shot_end: The text after the last shot in place of `shot_end`, or after the header if
            there are no shots; None if nothing differs.
        judge: How the model's choice is found: `letters` takes the likeliest of the letters'
            tokens, `text` looks for a letter in the likeliest token of the whole vocabulary, and
            `exact` compares the text that the model goes on with.
        published: What others have published for a model, each with how it was asked.
        is_chat: Whether the model is asked by the turns of a chat.
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
    judge: Literal["letters", "text", "exact"] = "letters"
    option: str = "{letter}. {option}\n"
    is_chat: bool = False
    published: Sequence[str] = ()

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
        """Returns the prompt's text for `question`, after the solved questions `shots`.

        Turns of a chat stand behind the names of ChatGLM3's role tokens.
        """
        if self.is_chat:
            turns = self.turns(question, shots)
            return "".join(f"<|{role}|>\n{text}" for role, text in turns)
        solved = [self._asked(shot) + self._solution(shot) for shot in shots]
        text = self._header(question) + self.shot_end.join(solved)
        if self.last_shot_end is not None:
            text += self.last_shot_end
        elif solved:
            text += self.shot_end
        return text + self._asked(question) + self.cue

    def turns(
        self, question: Question, shots: Sequence[Question]
    ) -> list[tuple[Literal["user", "assistant"], str]]:
        """Returns the prompt as the turns of a chat, of which the assistant's last one is begun."""
        turns: list[tuple[Literal["user", "assistant"], str]] = []
        for index, one in enumerate([*shots, question]):
            is_shot = index < len(shots)
            header = "" if index else self._header(question)
            turns.append(("user", header + self._asked(one).rstrip("\n")))
            turns.append(("assistant", self._solution(one) if is_shot else self.cue))
        return turns

    def _header(self, question: Question) -> str:
        return self.header.format(subject=self.title(question.subject))

    def _asked(self, question: Question) -> str:
        options = zip(question.letters, question.choices, strict=True)
        return self.question.format(text=question.text) + "".join(
            self.option.format(letter=letter, option=option) for letter, option in options
        )

    def _solution(self, shot: Question) -> str:
        return self.cue + self.gap + shot.answer
