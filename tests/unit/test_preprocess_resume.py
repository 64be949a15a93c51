"""A run that was ended, however and whenever, goes on; one that is finished isn't done again."""

import errno
import fcntl
import json
import random
import re
import shutil
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glm3cli.config.preprocess import PreprocessConfig
from glm3cli.data.preprocess.readers import chunks
from glm3cli.data.preprocess.run import preprocess
from glm3cli.data.preprocess.writing import output as output_module
from glm3cli.data.preprocess.writing.write import PreprocessProgress
from glm3cli.errors import DataError
from tests.support import preprocessing
from tests.support.preprocess_runs import outputs
from tests.support.tiny_tokenizer import tiny_tokenizer_folder

KILLS = 20
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "你好", "世界")


def program(values, limit=None, **popen):
    arguments = [json.dumps(values, default=str), json.dumps(limit)]
    return subprocess.Popen(
        [sys.executable, preprocessing.__file__, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **popen,
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Three files of two formats, of some dozen chunks each."""
    folder, rng = tmp_path_factory.mktemp("inputs"), random.Random(4)

    def text():
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 60)))

    rows = [{"instruction": text(), "output": text(), "text": text()} for _ in range(3000)]
    for i, part in enumerate((rows[:1000], rows[1000:2000])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{i}.jsonl").write_text(lines, "utf-8")
    pq.write_table(pa.Table.from_pylist(rows[2000:]), folder / "2.parquet")
    return sorted(folder.iterdir())


CASES = {
    "text, one worker": {"handler": "text", "workers": 1},
    "chat, two workers, packed": {
        "handler": "chat",
        "workers": 2,
        "seq_length": 64,
        "pack": True,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_kill_9_at_any_moment(inputs, tmp_path, options):
    values = {"input": inputs, "tokenizer": tiny_tokenizer_folder(), **options}
    (tmp_path / "expected").mkdir()
    clock = time.monotonic()
    process = program({**values, "output_prefix": tmp_path / "expected/out"})
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    seconds = time.monotonic() - clock
    expected = outputs(tmp_path / "expected")
    assert expected
    (tmp_path / "new").mkdir()
    moments, kills = random.Random(6), 0
    first = "text_document" if options["handler"] == "text" else "packed_input_ids_document"
    note = tmp_path / "new" / f".out_{first}.unfinished/note.json"
    while kills < KILLS // len(CASES):
        process = program({**values, "output_prefix": tmp_path / "new/out"})
        process.stdout.readline()  # it begins
        time.sleep(moments.uniform(0, 0.4 * seconds))
        # The last one has done some of the work, so that another goes on with it.
        is_last = kills == KILLS // len(CASES) - 1
        while is_last and process.poll() is None and not note.exists():
            time.sleep(0.001)
        kills += process.poll() is None
        process.kill()
        _, stderr = process.communicate(timeout=200)
        if (record := tmp_path / "new" / f".out_{first}.record.json").exists():
            assert outputs(tmp_path / "new") == expected  # it was done: the next begins anew
            record.unlink()
            for path in (tmp_path / "new").glob("out*"):
                path.unlink()
        else:
            assert not list((tmp_path / "new").glob("*.idx")) or outputs(tmp_path / "new") != {}
    process = program({**values, "output_prefix": tmp_path / "new/out"})
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    assert outputs(tmp_path / "new") == expected
    assert "going on with an unfinished run" in stderr
    assert not list((tmp_path / "new").glob(".*.unfinished"))


def test_a_full_disk_is_a_sentence_and_the_run_goes_on(inputs, tmp_path):
    values = {"input": inputs, "tokenizer": tiny_tokenizer_folder(), "workers": 1}
    values["output_prefix"] = tmp_path / "out"
    process = program(values, limit=200_000)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 3, stderr
    assert "can't write" in stderr
    assert "File too large" in stderr
    assert [path.name for path in tmp_path.iterdir()] == [".out_text_document.unfinished"]
    process = program(values)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 0
    assert "going on with an unfinished run" in stderr
    (tmp_path / "whole").mkdir()
    program({**values, "output_prefix": tmp_path / "whole/out"}).communicate(timeout=100)
    assert outputs(tmp_path) == outputs(tmp_path / "whole")


# ---- finished work


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "the fox"}\n{"text": 5}\n{"text": "a lazy dog"}\n')
    return path


def run(source, prefix, report=lambda progress: None, **options):
    values = {
        "input": [source],
        "tokenizer": tiny_tokenizer_folder(),
        "output_prefix": prefix,
        "workers": 1,
        "on_error": "skip",
        **options,
    }
    return preprocess(PreprocessConfig.parse(values), report)


def test_finished_work_is_not_done_again(small, tmp_path):
    first = run(small, tmp_path / "out")
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    second = run(small, tmp_path / "out")
    assert (first.repeated, second.repeated) == (False, True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written
    same = ("documents", "tokens", "bytes", "skipped", "files")
    assert [getattr(first, name) for name in same] == [getattr(second, name) for name in same]


def changed_input(path, _prefix):
    path.write_text('{"text": "the fox"}\n{"text": 6}\n{"text": "a lazy dog"}\n')


def changed_output(_path, prefix):
    with prefix.with_name("out_text_document.bin").open("ab") as file:
        file.write(bytes(4))


CHANGES = {
    "another input": (changed_input, {}),
    "another setting": (None, {"append_eod": True}),
    "a damaged output": (changed_output, {}),
    "--force": (None, {"force": True}),
}


@pytest.mark.parametrize(("change", "options"), CHANGES.values(), ids=CHANGES)
def test_what_makes_it_be_done_again(small, tmp_path, change, options):
    run(small, tmp_path / "out")
    if change:
        change(small, tmp_path / "out")
    assert not run(small, tmp_path / "out", **options).repeated


def test_texts_and_conversations_of_one_prefix_know_of_each_other(tmp_path):
    """Texts and conversations of one prefix: neither run repeats or removes the other's files."""
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "the fox", "instruction": "a", "output": "b"}\n')
    for repeated in (False, True):
        for handler in ("text", "instruction"):
            summary = run(source, tmp_path / "out", handler=handler)
            assert summary.repeated is repeated
            stats = json.loads((tmp_path / "out.stats.json").read_text())
            assert stats["job"]["settings"]["handler"] == handler


def test_what_is_left_of_a_finished_run_is_removed(small, tmp_path):
    run(small, tmp_path / "out")
    folder = tmp_path / ".out_text_document.unfinished"
    folder.mkdir()
    (folder / "samples.labels.idx").write_bytes(b"x")
    assert run(small, tmp_path / "out").repeated
    assert not folder.exists()


def test_a_disk_that_is_full_while_packing(inputs, tmp_path, monkeypatch):
    def full(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    options = {"handler": "chat", "seq_length": 64, "pack": True}
    with monkeypatch.context() as patched:
        patched.setattr("glm3cli.data.preprocess.writing.write.pack_files", full)
        with pytest.raises(DataError, match=r"can't write .*: No space left on device"):
            run(inputs[0], tmp_path / "out", **options)
    assert run(inputs[0], tmp_path / "out", **options).fill_rate > 0.5


def test_rows_that_were_skipped_are_not_accepted_by_a_run_that_stops(small, tmp_path):
    run(small, tmp_path / "out")
    with pytest.raises(DataError, match="expected a string"):
        run(small, tmp_path / "out", on_error="stop")


# ---- unfinished work


@pytest.fixture
def noted(monkeypatch):
    monkeypatch.setattr(output_module, "_SECONDS_BETWEEN_NOTES", 0.0)
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 50)


class Stopped(Exception):
    pass


def stop_after(documents):
    def report(progress: PreprocessProgress) -> None:
        if progress.counts.documents >= documents:
            raise Stopped

    return report


def test_a_row_that_ends_a_run_can_be_skipped_by_the_next(inputs, tmp_path, noted, caplog):
    rows = [json.loads(line) for line in inputs[0].read_text("utf-8").splitlines()]
    rows[700] = {"text": None}
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"in.jsonl:701: text expected a string"):
        run(source, tmp_path / "out", on_error="stop")
    kept = int(re.search(r"(\d+) documents are kept: run the same again", caplog.text)[1])
    assert 600 < kept <= 700
    seen = []
    summary = run(source, tmp_path / "out", lambda p: seen.append(p.counts.documents))
    assert kept < seen[0] <= kept + 50
    assert (summary.documents, summary.skipped) == (999, 1)
    (tmp_path / "whole").mkdir()
    run(source, tmp_path / "whole/out")
    assert outputs(tmp_path) == outputs(tmp_path / "whole")


@pytest.mark.parametrize("change", ["input", "setting", "lost", "note"])
def test_what_makes_an_unfinished_run_begin_anew(inputs, tmp_path, noted, change):
    source = tmp_path / "in.jsonl"
    source.write_bytes(inputs[0].read_bytes())
    with pytest.raises(Stopped):
        run(source, tmp_path / "out", stop_after(500))
    options = {"append_eod": change == "setting"}
    folder = tmp_path / ".out_text_document.unfinished"
    if change == "input":
        source.write_bytes(inputs[1].read_bytes())
    if change == "lost":
        (folder / "out_text_document.bin").write_bytes(b"")
    if change == "note":
        (folder / "note.json").write_text("{")
    seen = []
    run(source, tmp_path / "out", lambda p: seen.append(p.counts.documents), **options)
    assert seen[0] == 50
    (tmp_path / "whole").mkdir()
    run(source, tmp_path / "whole/out", **options)
    assert outputs(tmp_path) == outputs(tmp_path / "whole")


def test_names_that_a_killed_run_did_not_get_to(inputs, tmp_path, monkeypatch):
    """A run died between two renames of its files: the next run does the remaining ones."""
    real = type(tmp_path).replace

    def replace(path, target):
        if path.name == "out_packed_labels_document.idx":
            raise Stopped
        return real(path, target)

    options = {"handler": "chat", "seq_length": 64}
    with monkeypatch.context() as patched:
        patched.setattr(type(tmp_path), "replace", replace)
        with pytest.raises(Stopped):
            run(inputs[0], tmp_path / "out", **options)
    assert not (tmp_path / "out.stats.json").exists()
    (tmp_path / "more").mkdir()  # the same, but that some of it is removed meanwhile
    for path in tmp_path.glob("*out*"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / "more" / path.name)
    (tmp_path / "more/out_packed_labels_document.bin").unlink()
    seen = []
    run(inputs[0], tmp_path / "out", seen.append, **options)
    assert not seen
    run(inputs[0], tmp_path / "more/out", **options)
    assert outputs(tmp_path) == outputs(tmp_path / "more")
    (tmp_path / "whole").mkdir()
    run(inputs[0], tmp_path / "whole/out", **options)
    assert outputs(tmp_path) == outputs(tmp_path / "whole")


def test_two_runs_do_not_write_the_same_files(small, tmp_path):
    folder = tmp_path / ".out_text_document.unfinished"
    folder.mkdir()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another glm3 preprocess is writing"):
            run(small, tmp_path / "out")
