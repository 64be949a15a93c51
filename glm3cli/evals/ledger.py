"""`Ledger`: keeps the answers of a run as they come, and tells how far it is."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from glm3cli.evals.prompts import Prompt
from glm3cli.evals.results import Answer, QuestionResult, Tally, tally_subjects
from glm3cli.evals.resume import AnswerFile, Key

if TYPE_CHECKING:
    from glm3cli.evals.spread import Stretch


@dataclass(frozen=True)
class Status:
    """The progress of a benchmark run after a round of batches.

    Attributes:
        done: Number of questions answered so far.
        total: Number of questions of the whole run.
        finished: The tally of each subject whose last question this round has answered, by the
            subject's name.
        known: Number of questions that an earlier run has answered.
        seconds: The time since the first question was asked.
        model_seconds: The part of it that was spent in the model.
    """

    done: int
    total: int
    finished: Mapping[str, Tally]
    known: int = 0
    seconds: float = 0.0
    model_seconds: float = 0.0


Report = Callable[[Status], None]
# Opens the display of a run of so many questions, and gives what is called with its progress.
Display = Callable[[int], AbstractContextManager[Report]]


@contextmanager
def no_display(_total: int) -> Iterator[Report]:
    """The display of a run that nobody watches."""
    yield lambda _status: None


@dataclass
class Ledger:
    """The answers of a run so far; every rank has a ledger with the same answers.

    Attributes:
        prompts: One prompt per question, in the order of the result.
        answers: The answer of each question asked so far, by subject and index.
        answer_file: The file that saves the answers for `--resume`; set on rank 0 only.
        report: Called after each round of answers; set on rank 0 only.
        model_seconds: The time that this rank has spent in the model so far.
    """

    prompts: Sequence[Prompt]
    answers: dict[Key, Answer] = field(default_factory=dict)
    answer_file: AnswerFile | None = None
    report: Report | None = None
    model_seconds: float = 0.0

    def __post_init__(self) -> None:
        self._begun = time.monotonic()
        self._num_known = 0
        self._by_subject: dict[str, list[Prompt]] = {}
        for prompt in self.prompts:
            self._by_subject.setdefault(prompt.question.subject, []).append(prompt)

    def begin(self, known: Mapping[Key, Answer], stretches: "Sequence[Stretch]") -> "list[Stretch]":
        """Takes over the answers of an earlier run, those of whole stretches.

        Args:
            known: The answers.
            stretches: The positions of all prompts.

        Returns:
            The stretches in which an answer is missing.
        """
        keys = [key_of(prompt) for prompt in self.prompts]
        todo = [
            stretch
            for stretch in stretches
            if any(keys[i] not in known for batch in stretch for i in batch.members)
        ]
        again = {keys[i] for stretch in todo for batch in stretch for i in batch.members}
        known = {key: answer for key, answer in known.items() if key not in again}
        self.answers.update(known)
        self._num_known, self._begun = len(known), time.monotonic()
        if self.answer_file is not None:
            self.answer_file.start(known)
        return todo

    def add(self, new: Mapping[Key, Answer]) -> None:
        """Adds the answers of a round of batches, saves them, and reports the progress."""
        self.answers.update(new)
        if self.answer_file is not None:
            self.answer_file.add(new)
        if self.report is not None:
            self.report(
                Status(
                    done=len(self.answers),
                    total=len(self.prompts),
                    finished=self._finished(new),
                    known=self._num_known,
                    seconds=time.monotonic() - self._begun,
                    model_seconds=self.model_seconds,
                )
            )

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Counts the time of a block as spent in the model."""
        begun = time.monotonic()
        yield
        self.model_seconds += time.monotonic() - begun

    def _finished(self, new: Mapping[Key, Answer]) -> dict[str, Tally]:
        """Returns the tallies of the subjects that are complete now and weren't before `new`."""
        finished: dict[str, Tally] = {}
        for subject in sorted({subject for subject, *_ in new}):
            prompts = self._by_subject[subject]
            if all(key_of(prompt) in self.answers for prompt in prompts):
                in_place = [prompt for prompt in prompts if not prompt.question.rotation]
                finished |= tally_subjects(question_results(in_place, self.answers))
        return finished


def key_of(prompt: Prompt) -> Key:
    """Returns the key of a prompt's answer: the question, and the places of its options."""
    question = prompt.question
    return question.subject, question.index, question.rotation


def question_results(
    prompts: Sequence[Prompt], answers: Mapping[Key, Answer]
) -> list[QuestionResult]:
    """Returns each question's entry in the result, in the prompts' order."""
    results = []
    for prompt in prompts:
        answer = answers[key_of(prompt)]
        result = QuestionResult(
            subject=prompt.question.subject,
            index=prompt.question.index,
            scores=list(answer.scores),
            choice=answer.choice,
            answer=prompt.question.answer,
            shots=prompt.num_shots,
        )
        if answer.text is not None:
            result["text"] = answer.text
        if answer.is_right is not None:
            result["is_right"] = answer.is_right
        if prompt.question.rotation:
            result["rotation"] = prompt.question.rotation
        results.append(result)
    return results
