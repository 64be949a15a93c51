"""Checkpoints of machines that share no disk: folders of their own stand for these."""

import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from glm3cli.checkpoint.convert.check import check
from glm3cli.checkpoint.convert.inspect import inspect
from glm3cli.checkpoint.files.manifest import MANIFEST, read_manifest
from glm3cli.checkpoint.layouts.opening import open_source
from glm3cli.checkpoint.run import holdings
from glm3cli.errors import CheckpointError
from glm3cli.parallel.storage import _distinct
from tests.support.ranks import RankPool
from tests.support.tiny import TINY, train_config

pytestmark = pytest.mark.dist

LAYOUT = {"pp": 2, "micro_batch_size": 2}  # each stage is two ranks: on one machine, or on two
LAST = "iter_0000004"


class Events(list[tuple[str, dict[str, Any]]]):
    """Takes what a run tells."""

    def event(self, event: str, **details: Any) -> None:
        self.append((event, details))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [details for event, details in self if event == kind]


def storages(folders: list[Path]) -> tuple[tuple[int, ...], tuple[int, ...], list[str]]:
    from glm3cli.parallel.groups import open_grid
    from glm3cli.parallel.storage import find_storage

    with open_grid(train_config()) as grid:
        found = find_storage(folders[grid.rank])
        return found.members, found.leaders, [place.split(":", 1)[1] for place in found.places]


def train(
    folders: list[Path],
    steps: int,
    options: dict[str, Any],
    *,
    keep_last: int | None = None,
    save: bool = True,
    stop_before_rename: int | None = None,
) -> tuple[list[float], Events]:
    """Goes on from a checkpoint to step `steps`, saving every second one.

    Gives the losses and the events. Rank `stop_before_rename` ends where it would name the last
    checkpoint, as if it were killed.
    """
    from unittest import mock

    from glm3cli.checkpoint.run import durable
    from glm3cli.parallel.groups import open_grid
    from glm3cli.parallel.storage import find_storage
    from glm3cli.train.candidates import choose
    from glm3cli.train.checkpointer import Checkpointer
    from glm3cli.train.progress.state import State
    from glm3cli.train.weights.adapter import adapter_config
    from tests.support.training import build

    with open_grid(train_config(**options)) as grid:
        run, events = folders[grid.rank], Events()
        metrics: Any = events
        config, train_step, loader = build(options, grid)
        storage = find_storage(run)
        tokenizer = folders[0].parent / "tokenizer.model"
        checkpointer = Checkpointer(
            run, TINY, tokenizer.parent, tokenizer, keep_last, 0, False, storage
        )
        checkpointer.adapter = adapter_config(config)
        durable.finish_publishing(run, storage)
        folder = choose(run, "auto", storage, metrics)
        state = State() if folder is None else checkpointer.load(folder, train_step, metrics)
        losses = []
        rename = durable._rename

        def killed(aside: Path, folder: Path) -> None:
            if grid.rank != stop_before_rename or folder.name != LAST:
                rename(aside, folder)

        with mock.patch.object(durable, "_rename", killed):
            while state.iteration < steps:
                outcome = train_step.run(loader, state.consumed_samples)
                losses.append(outcome.loss)
                state.advance(outcome, config.global_batch_size, config.seq_length)
                if save and state.iteration % 2 == 0:
                    checkpointer.save(train_step, state, metrics)
        return losses, events


@pytest.fixture(scope="module")
def whole(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tokenizer.model").touch()
    return ranks.run(4, partial(train, save=False), [folder / "run"] * 4, 6, LAYOUT)[0][0]


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two machines, `a` of ranks 0 and 1 and `b` of the others, after four steps."""
    folder = tmp_path_factory.mktemp("saved")
    (folder / "tokenizer.model").write_bytes(b"tokens")
    ranks.run(4, train, machines(folder), 4, LAYOUT)
    return folder


@pytest.fixture
def home(saved: Path, tmp_path: Path) -> Path:
    """A copy of the two machines' folders."""
    return shutil.copytree(saved, tmp_path / "home")


def machines(home: Path) -> list[Path]:
    return [home / "a", home / "a", home / "b", home / "b"]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def weights(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.distcp")}


def own_file(home: Path) -> Path:
    """A file of the last checkpoint that machine `b` wrote."""
    return max((home / "b" / LAST).glob("__[23]_*.distcp"), key=lambda path: path.stat().st_size)


# --- who sees what ---


def test_ranks_that_see_the_same_folder_find_each_other(ranks: RankPool, tmp_path: Path) -> None:
    a, b = tmp_path / "a/run", tmp_path / "b/run"
    first, second = ((0, 2), (0, 1), [str(a), str(b)]), ((1, 3), (0, 1), [str(a), str(b)])
    assert ranks.run(4, storages, [a, b, a, b]) == [first, second, first, second]
    assert ranks.run(2, storages, [b, b]) == [((0, 1), (0,), [str(b)])] * 2
    assert not [*a.iterdir(), *b.iterdir()]


def test_storages_of_one_name_are_told_apart() -> None:
    assert _distinct(["a:/run", "b:/run"], (0, 8)) == ("a:/run", "b:/run")
    assert _distinct(["a:/run", "a:/run"], (0, 8)) == ("rank 0's a:/run", "rank 8's a:/run")


def pass_on(folders: list[Path], wrong: str, chunk: int) -> str:
    """Brings `file` from rank 0 to rank 1; `wrong` is what is wrong with it."""
    from unittest import mock

    from glm3cli.checkpoint.files.manifest import FileEntry
    from glm3cli.checkpoint.run import exchange
    from glm3cli.checkpoint.run.durable import _entry
    from glm3cli.parallel.groups import open_grid
    from glm3cli.parallel.storage import find_storage

    with open_grid(train_config()) as grid, mock.patch.object(exchange, "_CHUNK", chunk):
        folder = folders[grid.rank]
        storage = find_storage(folder)
        entry = _entry(folders[0] / "file")
        if wrong == "digest":
            entry = FileEntry(entry.bytes, "0" * 64)
        name = "other" if wrong == "name" else "file"
        try:
            exchange.exchange(folder, folder, {name: entry}, [{name}, set()], storage)
        except (OSError, CheckpointError) as error:
            return str(error)
    return "passed on"


@pytest.mark.slow
def test_an_adapter_is_on_every_machine(ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"tokens")
    options = {**LAYOUT, "lora_rank": 4}
    folders = machines(tmp_path)
    whole = ranks.run(4, partial(train, save=False), [tmp_path / "whole"] * 4, 6, options)[0][0]
    ranks.run(4, train, folders, 4, options)
    ours, theirs = (tmp_path / name / LAST / "adapter" for name in "ab")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (ours / file).read_bytes() == (theirs / file).read_bytes()
        assert f"adapter/{file}" in read_manifest(theirs.parent).files
    shutil.rmtree(theirs)  # the machine gets it again
    (tmp_path / "b" / LAST / "config.json").unlink()
    losses, events = ranks.run(4, train, folders, 6, options)[0]
    assert losses == pytest.approx(whole[4:], rel=1e-6)
    assert events.of("fetch")[0]["files"] > 2
    assert (theirs / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("chunk", [3, 5, 100])
def test_a_file_is_passed_on_in_chunks(ranks: RankPool, tmp_path: Path, chunk: int) -> None:
    folders = [tmp_path / name for name in "ab"]
    folders[0].mkdir()
    (folders[0] / "file").write_bytes(bytes(range(10)))
    assert ranks.run(2, pass_on, folders, "", chunk) == ["passed on"] * 2
    assert (folders[1] / "file").read_bytes() == bytes(range(10))


def test_all_ranks_learn_of_a_file_that_is_not_passed_on(ranks: RankPool, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "ab"]
    folders[0].mkdir()
    (folders[0] / "file").write_bytes(b"0123456789")
    for said in ranks.run(2, pass_on, folders, "digest", 4):
        assert said == "file came from rank 0 other than it was written"
    for said in ranks.run(2, pass_on, folders, "name", 4):
        assert "No such file or directory" in said
    (folders[1] / "file").unlink()
    (folders[1] / "file").mkdir()
    for said in ranks.run(2, pass_on, folders, "", 4):
        assert "Is a directory" in said


# --- one machine's part ---


def test_each_machine_has_what_its_ranks_wrote_and_what_all_need(saved: Path) -> None:
    a, b = (saved / name / LAST for name in "ab")
    assert {name[:4] for name in weights(a)} == {"__0_", "__1_"}
    assert {name[:4] for name in weights(b)} == {"__2_", "__3_"}
    common = {".metadata", "metadata.json", "common.pt", "config.json", "tokenizer.model", MANIFEST}
    assert names(a) - weights(a) == names(b) - weights(b) == common
    for name in common:
        assert (a / name).read_bytes() == (b / name).read_bytes()
    assert read_manifest(a).files.keys() == (names(a) | names(b)) - {MANIFEST}
    assert names(saved / "a") == names(saved / "b") == {"iter_0000002", LAST}


def test_one_part_alone_says_what_is_missing_and_where_it_is(home: Path) -> None:
    a, b = (home / name / LAST for name in "ab")
    for read in (open_source, check):
        with pytest.raises(CheckpointError) as caught:
            read(home / "a" if read is open_source else a)
        said = f"{caught.value.message}; {caught.value.hint}".replace("/saved0/", "/")
        assert f"{own_file(home).name} is missing" in said
        assert "copy the files of " in said
        assert f"/b/{LAST} into this folder" in said
    assert set(inspect(a).missing) <= weights(b)
    for path in b.iterdir():
        shutil.copy(path, a)
    assert check(a).files == len(read_manifest(a).files)
    assert inspect(a).problems == []


def test_files_of_other_machines_must_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(holdings.shutil, "disk_usage", lambda _path: SimpleNamespace(free=2**30))
    holdings._check_room(tmp_path / LAST, 2**30)
    with pytest.raises(CheckpointError, match=r"take 1\.5 GiB, but 1\.0 GiB are free"):
        holdings._check_room(tmp_path / LAST, 3 * 2**29)


# --- going on ---


def test_a_run_goes_on_as_if_it_had_not_stopped(
    ranks: RankPool, home: Path, whole: list[float]
) -> None:
    a, b = (home / name / LAST for name in "ab")
    moved = weights(a) | weights(b)
    for losses, events in ranks.run(4, partial(train, keep_last=1), machines(home), 6, LAYOUT):
        assert losses == whole[4:]
        [fetched] = events.of("fetch")
        assert fetched["files"] == len(moved)
        assert not events.of("passed_over")
    # What was fetched is pruned with the rest.
    assert names(home / "a") == names(home / "b") == {"iter_0000006"}


@pytest.mark.parametrize(
    "options", [{"tp": 2, "micro_batch_size": 4}, {"micro_batch_size": 2}], ids=["tp2", "dp2"]
)
def test_other_parallel_sizes_go_on(
    ranks: RankPool, home: Path, whole: list[float], options: dict[str, Any]
) -> None:
    """Machines in another order, with one rank each."""
    folders = [home / "b", home / "a"]
    for losses, _ in ranks.run(2, partial(train, save=False), folders, 6, options):
        assert losses == pytest.approx(whole[4:], rel=1e-5)
    assert weights(home / "a" / LAST) == weights(home / "b" / LAST)
    # Now either machine has all: the other one may be replaced.
    shutil.rmtree(home / "a")
    for losses, _ in ranks.run(2, partial(train, save=False), folders, 6, options):
        assert losses == pytest.approx(whole[4:], rel=1e-5)
    check(home / "a" / LAST)


def test_what_was_not_named_on_one_machine_is_named_by_the_next_start(
    ranks: RankPool, home: Path, whole: list[float]
) -> None:
    for name in "ab":
        shutil.rmtree(home / name / LAST)
    ranks.run(4, partial(train, stop_before_rename=2), machines(home), 4, LAYOUT)
    assert (home / "a" / LAST).is_dir()
    assert not (home / "b" / LAST).exists()
    for losses, events in ranks.run(4, partial(train, save=False), machines(home), 6, LAYOUT):
        assert losses == whole[4:]
        assert not events.of("passed_over")
    assert (home / "b" / LAST).is_dir()


def newest(folders: list[Path]) -> tuple[str, Events]:
    """The checkpoint that a run would roll back to."""
    from glm3cli.parallel.groups import open_grid
    from glm3cli.parallel.storage import find_storage
    from glm3cli.train.checkpointer import Checkpointer

    with open_grid(train_config()) as grid:
        run, events = folders[grid.rank], Events()
        metrics: Any = events
        storage = find_storage(run)
        folder = Checkpointer(run, TINY, run, run, None, 0, False, storage).newest(metrics, 9)
        assert folder is not None
        return folder.name, events


def test_a_rollback_has_all_files(ranks: RankPool, home: Path) -> None:
    shutil.copytree(home / "a" / LAST, home / "a/iter_0000007")  # which only this machine has
    for name, events in ranks.run(4, newest, machines(home)):
        assert name == LAST
        assert len(events.of("fetch")) == 1
    for name in "ab":
        check(home / name / LAST)


def passed_over(results: list[Any], whole: list[float]) -> str:
    """What the ranks, which went on from the checkpoint before, say of the last one."""
    for losses, _ in results:
        assert losses == whole[2:]
    [told] = results[0][1].of("passed_over")
    assert told["path"].endswith(f"a/{LAST}")
    return told["problem"]


def test_a_flipped_byte_on_one_machine_is_named_and_passed_over(
    ranks: RankPool, home: Path, whole: list[float]
) -> None:
    file = own_file(home)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    results = ranks.run(4, partial(train, save=False), machines(home), 6, LAYOUT)
    said = passed_over(results, whole)
    assert said.startswith("on ")
    assert said.endswith(f":{home / 'b'}, {file.name} differs from what was written")


def test_files_that_nobody_has_are_named_and_passed_over(
    ranks: RankPool, home: Path, whole: list[float]
) -> None:
    shutil.rmtree(home / "b" / LAST)
    results = ranks.run(4, partial(train, save=False), machines(home), 6, LAYOUT)
    said = passed_over(results, whole)
    assert said.startswith("nobody has its __2_0.distcp, ")
    assert said.endswith(f"b/{LAST} into this folder)")


def test_parts_of_different_saves_are_not_mixed(
    ranks: RankPool, home: Path, whole: list[float]
) -> None:
    manifest = home / "b" / LAST / MANIFEST
    manifest.write_text(manifest.read_text() + "\n")
    results = ranks.run(4, partial(train, save=False), machines(home), 6, LAYOUT)
    said = passed_over(results, whole)
    assert said.startswith("it is of different saves on ")
    assert said.endswith(f":{home / 'b'}")
