"""Decoding and evaluation on the emulated NPU equal those on the CPU."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_engine import LENGTH, MODEL, PROMPTS, random_source
from tests.support.exam import exam_tokenizer_folder, write_exam, write_exam_model
from tests.support.ranks import RankPool

pytestmark = pytest.mark.dist


def generate(options: dict[str, int], dtype: Any) -> list[list[int]]:
    from glm3cli.config.parallel import ParallelConfig
    from glm3cli.infer.engine import Engine
    from glm3cli.infer.sampling import Sampling
    from glm3cli.parallel.groups import open_grid

    parallel = ParallelConfig(**options)
    with open_grid(parallel) as grid:
        engine = Engine(random_source(MODEL), parallel, dtype, grid)
        found = engine.generate(PROMPTS, Sampling(), LENGTH, stop_ids=[])
        return [one.token_ids for one in found]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("options", [{}, {"tp": 2}, {"pp": 2}], ids=str)
def test_greedy_tokens_are_the_cpus(
    ranks: RankPool, npu_ranks: RankPool, options: dict[str, int], dtype: str
) -> None:
    world_size = 2 if options else 1
    expected = ranks.run(world_size, generate, options, dtype)
    assert npu_ranks.run(world_size, generate, options, dtype) == expected


def choices(options: dict[str, Any]) -> dict[tuple[str, int], str | None]:
    """MMLU's answers as the command finds them."""
    from glm3cli.config.evaluation import MmluConfig
    from glm3cli.evals.mmlu import suite_of
    from glm3cli.evals.prompts import build_prompts
    from glm3cli.evals.questions import read_subjects
    from glm3cli.evals.runner import Ledger, answer_all
    from glm3cli.infer.load import open_engine

    config = MmluConfig.parse(options)
    suite = suite_of("logits")
    subjects = read_subjects(suite, config.data_dir, config.subject_names, config.shots, None)
    with open_engine(config) as (engine, tokenizer):
        prompts = build_prompts(suite, subjects, tokenizer, engine.model.seq_length)
        ledger = Ledger(prompts)
        answer_all(engine, tokenizer, suite, ledger, {}, config.batch_size)
        return {key: answer.choice for key, answer in ledger.answers.items()}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_mmlu_choices_are_the_cpus(
    ranks: RankPool, npu_ranks: RankPool, tmp_path: Path, dtype: str
) -> None:
    model = write_exam_model(tmp_path / "model")
    exam = write_exam(tmp_path / "exam", {"anatomy": 6, "virology": 5})
    options = {
        "model": model,
        "tokenizer": exam_tokenizer_folder(),
        "data_dir": exam,
        "output": tmp_path / "unused.json",
        "dtype": dtype,
        "batch_size": 3,
    }
    [expected] = ranks.run(1, choices, options)
    assert npu_ranks.run(1, choices, options) == [expected]
    assert len(expected) == 11
    assert len(set(expected.values())) > 1
