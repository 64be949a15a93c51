"""Makes a result of the answers to all questions, and says what limits it."""

from collections.abc import Iterator, Mapping, Sequence

from glm3cli.config.evaluation import QuestionOptions
from glm3cli.evals.ledger import question_results
from glm3cli.evals.prompts import Prompt, hash_texts
from glm3cli.evals.results import (
    PACKAGES,
    Answer,
    EvalResult,
    mean_accuracy,
    right_by_subject,
    rotations_of,
    tally,
    tally_categories,
)
from glm3cli.evals.resume import Key
from glm3cli.evals.statistics import clustered_stderr, interval_of, smallest_difference
from glm3cli.evals.suite import Suite
from glm3cli.host.versions import versions

# Options that say how a run is begun, and nothing about its result.
_OF_A_START = {"resume", "json"}


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
