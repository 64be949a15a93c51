"""Whole runs on an engine that answers by arithmetic: counting, resuming, sharing, and refusing."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import pytest

from glm3cli.config.evaluation import MmluConfig
from glm3cli.config.parallel import ParallelConfig
from glm3cli.errors import CheckpointError, ConfigError
from glm3cli.evals.ledger import Status
from glm3cli.evals.spread import Batch, spread
from glm3cli.infer.scoring import NextToken
from glm3cli.parallel.groups import open_grid
from tests.support.exam import (
    FakeEngine,
    FakeModel,
    exam_tokenizer,
    exam_tokenizer_folder,
    likeliest,
    run,
    score,
    write_exam,
)
from tests.support.ranks import RankPool
from tests.support.shared import SHARED, needs_shared

SIZES = {"astronomy": 7, "law": 5, "virology": 9}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """What the runner is given instead of a model."""
    engine = FakeEngine(exam_tokenizer())
    install(monkeypatch, engine)
    return engine


def install(monkeypatch: pytest.MonkeyPatch, engine: FakeEngine) -> None:
    monkeypatch.setattr("glm3cli.evals.runner.open_here", lambda _config: FakeModel(engine))


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """The options of a small run."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    return {
        "model": model,
        "data_dir": write_exam(tmp_path / "exam", SIZES),
        "output": tmp_path / "results.json",
        "batch_size": 4,
    }


def test_choices_are_the_likeliest_letters(engine: FakeEngine, options: dict[str, Any]) -> None:
    result = run(MmluConfig.parse(options))
    asked = [prompt for batch in engine.batches for prompt in batch]
    assert len(asked) == len(set(asked)) == 21  # one pass each
    tokenizer = exam_tokenizer()
    letters = [tokenizer.encode(f"Answer: {letter}")[-1] for letter in "ABCD"]
    by_scores = {tuple(score(prompt, token) for token in letters) for prompt in asked}
    assert {tuple(question["scores"]) for question in result["questions"]} == by_scores
    for question in result["questions"]:
        assert question["choice"] == "ABCD"[question["scores"].index(max(question["scores"]))]
        assert question["answer"] == "ABCD"[question["index"] % 4]
        assert "text" not in question
    order = [(question["subject"], question["index"]) for question in result["questions"]]
    assert order == [(name, i) for name, size in SIZES.items() for i in range(size)]


def test_result_has_counts_and_settings(engine: FakeEngine, options: dict[str, Any]) -> None:
    result = run(MmluConfig.parse(options))
    assert json.loads(options["output"].read_text()) == result
    right = sum(question["choice"] == question["answer"] for question in result["questions"])
    assert result["micro"] == right / 21
    assert result["stderr"] == math.sqrt(right / 21 * (1 - right / 21) / 21)
    accuracies = [one["accuracy"] for one in result["subjects"].values()]
    assert result["macro"] == pytest.approx(sum(accuracies) / 3)
    assert result["unknown_subjects"] == ["law"]
    assert (result["benchmark"], result["protocol"], result["shots"]) == ("mmlu", "logits", 5)
    assert (result["is_score"], result["unparsed"], result["shortened"]) == (True, 0, 0)
    assert result["settings"]["model"] == str(options["model"])
    assert result["settings"]["device"] == "cpu"
    assert result["versions"].keys() >= {"glm3", "torch", "megatron-core"}
    assert sorted(path.name for path in options["output"].parent.iterdir()) == [
        "exam",
        "model",
        "results.html",
        "results.json",
    ]


def test_batch_size_changes_nothing(engine: FakeEngine, options: dict[str, Any]) -> None:
    results = [run(MmluConfig.parse(options | {"batch_size": size})) for size in (1, 4, 64)]
    for result in results:
        result["settings"].pop("batch_size")
    assert results[0] == results[1] == results[2]


def test_subjects_follow_each_other_longest_first(
    engine: FakeEngine, options: dict[str, Any]
) -> None:
    result = run(MmluConfig.parse(options))
    lengths = [len(prompt) for batch in engine.batches for prompt in batch]
    assert [len(batch) for batch in engine.batches] == [4, 4, 4, 4, 4, 1]
    assert lengths[0] == max(lengths)
    sizes = [len(list(same)) for _, same in groupby(_subjects_asked(engine, result))]
    assert sorted(sizes) == sorted(SIZES.values())
    for start, size in zip(accumulate(sizes, initial=0), sizes, strict=False):
        own = lengths[start : start + size]
        assert own == sorted(own, reverse=True)


def _subjects_asked(engine: FakeEngine, result: Any) -> list[str]:
    """The subject of every prompt, in the order in which they were asked."""
    letters = [exam_tokenizer().encode(f"Answer: {letter}")[-1] for letter in "ABCD"]
    by_scores = {tuple(one["scores"]): one["subject"] for one in result["questions"]}
    return [
        by_scores[tuple(score(prompt, token) for token in letters)]
        for batch in engine.batches
        for prompt in batch
    ]


def test_limit_is_marked_as_no_score(engine: FakeEngine, options: dict[str, Any]) -> None:
    result = run(MmluConfig.parse(options | {"limit": 2, "subjects": "law"}))
    assert not result["is_score"]
    assert len(result["questions"]) == 2


def test_dropped_shots_are_reported(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    tokenizer = exam_tokenizer()
    whole = FakeEngine(tokenizer)
    install(monkeypatch, whole)
    full = run(MmluConfig.parse(options))
    longest = max(len(prompt) for batch in whole.batches for prompt in batch)
    install(monkeypatch, FakeEngine(tokenizer, seq_length=longest - 1))
    result = run(MmluConfig.parse(options))
    shots = [question["shots"] for question in result["questions"]]
    assert result["shortened"] == sum(number < 5 for number in shots) > 0
    assert min(shots) == 4
    assert result["over_length"] == 0
    assert result["prompt_sha256"] != full["prompt_sha256"]
    install(monkeypatch, FakeEngine(tokenizer, seq_length=16))
    result = run(MmluConfig.parse(options))
    assert (result["shortened"], result["over_length"]) == (21, 21)


def test_modellink_reads_one_greedy_token(engine: FakeEngine, options: dict[str, Any]) -> None:
    result = run(MmluConfig.parse(options | {"protocol": "modellink"}))
    tokenizer = exam_tokenizer()
    prompts = [prompt for batch in engine.batches for prompt in batch]
    assert len(prompts) == 21
    best = [likeliest(prompt, tokenizer.vocab_size) for prompt in prompts]
    said = sorted(tokenizer.decode([token]) for token in best)
    assert sorted(question["text"] for question in result["questions"]) == said
    assert result["unparsed"] == sum(q["choice"] is None for q in result["questions"]) > 0
    assert all(len(question["scores"]) == 4 for question in result["questions"])
    right = sum(question["choice"] == question["answer"] for question in result["questions"])
    assert result["micro"] == right / 21


def test_nan_is_refused(
    engine: FakeEngine, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    nan = NextToken([math.nan] * 4, 0)
    monkeypatch.setattr(engine, "ask_next", lambda prompts, _letters: lambda: [nan] * len(prompts))
    with pytest.raises(CheckpointError, match="NaN for question"):
        run(MmluConfig.parse(options))
    assert not options["output"].exists()


def test_reports_every_round(engine: FakeEngine, options: dict[str, Any]) -> None:
    seen: list[Status] = []
    shown: list[int] = []

    @contextmanager
    def display(total: int) -> Iterator[Any]:
        shown.append(total)
        yield seen.append

    result = run(MmluConfig.parse(options), display=display)
    assert shown == [21]
    assert [status.done for status in seen] == [4, 8, 12, 16, 20, 21]
    finished = {name: counts for status in seen for name, counts in status.finished.items()}
    assert finished == result["subjects"]


class CutOff(Exception):
    """The power is gone."""


def _cut_off_after(engine: FakeEngine, calls: int) -> None:
    left = calls

    def on_call() -> None:
        nonlocal left
        if left == 0:
            raise CutOff
        left -= 1

    engine.on_call = on_call


class Rounding(FakeEngine):
    """An engine whose scores depend on all that it has read since it was told to forget.

    So do a real one's, by some roundings.
    """

    def ask_next(
        self, prompts: Sequence[Sequence[int]], candidates: Sequence[int]
    ) -> Callable[[], list[NextToken]]:
        super().ask_next(prompts, candidates)
        read = [
            token for batch in self.batches[self.forgotten[-1] :] for one in batch for token in one
        ]
        found = [
            NextToken([score([*read, *prompt], token) for token in candidates], 0)
            for prompt in prompts
        ]
        return lambda: found


def test_a_run_cut_off_at_any_moment_ends_with_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr("glm3cli.evals.spread._TOKENS", 500)  # so that there are some stretches
    output = options["output"]
    sidecar = output.with_name("results.json.partial.jsonl")
    engine = Rounding(exam_tokenizer())
    install(monkeypatch, engine)
    run(MmluConfig.parse(options))
    whole = output.read_bytes()
    stretches, count = engine.forgotten, len(engine.batches)
    assert 1 < len(stretches) < count
    for calls in range(count):
        output.unlink()
        engine = Rounding(exam_tokenizer())
        install(monkeypatch, engine)
        _cut_off_after(engine, calls)
        with pytest.raises(CutOff):
            run(MmluConfig.parse(options))
        assert not output.exists()
        with sidecar.open("a") as file:
            file.write('{"subject": "law", "ind')  # was being written when it happened
        engine = Rounding(exam_tokenizer())
        install(monkeypatch, engine)
        run(MmluConfig.parse(options | {"resume": True}))
        assert output.read_bytes() == whole
        # The answers to the last batch were not waited for. Stretches before its are not repeated.
        assert len(engine.batches) == count - max(i for i in stretches if i <= max(calls - 1, 0))
        assert not sidecar.exists()


def test_another_batch_size_is_no_other_run(engine: FakeEngine, options: dict[str, Any]) -> None:
    whole = run(MmluConfig.parse(options))
    _cut_off_after(engine, 3)
    with pytest.raises(CutOff):
        run(MmluConfig.parse(options))
    engine.on_call = lambda: None
    resumed = run(MmluConfig.parse(options | {"resume": True, "batch_size": 5}))
    assert resumed["questions"] == whole["questions"]


@pytest.mark.parametrize(
    "change", [{"shots": 4}, {"protocol": "modellink"}, {"dtype": "bf16"}, {"limit": 3}]
)
def test_resume_refuses_other_settings(
    engine: FakeEngine, options: dict[str, Any], change: dict[str, Any]
) -> None:
    _cut_off_after(engine, 1)
    with pytest.raises(CutOff):
        run(MmluConfig.parse(options))
    with pytest.raises(ConfigError, match=r"--resume: .*partial\.jsonl is of a run with other"):
        run(MmluConfig.parse(options | {"resume": True} | change))


def test_resume_refuses_other_weights(engine: FakeEngine, options: dict[str, Any]) -> None:
    _cut_off_after(engine, 1)
    with pytest.raises(CutOff):
        run(MmluConfig.parse(options))
    (options["model"] / "model.safetensors").write_bytes(b"others!")
    with pytest.raises(ConfigError, match="weights"):
        run(MmluConfig.parse(options | {"resume": True}))


def test_without_resume_it_starts_anew(engine: FakeEngine, options: dict[str, Any]) -> None:
    _cut_off_after(engine, 1)
    with pytest.raises(CutOff):
        run(MmluConfig.parse(options))
    engine.on_call = lambda: None
    engine.batches.clear()
    run(MmluConfig.parse(options))
    assert sum(len(batch) for batch in engine.batches) == 21


def run_fake_on_rank(options: dict[str, Any]) -> tuple[Any, int]:
    """A run on this rank of a data parallel group; the result and the questions it was asked."""
    with open_grid(ParallelConfig()) as grid, pytest.MonkeyPatch.context() as patch:
        engine = FakeEngine(exam_tokenizer(), grid=grid)
        install(patch, engine)
        result = run(MmluConfig.parse(options))
        return result, sum(len(batch) for batch in engine.batches)


@pytest.mark.dist
def test_data_parallel_ranks_share_the_questions(
    engine: FakeEngine, options: dict[str, Any], ranks: RankPool
) -> None:
    alone = run(MmluConfig.parse(options))
    exam_tokenizer_folder()
    shared = ranks.run(3, run_fake_on_rank, options)
    assert sum(asked for _, asked in shared) == 21
    for result, _ in shared:
        assert result["questions"] == alone["questions"]
        assert result["micro"] == alone["micro"]
    assert json.loads(options["output"].read_text()) == shared[0][0]


def spread_on_rank() -> list[dict[int, int]]:
    stretches = [[Batch((2 * i, 2 * i + 1), cost=1 + i % 3)] for i in range(50)]
    with open_grid(ParallelConfig()) as grid:
        squares = spread(grid, stretches, lambda batch: lambda: [one**2 for one in batch.members])
        return list(squares)


def test_every_rank_has_all_answers_after_each_of_some_rounds(ranks: RankPool) -> None:
    first, second = ranks.run(2, spread_on_rank)
    assert first == second
    assert len(first) > 2
    merged = [pair for found in first for pair in found.items()]
    assert sorted(merged) == [(one, one**2) for one in range(100)]


@needs_shared
def test_all_subjects_of_mmlu_are_known(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    install(monkeypatch, FakeEngine(exam_tokenizer(), seq_length=10**6))
    data = {"data_dir": SHARED / "mmlu" / "data", "shots": 0, "limit": 5}
    result = run(MmluConfig.parse(options | data))
    assert len(result["questions"]) == 57 * 5
    assert len(result["subjects"]) == 57
    assert result["unknown_subjects"] == []
    assert list(result["categories"]) == ["STEM", "humanities", "social sciences", "other"]
