"""Runs a multiple-choice benchmark: asks a model all questions and writes the result.

`run_benchmark` is the entry. The data parallel ranks share the batches; after each round every rank
has all answers so far (`Ledger`), and rank 0 appends them to the answer file (`resume`).
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from glm3cli.config.evaluation import EvalConfig, QuestionOptions
from glm3cli.evals.exact import ExactRule
from glm3cli.evals.page.write import write_result
from glm3cli.evals.prompts import Prompt, build_prompts, hash_texts
from glm3cli.evals.questions import Subject, read_subjects
from glm3cli.evals.results import (
    PACKAGES,
    Answer,
    EvalResult,
    QuestionResult,
    Tally,
    mean_accuracy,
    right_by_subject,
    rotations_of,
    tally,
    tally_categories,
    tally_subjects,
)
from glm3cli.evals.resume import AnswerFile, Key, run_key
from glm3cli.evals.statistics import clustered_stderr, interval_of, smallest_difference
from glm3cli.evals.suite import Suite
from glm3cli.host.files import write_json
from glm3cli.host.versions import versions
from glm3cli.infer.opening import open_here

if TYPE_CHECKING:
    from glm3cli.data.tokens.tokenizer import Tokenizer
    from glm3cli.evals.spread import Batch
    from glm3cli.infer.engine import Engine


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
# Options that say how a run is begun, and nothing about its result.
_OF_A_START = {"resume", "json"}
# Opens the display of a run of so many questions, and gives what is called with its progress.
Display = Callable[[int], AbstractContextManager[Report]]


@contextmanager
def no_display(_total: int) -> Iterator[Report]:
    """The display of a run that nobody watches."""
    yield lambda _status: None


def run_benchmark(
    config: EvalConfig, suite: Suite, display: Display = no_display
) -> EvalResult | None:
    """Runs `suite` on a model, and writes the result to `config.output` on rank 0.

    Args:
        config: The model, the questions, the batch size, and the file for the result.
        suite: The benchmark.
        display: Shows the progress; what it gives is called on rank 0 after each round of batches.

    Returns:
        The result, on every rank; None in a process that has only started the ranks.

    Raises:
        CheckpointError: The model can't be read, or its log-probabilities are NaN.
        ConfigError: A setting doesn't fit, or `--resume` finds the answers of another run.
        DataError: A file of questions is missing or wrong, the model has no tokenizer, or a letter
            isn't one token of it.
    """
    subjects = read_subjects(
        suite, config.data_dir, config.subject_names, config.shots, config.limit
    )
    return ask_questions(config, suite, subjects, display)


def ask_questions(
    config: QuestionOptions,
    suite: Suite,
    subjects: Sequence[Subject],
    display: Display = no_display,
    rule: ExactRule | None = None,
) -> EvalResult | None:
    """Asks a model the questions of a suite, as `run_benchmark` does.

    Args:
        config: The model, the batch size, and the file for the result.
        suite: How questions are asked.
        subjects: The questions.
        display: Shows the progress.
        rule: How texts are compared, where the answers are texts.

    Returns:
        The result, on every rank; None in a process that has only started the ranks.
    """
    model = open_here(config)
    if model is None:
        return None
    suite = replace(suite, is_chat=config.chat_template)
    texts = [suite.prompt(q, one.shots) for one in subjects for q in one.questions]
    answer_file = AnswerFile(config.output, run_key(config, suite.protocol, hash_texts(texts)))
    rotated = [_rotated(one) for one in subjects] if config.rotate_choices else []
    with model:
        known = answer_file.read() if config.resume else {}
        engine, tokenizer = model.engine, model.tokenizer
        room = engine.model.seq_length - (rule.max_new_tokens if rule else 0)
        prompts = build_prompts(suite, [*subjects, *rotated], tokenizer, room)
        ledger = Ledger(prompts)
        with display(len(prompts)) as report:
            if engine.grid.rank == 0:
                ledger.answer_file, ledger.report = answer_file, report
            answer_all(engine, tokenizer, suite, ledger, known, config.batch_size, rule)
        result = build_result(config, suite, prompts, ledger.answers)
        result["settings"] |= _where(engine)
        if engine.grid.rank == 0:
            asked = [question for one in subjects for question in one.questions]
            write_result(config.output, result, asked, notes_of(result, suite))
            write_json(config.output, result)
            answer_file.remove()
    return result


def _rotated(subject: Subject) -> Subject:
    """Returns the questions of a subject with their options at all places but the first."""
    questions = tuple(
        question.rotated(places)
        for question in subject.questions
        for places in range(1, len(question.choices))
    )
    return replace(subject, questions=questions)


def _where(engine: "Engine") -> dict[str, Any]:
    from glm3cli.device import require_active

    return {"device": require_active().name, "world_size": engine.grid.world_size}


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

    def begin(self, known: Mapping[Key, Answer]) -> list[int]:
        """Takes over the answers of an earlier run.

        Returns:
            The positions in `prompts` of the questions that have no answer yet.
        """
        self.answers.update(known)
        self._num_known, self._begun = len(known), time.monotonic()
        if self.answer_file is not None:
            self.answer_file.start(known)
        return [i for i, prompt in enumerate(self.prompts) if key_of(prompt) not in known]

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


def answer_all(
    engine: "Engine",
    tokenizer: "Tokenizer",
    suite: Suite,
    ledger: Ledger,
    known: Mapping[Key, Answer],
    batch_size: int,
    rule: ExactRule | None = None,
) -> None:
    """Asks all questions of `ledger` that have no answer yet; adds the answers on every rank.

    Args:
        engine: This rank's part of the model.
        tokenizer: The model's tokenizer.
        suite: The benchmark.
        ledger: The prompts; receives the answers.
        known: The answers of an earlier run. Those of rank 0 count on every rank.
        batch_size: Most prompts that one model copy runs at once.
        rule: How texts are compared, where the answers are texts.

    Raises:
        CheckpointError: The model's log-probabilities are NaN.
        DataError: A letter isn't one token of the tokenizer.
    """
    from glm3cli.evals.exact import ExactJudge
    from glm3cli.evals.judge import Judge
    from glm3cli.evals.spread import from_first_rank, spread

    num_letters = max((len(one.question.choices) for one in ledger.prompts), default=0)
    judge: Judge | ExactJudge = (
        Judge(engine, tokenizer, suite, num_letters)
        if rule is None
        else ExactJudge(engine, tokenizer, rule, batch_size)
    )
    if rule is not None:
        batch_size *= 4  # of which so many run at once: the next begin where others end
    # Only the first rank's machine need have the file of the earlier run.
    todo = ledger.begin(from_first_rank(engine.grid, dict(known)))

    def begin(members: Sequence[int]) -> Callable[[], list[Answer]]:
        with ledger.in_model():
            wait = judge.ask([ledger.prompts[i] for i in members])

        def answers() -> list[Answer]:
            with ledger.in_model():
                return wait()

        return answers

    for found in spread(engine.grid, _batches(ledger.prompts, todo, batch_size), begin):
        ledger.add({key_of(ledger.prompts[i]): answer for i, answer in found.items()})


def _batches(prompts: Sequence[Prompt], todo: Sequence[int], batch_size: int) -> "list[Batch]":
    """Returns the positions of `todo` in batches.

    The subjects come one after the other, so that what their prompts begin with is read once, and
    so that each finishes early and is reported. The longest prompts of a subject come first, and
    so does the subject with the longest prompt: a lack of memory shows in the first batch.
    """
    from glm3cli.evals.spread import batches_in_order

    rows = [prompt.token_ids for prompt in prompts]
    by_subject: dict[str, list[int]] = {}
    for i in todo:
        by_subject.setdefault(prompts[i].question.subject, []).append(i)
    subjects = [sorted(group, key=lambda i: -len(rows[i])) for group in by_subject.values()]
    subjects.sort(key=lambda members: -len(rows[members[0]]))
    return batches_in_order([i for members in subjects for i in members], rows, batch_size)


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


def build_result(
    config: QuestionOptions, suite: Suite, prompts: Sequence[Prompt], answers: Mapping[Key, Answer]
) -> EvalResult:
    """Builds the result of a run: counts and averages of the answers, and the run's settings.

    Args:
        config: The options of the run.
        suite: The benchmark.
        prompts: One prompt per question, in the order of the result.
        answers: The answer to every prompt's question.
    """
    rotated = question_results([one for one in prompts if one.question.rotation], answers)
    prompts = [one for one in prompts if not one.question.rotation]
    questions = question_results(prompts, answers)
    right = right_by_subject(questions)
    subjects = {name: tally(values) for name, values in right.items()}
    total = tally([value for values in right.values() for value in values])
    clustered = clustered_stderr([[float(value) for value in one] for one in right.values()])
    result = EvalResult(
        benchmark=suite.name,
        protocol=suite.protocol,
        shots=config.shots,
        is_score=config.limit is None,
        micro=total["accuracy"],
        macro=mean_accuracy(subjects.values()),
        stderr=total["stderr"],
        interval=total["interval"],
        stderr_clustered=clustered,
        interval_clustered=None
        if clustered is None
        else interval_of(total["accuracy"], clustered, len(right) - 1),
        smallest_difference=smallest_difference(total["stderr"]),
        unparsed=sum(question["choice"] is None for question in questions),
        shortened=sum(prompt.num_shots < config.shots for prompt in prompts),
        over_length=sum(prompt.over_length for prompt in prompts),
        unknown_subjects=[name for name in subjects if not suite.knows(name)],
        subjects=subjects,
        categories=tally_categories(suite, subjects),
        questions=questions,
        prompt_sha256=hash_texts(prompt.text for prompt in prompts),
        settings={k: v for k, v in config.to_options().items() if k not in _OF_A_START},
        versions=versions(*PACKAGES),
    )
    if rotated:
        result |= EvalResult(  # type: ignore[typeddict-item]
            rotations=rotations_of(questions, rotated), rotated_questions=rotated
        )
    return result


def notes_of(result: EvalResult, suite: Suite) -> Iterator[str]:
    """Yields sentences about what limits a result, such as questions that were left out."""
    if not result["is_score"]:
        yield "Not a score: --limit left questions out."
    known = {name for subjects in suite.categories.values() for name in subjects}
    if missing := known - set(result["subjects"]):
        yield f"{len(missing)} of the benchmark's {len(known)} subjects were not asked."
    if result["unknown_subjects"] and known:
        yield f"Not among the benchmark's subjects: {', '.join(result['unknown_subjects'])}."
    if result["unparsed"]:
        yield f"{result['unparsed']:,} answers have no letter and count as wrong."
    if result["shortened"]:
        yield f"{result['shortened']:,} prompts lost shots to fit the model's sequence length."
    if result["over_length"]:
        yield f"{result['over_length']:,} prompts are longer than it even without shots."
    low, high = result["interval"]
    yield (
        f"95 % interval over questions: {low:.2%} to {high:.2%}; so many can show a difference of "
        f"{result['smallest_difference']:.2%} to a model that is asked others."
    )
    if result["interval_clustered"] is not None:
        low, high = result["interval_clustered"]
        yield f"95 % interval over subjects: {low:.2%} to {high:.2%}."
    if "rotations" in result:
        found = result["rotations"]
        told = ", ".join(f"{accuracy:.2%}" for accuracy in found["accuracies"])
        yield (
            f"With the options moved up by 0, 1, ... places: {told}. The same option at all "
            f"places: {found['consistent']:.2%}; right at all: {found['always_right']:.2%}."
        )
    if result["is_score"] and not missing:
        yield from suite.published
