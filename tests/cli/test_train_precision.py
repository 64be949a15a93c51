"""Training in 16 bits by the command, from the weights of a model folder."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.project import Project, steps
from tests.support.ranks import RankPool
from tests.support.train_command import losses, options, succeed

# One rounding of the loss in the type. Weights that weren't loaded, or fp32 copies that weren't
# made of them, give NaN or are off by more than 1 %.
TOLERANCE = {"bf16": 2.0**-8, "fp16": 2.0**-11}
SIZES: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {}),
}


def train_on_a_rank(changes: dict[str, Any]) -> None:
    """Runs the core of the command; runs on a rank of the pool."""
    from glm3cli.config.training import PretrainConfig
    from glm3cli.data.kinds import TEXT
    from glm3cli.train.start import train

    def display() -> Any:
        return nullcontext(lambda _progress: None)

    train(PretrainConfig.parse(changes), TEXT, display, lambda _line: None)


def settings(project: Project, save: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": project.model,
        "data": [str(project.text)],
        "save": save,
        "train_iters": 6,
        "seq_length": 16,
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "device": "cpu",
        "lr": 1e-3,
        "lr_decay_style": "constant",
        "save_interval": 3,
        **changes,
    }


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_one_rank_trains_as_in_fp32_and_goes_on_as_if_it_had_not_stopped(
    first: tuple[Path, Any], project: Project, tmp_path: Path, dtype: str
) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    succeed(*options(project, run, dtype=dtype))
    assert losses(run) == pytest.approx(losses(first[0]), rel=TOLERANCE[dtype])
    assert losses(run) != losses(first[0])
    assert [step["loss_scale"] for step in steps(run)] == [4096 if dtype == "fp16" else 1] * 6
    succeed(*options(project, again, dtype=dtype, resume=run / "iter_0000003"))
    assert losses(again) == losses(run)[3:]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("dtype", "sizes"), [("bf16", "tp2"), ("bf16", "pp2"), ("bf16", "dp2"), ("fp16", "dp2")]
)
def test_ranks_train_as_one_in_fp32(
    first: tuple[Path, Any],
    project: Project,
    ranks: RankPool,
    tmp_path: Path,
    dtype: str,
    sizes: str,
) -> None:
    number, changes = SIZES[sizes]
    ranks.run(number, train_on_a_rank, settings(project, tmp_path / "run", dtype=dtype, **changes))
    found = np.array(losses(tmp_path / "run"))
    assert found == pytest.approx(losses(first[0]), rel=TOLERANCE[dtype])
    resumed = {"resume": str(tmp_path / "run/iter_0000003"), "dtype": dtype, **changes}
    ranks.run(number, train_on_a_rank, settings(project, tmp_path / "again", **resumed))
    assert losses(tmp_path / "again") == losses(tmp_path / "run")[3:]
