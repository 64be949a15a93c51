"""Training on raw `--data`, which one process preprocesses once into a cache."""

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from glm3cli.config.training import TrainConfig
from glm3cli.data import raw
from glm3cli.data.kinds import ANSWERS, TEXT, DataKind
from glm3cli.data.preprocess.run import preprocess
from tests.support.project import Ended, Project, call, events, steps
from tests.support.train_command import losses, options, succeed

BRIEF = {"train_iters": 2, "save_interval": None}


@pytest.fixture
def texts(project: Project, tmp_path: Path) -> Path:
    """Copies the project's texts into a folder that can't be written to."""
    folder = tmp_path / "raw"
    folder.mkdir()
    shutil.copy2(project.folder / "text.jsonl", folder)
    folder.chmod(0o555)
    return folder / "text.jsonl"


def cached(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.bin"))


def test_raw_texts_train_as_their_preprocessed_files_do(
    first: tuple[Path, Ended], project: Project, texts: Path, tmp_path: Path
) -> None:
    ended = succeed(*options(project, tmp_path / "run", data=texts))
    assert losses(tmp_path / "run") == losses(first[0])
    assert f"--data {texts} is preprocessed: 50 documents" in ended.err
    made = cached(tmp_path / "run/data")
    assert len(made) == 1
    # The same command finds the preprocessed files, and so does another run with --data-cache.
    ended = succeed(*options(project, tmp_path / "run", data=texts, train_iters=7))
    assert f"--data {texts} was preprocessed before" in ended.err
    changes = BRIEF | {"data": texts, "data_cache": tmp_path / "run/data"}
    ended = succeed(*options(project, tmp_path / "other", **changes))
    assert "was preprocessed before" in ended.err
    assert cached(tmp_path / "run/data") == made
    assert not (tmp_path / "other/data").exists()


def test_raw_conversations_of_a_folder(project: Project, tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    shutil.copy2(project.folder / "task.jsonl", folder)
    changes = BRIEF | {"seq_length": 128}
    succeed(*options(project, tmp_path / "ours", "finetune", data=folder, **changes))
    succeed(*options(project, tmp_path / "theirs", "finetune", **changes))
    assert losses(tmp_path / "ours") == losses(tmp_path / "theirs")


def test_a_blend_of_raw_and_preprocessed(project: Project, texts: Path, tmp_path: Path) -> None:
    def blended(name: str, one: object, other: object) -> list[float]:
        more = ("--data", f"3:{one}", "--data", f"1:{other}")
        succeed(*options(project, tmp_path / name, data=None, **BRIEF), *more)
        return losses(tmp_path / name)

    assert blended("ours", texts, project.text) == blended("theirs", project.text, project.text)


def test_the_samples_of_each_source_are_reported_and_stay_exact_after_a_resume(
    project: Project, texts: Path, tmp_path: Path
) -> None:
    blended = ("--data", f"3:{texts}", "--data", f"1:{project.text}")
    for name, lengths in (("resumed", (2, 4)), ("at once", (4,))):
        for length in lengths:
            changes = {"data": None, "train_iters": length, "data_cache": tmp_path / "cache"}
            ended = succeed(*options(project, tmp_path / name, **changes), *blended)
    resumed, at_once = (
        [s["consumed_by_source"] for s in steps(tmp_path / name)] for name in ("resumed", "at once")
    )
    assert resumed == at_once
    (cached,) = (tmp_path / "cache").glob("*.bin")
    total = {
        str(cached.with_suffix("")): {"samples": 12, "tokens": 192},
        str(project.text): {"samples": 4, "tokens": 64},
    }
    assert resumed[-1] == total
    assert events(tmp_path / "resumed", "stop")[-1]["consumed_by_source"] == total
    assert f"{project.text} samples 4; tokens 64" in ended.err


def prepared(project: Project, data: Path, save: Path, kind: DataKind = TEXT) -> raw.RawData:
    values = {"model": project.model, "data": [str(data)], "save": save, "train_iters": 1}
    config = TrainConfig.parse(values | {"seq_length": 64})
    return raw.RawData.of(str(data), kind, config, project.tokenizer / "tokenizer.model")


def test_the_cache_is_named_after_all_that_it_is_made_of(
    project: Project, texts: Path, tmp_path: Path
) -> None:
    one = prepared(project, texts, tmp_path)
    assert prepared(project, texts, tmp_path) == one
    assert prepared(project, texts, tmp_path, ANSWERS).prefix != one.prefix
    os.utime(texts, ns=(1, 1))
    assert prepared(project, texts, tmp_path).prefix != one.prefix


def test_one_process_preprocesses_and_the_other_waits(
    project: Project, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = prepared(project, texts, tmp_path)
    begun, waiting = threading.Event(), threading.Event()

    def slowly(*arguments: Any) -> Any:
        begun.set()
        assert waiting.wait(30)
        return preprocess(*arguments)

    monkeypatch.setattr(raw, "preprocess", slowly)
    monkeypatch.setattr(raw._log, "warning", lambda *_arguments: waiting.set())
    done: list[Any] = []
    first = threading.Thread(target=lambda: done.append(data.prepare(lambda _: None)))
    first.start()
    assert begun.wait(30)
    assert data.prepare(lambda _: None).repeated
    first.join()
    assert [summary.repeated for summary in done] == [False]


def test_a_bad_row_is_reported_as_preprocess_reports_it(project: Project, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good"}\n{"text": 3}\n')
    ended = call(*options(project, tmp_path / "run", data=bad))
    assert ended.code == 3
    assert f"{bad}:2" in ended.err
    assert "expected a string, got int 3" in ended.err
    assert "`glm3 preprocess`" in ended.err.split("hint: ")[1]
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize(("name", "said"), [("none.jsonl", "does not exist"), (".", "no file")])
def test_raw_data_that_is_not_there(project: Project, tmp_path: Path, name: str, said: str) -> None:
    ended = call(*options(project, tmp_path / "run", data=tmp_path / name))
    assert ended.code == 3
    assert said in ended.err
    assert not (tmp_path / "run").exists()


def test_a_cache_that_can_not_be_written(project: Project, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    changes = {"data": texts, "data_cache": tmp_path / "file" / "cache"}
    ended = call(*options(project, tmp_path / "run", **changes))
    assert ended.code == 2
    assert "hint: give --data-cache with a folder that you may write to" in ended.err


def test_a_dry_run_only_looks(project: Project, texts: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    ended = succeed(*options(project, tmp_path / "run", data=texts, dry_run=True))
    assert f"data: {texts} would be preprocessed into {tmp_path / 'run/data'}/text." in ended.out
    assert sorted(tmp_path.rglob("*")) == before
    succeed(*options(project, tmp_path / "run", data=texts, **BRIEF))
    ended = succeed(*options(project, tmp_path / "run", data=texts, dry_run=True))
    assert "would be" not in ended.out
    assert "epochs" in ended.out


def test_a_dry_run_finds_a_bad_first_row(project: Project, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"content": "text"}\n')
    ended = call(*options(project, tmp_path / "run", data=bad, dry_run=True))
    assert ended.code == 3
    assert "the row has content" in ended.err


def test_a_long_name_in_another_script(project: Project, tmp_path: Path) -> None:
    raw = tmp_path / f"{'数' * 75}.jsonl"
    shutil.copy(project.folder / "text.jsonl", raw)
    succeed(*options(project, tmp_path / "run", data=raw, **BRIEF))
    [made] = cached(tmp_path / "run/data")
    assert made.startswith("数" * 40 + ".")
