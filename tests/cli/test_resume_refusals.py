"""Checkpoints that a training doesn't go on from, and what the user reads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.project import (
    Ended,
    Project,
    call,
)
from tests.support.train_command import checkpoints, options, succeed


def truncated(first: Path, folder: Path) -> Path:
    """Makes a checkpoint whose files of weights are cut in half."""
    damaged = folder / "iter_0000003"
    shutil.copytree(first / "iter_0000003", damaged)
    for file in damaged.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return damaged


def without(name: str) -> Callable[[Path, Path], Path]:
    def damage(first: Path, folder: Path) -> Path:
        damaged = folder / "iter_0000003"
        shutil.copytree(first / "iter_0000003", damaged)
        (damaged / name).unlink()
        return damaged

    return damage


def garbled(name: str) -> Callable[[Path, Path], Path]:
    def damage(first: Path, folder: Path) -> Path:
        damaged = folder / "iter_0000003"
        shutil.copytree(first / "iter_0000003", damaged)
        (damaged / name).write_bytes(b"\x80garbage")
        return damaged

    return damage


DAMAGES = {
    "truncated": truncated,
    "no metadata.json": without("metadata.json"),
    "no .metadata": without(".metadata"),
    "no common.pt": without("common.pt"),
    "garbled .metadata": garbled(".metadata"),
    "garbled common.pt": garbled("common.pt"),
    "garbled metadata.json": garbled("metadata.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(
    first: tuple[Path, Ended], project: Project, tmp_path: Path, damage: str
) -> None:
    damaged = DAMAGES[damage](first[0], tmp_path)
    ended = call(*options(project, tmp_path / "run", resume=damaged))
    assert ended.code == 3, ended.err
    assert str(damaged) in ended.err.split("error: ")[1]
    assert "older checkpoint" in ended.err.split("hint: ")[1]
    assert "Traceback" not in ended.err
    assert not checkpoints(tmp_path / "run")


def test_weights_alone_are_refused(project: Project, tmp_path: Path) -> None:
    succeed("convert", "hf2mg", project.model, tmp_path / "iter_0000001", "--format", "dist")
    ended = call(*options(project, tmp_path / "run", resume=tmp_path / "iter_0000001"))
    assert ended.code == 3, ended.err
    assert f"{tmp_path / 'iter_0000001'} holds weights without training state" in ended.err
    assert "hint: start a new run from it with --model" in ended.err
    assert not checkpoints(tmp_path / "run")


@pytest.mark.parametrize("name", ["none", "model"])
def test_a_folder_without_checkpoints_is_refused(
    project: Project, tmp_path: Path, name: str
) -> None:
    ended = call(*options(project, tmp_path / "run", resume=project.folder / name))
    assert ended.code == 3, ended.err
    assert f"--resume {project.folder / name} is no checkpoint" in ended.err
    assert "RUN/iter_0000030" in ended.err
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_shape_is_refused(run: Path, project: Project) -> None:
    config = run.parent / "shape.json"
    values = json.loads((project.model / "config.json").read_text())
    config.write_text(json.dumps(values | {"ffn_hidden_size": 64}))
    changes = {"model": None, "from_scratch": True, "model_config": config}
    changes |= {"tokenizer": project.tokenizer, "allow_changed": "model"}
    ended = call(*options(project, run, train_iters=8, **changes))
    assert ended.code == 3, ended.err
    assert str(run / "iter_0000006") in ended.err
    assert checkpoints(run) == ["iter_0000003", "iter_0000006"]
