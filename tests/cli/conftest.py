"""What the tests of whole commands work on, made once: a project, and a run of `pretrain` in it."""

import shutil
from pathlib import Path

import pytest

from tests.support.project import Ended, Project, glm3, make_project
from tests.support.train_command import options


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def first(project: Project, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """The training run that most tests look at, made by a process of its own; don't write to it."""
    folder = tmp_path_factory.mktemp("first")
    ended = glm3(folder / "log", *options(project, folder / "run"))
    assert ended.code == 0, ended.err
    return folder / "run", ended


@pytest.fixture
def run(first: tuple[Path, Ended], tmp_path: Path) -> Path:
    """A copy of that training run."""
    shutil.copytree(first[0], tmp_path / "run")
    return tmp_path / "run"
