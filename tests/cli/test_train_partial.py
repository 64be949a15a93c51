"""`glm3 finetune --train-only` and `--freeze`: what changes, what is planned, what is refused."""

import re
from pathlib import Path

import pytest
import torch

from glm3cli.checkpoint.layouts.opening import open_source
from tests.support.project import Project, call
from tests.support.train_command import losses, options, succeed
from tests.support.weights import weights_of


def test_a_run_is_a_model_in_which_the_chosen_weights_changed(
    project: Project, tmp_path: Path
) -> None:
    changes = {"train_only": r"layers\.1\.mlp", "lr": 1e-2}
    succeed(*options(project, tmp_path / "run", "finetune", **changes))
    before, after = (weights_of(open_source(p)) for p in (project.model, tmp_path / "run"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"transformer.encoder.layers.1.mlp.{name}.weight"
        for name in ("dense_h_to_4h", "dense_4h_to_h")
    }


def test_it_goes_on_where_it_was(project: Project, tmp_path: Path) -> None:
    changes = {"freeze": "word_embeddings|norm", "lr": 1e-2}
    for folder, steps in (("whole", [6]), ("parts", [3, 6])):
        for number in steps:
            words = options(project, tmp_path / folder, "finetune", **changes, train_iters=number)
            succeed(*words)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_the_plan_counts_what_is_trained(project: Project, tmp_path: Path) -> None:
    six_b = {"model": None, "from_scratch": True, "model_config": "6b"}
    six_b["tokenizer"] = project.tokenizer
    found = [
        succeed(*options(project, tmp_path / "run", "finetune", dry_run=True, **changes)).out
        for changes in (six_b, six_b | {"freeze": "mlp"})
    ]
    whole, part = ([float(x) for x in re.findall(r"gradients ([\d.]+) GiB", o)] for o in found)
    # Two thirds of the 6B model's weights are those of its MLPs; gradients take 4 bytes each.
    mlp = 28 * 3 * 4096 * 13696 * 4 / 2**30
    assert whole[0] - part[0] == pytest.approx(mlp, abs=0.02)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_only": "dense_5h"}, "--train-only dense_5h matches no weight"),
        ({"train_only": "."}, "--train-only . matches every weight"),
        ({"freeze": "weights"}, "--freeze weights matches no weight"),
        ({"freeze": "transformer"}, "--freeze transformer matches every weight"),
        ({"freeze": "("}, "--freeze (: is no regular expression"),
        ({"freeze": "norm", "train_only": "mlp"}, "give --train-only or --freeze, not both"),
        ({"freeze": "norm", "lora_rank": 4}, "--lora-target chooses the layers of an adapter"),
    ],
    ids=str,
)
def test_what_is_refused(project: Project, tmp_path: Path, changes: dict, words: str) -> None:
    ended = call(*options(project, tmp_path / "run", "finetune", **changes))
    assert ended.code == 2
    assert words in " ".join(ended.err.split())
    if "matches" in words:
        assert "transformer.embedding.word_embeddings.weight" in ended.err
