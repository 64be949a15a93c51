"""--eval-suite: the model that trains has the score that `eval` gives it, at all parallel sizes."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from glm3cli.config.training import PretrainConfig
from glm3cli.errors import ConfigError, DataError
from glm3cli.evals.suites.named import read_suites
from tests.support.exam import run_on_rank, write_exam, write_exam_model
from tests.support.project import records
from tests.support.ranks import RankPool
from tests.support.samples import write_documents

SIZES: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "tp2": (2, {"tp": 2}),
    "cp2": (2, {"cp": 2}),
    "dp2, an adapter": (2, {"lora_rank": 2}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2, "micro_batch_size": 2}),
}


def train_on_a_rank(options: dict[str, Any]) -> None:
    """Trains as the command does; runs on a rank of the pool."""
    from glm3cli.config.training import FinetuneConfig
    from glm3cli.data.kinds import TEXT
    from glm3cli.evals.suites.in_training import make_probes
    from glm3cli.train.start import train

    kind = FinetuneConfig if "lora_rank" in options else PretrainConfig
    config = kind.parse(options)
    suites = read_suites(config.eval_suite)
    train(
        config,
        TEXT,
        lambda: nullcontext(lambda _progress: None),
        lambda _line: None,
        lambda *given: make_probes(suites, *given),
    )


@pytest.mark.dist
@pytest.mark.slow
def test_the_score_is_that_of_eval_at_all_parallel_sizes(ranks: RankPool, tmp_path: Path) -> None:
    model = write_exam_model(tmp_path / "model")
    exam = write_exam(tmp_path / "exam", {"astronomy": 13, "virology": 14, "law": 6})
    prefix = write_documents(tmp_path / "text", [[*range(20, 400)] * 8] * 4)
    options = {"model": model, "data_dir": exam, "device": "cpu", "limit": 12}
    [expected] = ranks.run(1, run_on_rank, options | {"output": tmp_path / "results.json"})
    for name, (world_size, sizes) in SIZES.items():
        run = tmp_path / name
        changes = {
            "model": model,
            "data": [prefix],
            "split": "50,50,0",
            "eval_iters": 1,
            "save": run,
            "train_iters": 1,
            "seq_length": 1024,
            "micro_batch_size": 1,
            "global_batch_size": 4,
            "lr": 1e-9,
            "dtype": "fp32",
            "device": "cpu",
            "eval_interval": 1,
            "eval_suite": [f"mmlu={exam}:12"],
            **sizes,
        }
        ranks.run(world_size, train_on_a_rank, changes)
        [line] = [record for record in records(run) if "validation_loss" in record]
        score = line["validation_eval suite/mmlu"]
        assert score == pytest.approx(expected["micro"]), name
        page = (run / "report.html").read_text("utf-8")
        assert "Eval suite" in page
        assert json.dumps("mmlu, validation") in page


@pytest.mark.parametrize(
    ("item", "sentence"),
    [
        ("mmlu", "is no NAME=DIR"),
        ("mmlu=", "is no NAME=DIR"),
        ("gsm8k=x", "'gsm8k' is no benchmark; there are mmlu, ceval, cmmlu"),
        ("mmlu=x:0", "asks no question"),
    ],
)
def test_wrong_suites_are_refused(tmp_path: Path, item: str, sentence: str) -> None:
    options = {"model": tmp_path, "data": ["x"], "save": tmp_path, "train_iters": 1}
    options |= {"seq_length": 8, "lr": 1e-3, "eval_suite": [item]}
    with pytest.raises(ConfigError, match=sentence):
        PretrainConfig.parse(options | {"eval_interval": 1})


def test_a_suite_needs_an_interval_and_a_folder(tmp_path: Path) -> None:
    options = {"model": tmp_path, "data": ["x"], "save": tmp_path, "train_iters": 1}
    options |= {"seq_length": 8, "lr": 1e-3, "eval_suite": ["mmlu=a:b:5"]}
    with pytest.raises(ConfigError, match="--eval-suite goes by validations"):
        PretrainConfig.parse(options)
    with pytest.raises(DataError, match="--data-dir a:b does not exist"):
        read_suites(["mmlu=a:b:5"])
