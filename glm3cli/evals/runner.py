"""Runs a multiple-choice benchmark: asks a model all questions and writes the result.

`run_benchmark` is the entry. The data parallel ranks share the batches; after each round every rank
has all answers so far (`ledger`), and rank 0 appends them to the answer file (`resume`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from glm3cli.config.evaluation import EvalConfig, QuestionOptions
from glm3cli.evals.exact import ExactRule
from glm3cli.evals.ledger import Display, Ledger, key_of, no_display
from glm3cli.evals.page.write import write_result
from glm3cli.evals.prompts import Prompt, build_prompts, hash_texts
from glm3cli.evals.questions import Subject, read_subjects
from glm3cli.evals.results import Answer, EvalResult
from glm3cli.evals.resume import AnswerFile, Key, run_key
from glm3cli.evals.suite import Suite
from glm3cli.evals.summary import build_result, notes_of
from glm3cli.host.files import write_json
from glm3cli.infer.opening import open_here

if TYPE_CHECKING:
    from glm3cli.data.tokens.tokenizer import Tokenizer
    from glm3cli.evals.spread import Batch, Stretch
    from glm3cli.infer.engine import Engine


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

    Of a stretch in which an answer is missing all are asked again, so that the run has the answers
    of one that was never cut off, to the last bit.

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
    known = from_first_rank(engine.grid, dict(known))
    stretches = _stretches(ledger.prompts, batch_size, engine.grid.dp_size)
    todo = ledger.begin(known, stretches)

    def begin(batch: "Batch") -> Callable[[], list[Answer]]:
        with ledger.in_model():
            asked = [ledger.prompts[i] for i in batch.members]
            wait = judge.ask(asked, anew=batch.is_first)

        def answers() -> list[Answer]:
            with ledger.in_model():
                return wait()

        return answers

    for found in spread(engine.grid, todo, begin):
        ledger.add({key_of(ledger.prompts[i]): answer for i, answer in found.items()})


def _stretches(prompts: Sequence[Prompt], batch_size: int, num_shares: int) -> "list[Stretch]":
    """Returns the positions of all prompts in stretches of batches.

    The subjects come one after the other, so that what their prompts begin with is read once, and
    so that each finishes early and is reported. The longest prompts of a subject come first, and
    so does the subject with the longest prompt: a lack of memory shows in the first batch.
    """
    from glm3cli.evals.spread import stretches_in_order

    rows = [prompt.token_ids for prompt in prompts]
    by_subject: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_subject.setdefault(prompt.question.subject, []).append(i)
    subjects = [sorted(group, key=lambda i: -len(rows[i])) for group in by_subject.values()]
    subjects.sort(key=lambda members: -len(rows[members[0]]))
    order = [i for members in subjects for i in members]
    return stretches_in_order(order, rows, batch_size, num_shares)
