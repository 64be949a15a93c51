"""Decoding and evaluation on the emulated NPU equal those on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_engine import LENGTH, MODEL, PROMPTS, random_source
from tests.support.checkpoints import random_weights, write_hf
from tests.support.exam import EXAM_MODEL, exam_tokenizer_folder, write_exam
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


def answers(options: dict[str, Any]) -> dict[tuple[str, int], Any]:
    """Returns MMLU's answers as the command finds them."""
    from glm3cli.config.evaluation import MmluConfig
    from glm3cli.evals.ledger import Ledger
    from glm3cli.evals.prompts import build_prompts
    from glm3cli.evals.questions import read_subjects
    from glm3cli.evals.runner import answer_all
    from glm3cli.evals.suites.mmlu import suite_of
    from glm3cli.infer.load import open_model

    config = MmluConfig.parse(options)
    suite = suite_of("logits")
    subjects = read_subjects(suite, config.data_dir, config.subject_names, config.shots, None)
    with open_model(config) as model:
        engine, tokenizer = model.engine, model.tokenizer
        prompts = build_prompts(suite, subjects, tokenizer, engine.model.seq_length)
        ledger = Ledger(prompts)
        answer_all(engine, tokenizer, suite, ledger, {}, config.batch_size)
        return ledger.answers


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_mmlu_choices_are_the_cpus(
    ranks: RankPool, npu_ranks: RankPool, tmp_path: Path, dtype: str
) -> None:
    weights = random_weights(EXAM_MODEL, torch.float32)  # large: the questions count
    write_hf(tmp_path / "model", model=EXAM_MODEL, weights=weights)
    exam = write_exam(tmp_path / "exam", {"anatomy": 6, "virology": 5})
    options = {
        "model": tmp_path / "model",
        "tokenizer": exam_tokenizer_folder(),
        "data_dir": exam,
        "output": tmp_path / "unused.json",
        "dtype": dtype,
        "batch_size": 3,
    }
    [expected], [found] = (pool.run(1, answers, options) for pool in (ranks, npu_ranks))
    assert len(found) == 11
    assert {k: one.choice for k, one in found.items()} == {
        k: one.choice for k, one in expected.items()
    }
    if dtype == "fp32":  # in 16 bits, scores of -16 differ in their second digit
        for key, one in found.items():
            # Random weights so large give scores of -20: 1e-5 of them is fp32's rounding.
            assert one.scores == pytest.approx(expected[key].scores, rel=1e-5, abs=1e-5)
    assert len({one.choice for one in expected.values()}) > 1
