"""The checkpoints in a run's folder: which are found, gone on from, and kept."""

import shutil
from pathlib import Path

import pytest

from glm3cli.errors import CheckpointError, ConfigError
from glm3cli.parallel.storage import Storage
from glm3cli.train.checkpointer import Checkpointer
from glm3cli.train.resumable import find_checkpoints, find_resume, set_aside
from tests.support.tiny import TINY


@pytest.fixture
def make_run(tmp_path):
    """Makes a run's folder with empty checkpoints of these iterations."""

    def make(*iterations: int) -> Path:
        for iteration in iterations:
            (tmp_path / "run" / f"iter_{iteration:07d}").mkdir(parents=True)
        return tmp_path / "run"

    return make


def checkpointer(run: Path, keep_last: int | None = None, num_bytes: int = 0) -> Checkpointer:
    storage = Storage(rank=0, members=(0,), leaders=(0,), places=(f"here:{run}",))
    return Checkpointer(
        run, TINY, run, run, keep_last, num_bytes, in_background=False, storage=storage
    )


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_checkpoints_come_oldest_first(make_run):
    run = make_run(100, 10**7, 9_999_999, 3)
    assert names(find_checkpoints(run)) == [
        "iter_0000003",
        "iter_0000100",
        "iter_9999999",
        "iter_10000000",
    ]


def test_what_is_no_complete_checkpoint_is_not_found(make_run):
    run = make_run(10)
    for name in (".iter_0000020.partial", ".iter_0000005.removed", "iter_30", "tensorboard"):
        (run / name).mkdir()
    (run / "iter_0000040").touch()
    assert names(find_checkpoints(run)) == ["iter_0000010"]
    assert find_checkpoints(run / "nowhere") == []


def test_auto_goes_on_from_the_newest_or_starts_anew(make_run, tmp_path):
    assert find_resume(tmp_path / "run", "auto") == []
    run = make_run(10, 9)
    assert names(find_resume(run, "auto")) == ["iter_0000010", "iter_0000009"]


def test_never_refuses_a_run_that_has_checkpoints(make_run, tmp_path):
    assert find_resume(tmp_path / "run", "never") == []
    with pytest.raises(ConfigError, match="already holds iter_0000010"):
        find_resume(make_run(10), "never")


def test_a_checkpoint_or_a_run_can_be_named(make_run, tmp_path):
    run = make_run(10, 20)
    assert find_resume(tmp_path / "new", str(run / "iter_0000010")) == [run / "iter_0000010"]
    assert find_resume(tmp_path / "new", f"{run}/iter_0000010/") == [run / "iter_0000010"]
    found = find_resume(tmp_path / "new", str(run))
    assert names(found) == ["iter_0000020", "iter_0000010"]


@pytest.mark.parametrize("name", ["nowhere", "run/iter_0000011", "run"])
def test_a_name_without_a_checkpoint_is_refused(name, make_run, tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(CheckpointError, match="is no checkpoint and has none in it"):
        find_resume(tmp_path / "new", str(tmp_path / name))


@pytest.mark.parametrize(
    ("keep_last", "left"),
    [
        (None, ["iter_0000003", "iter_0000020", "iter_0000100"]),
        (2, ["iter_0000020", "iter_0000100"]),
        (1, ["iter_0000100"]),
        (9, ["iter_0000003", "iter_0000020", "iter_0000100"]),
    ],
)
def test_only_the_newest_checkpoints_are_kept(keep_last, left, make_run):
    run = make_run(3, 20, 100)
    (run / "iter_0000003" / "weights").touch()
    (run / "metrics.jsonl").touch()
    checkpointer(run, keep_last)._prune(find_checkpoints(run))
    assert sorted(path.name for path in run.iterdir()) == sorted([*left, "metrics.jsonl"])


def test_later_checkpoints_of_a_run_that_went_back_are_set_aside(make_run):
    run = make_run(3, 10, 20, 100)
    (run / "best").symlink_to("iter_0000100")
    (run / "aside_iter_0000100").mkdir()
    assert names(set_aside(run, run / "iter_0000010")) == [
        "aside_iter_0000020",
        "aside_iter_0000100-2",
    ]
    assert names(find_checkpoints(run)) == ["iter_0000003", "iter_0000010"]
    assert not (run / "best").is_symlink()
    (run / "best").symlink_to("iter_0000003")
    assert set_aside(run, run / "iter_0000010") == []
    assert (run / "best").exists()


def test_a_checkpoint_that_does_not_fit_is_refused(make_run):
    run = make_run(3)
    free = shutil.disk_usage(run).free
    with pytest.raises(CheckpointError, match=r"a checkpoint takes .* GiB, but .* GiB are free"):
        checkpointer(run, num_bytes=free + 2**30).check_space()
    checkpointer(run, num_bytes=1000).check_space()


def test_parts_of_a_checkpoint_that_other_machines_lack_are_not_counted(make_run):
    run = make_run(3, 10, 17, 20)
    complete = [run / name for name in ("iter_0000003", "iter_0000010", "iter_0000020")]
    checkpointer(run, 2)._prune(complete)
    assert names(find_checkpoints(run)) == ["iter_0000010", "iter_0000017", "iter_0000020"]
