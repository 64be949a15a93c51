"""Bad input of `preprocess` is a sentence with its place, or is left out and listed."""

import bz2
import gzip
import io
import json
import lzma
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from glm3cli.data.preprocess.readers import chunks
from glm3cli.errors import ConfigError, DataError
from tests.support.preprocess_runs import outputs, run, write_lines
from tests.support.tiny import TINY
from tests.support.tiny_tokenizer import tiny_tokenizer_folder


def bad(path: Path, name: str, content: bytes) -> Path:
    (path / name).write_bytes(content)
    return path / name


def parquet_bytes(column: str = "body", damaged: bool = False) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({column: ["a"] * 99}), file, write_page_checksum=True)
    content = bytearray(file.getvalue())
    if damaged:
        start = pq.ParquetFile(file).metadata.row_group(0).column(0).data_page_offset
        content[start : start + 8] = bytes(8)
    return bytes(content)


BAD_ROWS = [
    '{"text": "the fox"}',
    '{"text": 5}',
    '{"text": "broken',
    "[1]",
    '{"body": "a"}',
    "",
    '{"text": "dog"}',
]


@pytest.mark.parametrize("workers", [1, 2])
def test_skipped_rows_are_listed(tmp_path, workers, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 2)
    (tmp_path / "in.jsonl").write_text("\n".join(BAD_ROWS))
    summary = run(tmp_path / "in.jsonl", tmp_path / "out", on_error="skip", workers=workers)
    assert (summary.documents, summary.skipped) == (2, 4)
    lines = (tmp_path / "out.errors.jsonl").read_text().splitlines()
    problems = [json.loads(line) for line in lines]
    assert [p["where"] for p in problems] == [f"{tmp_path / 'in.jsonl'}:{n}" for n in (2, 3, 4, 5)]
    assert problems[0]["field"] == "text"
    # A clean run afterwards must not leave the list of the one before.
    write_lines(tmp_path / "in.jsonl", [{"text": "the fox"}])
    run(tmp_path / "in.jsonl", tmp_path / "out", on_error="skip")
    assert not (tmp_path / "out.errors.jsonl").exists()


def test_the_first_bad_rows_are_shown(tmp_path, monkeypatch):
    """The error shows five bad rows, some from the following chunks, each with its content."""
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 2)
    (tmp_path / "in.jsonl").write_text("\n".join([*BAD_ROWS, '{"text": null}', '{"text": 1}']))
    with pytest.raises(DataError) as caught:
        run(tmp_path / "in.jsonl", tmp_path / "out")
    message = caught.value.message
    where = str(tmp_path / "in.jsonl")
    assert message.startswith(f"{where}:2: text expected a string, got int 5; the first bad rows")
    assert message.count(where) == 6
    for number, row in ((2, '{"text": 5}'), (3, '{"text": "broken'), (4, "[1]"), (8, "null}")):
        assert re.search(rf"\n  {where}:{number}: .*\n    .*{re.escape(row)}", message), number
    assert f"{where}:9" not in message


GOOD = b'{"text": "the fox"}\n' * 50


ZIPPED = gzip.compress(GOOD * 200, mtime=0)
DAMAGED = {
    "cut gzip": ("in.jsonl.gz", ZIPPED[:-9], "damaged or cut", 10_000),
    "gzip cut early": (
        "in.jsonl.gz",
        ZIPPED[:-100],
        "damaged or cut",
        8000,
    ),
    "cut array": ("in.json", b'[{"text": "the fox"}, {"text": "a', "ends within the array", 1),
    "cut parquet": ("in.parquet", parquet_bytes("text")[:-40], "damaged or cut short", 0),
    "a parquet page": (
        "in.parquet",
        parquet_bytes("text", damaged=True),
        "in.parquet is damaged",
        0,
    ),
    "no column": ("in.parquet", parquet_bytes("body"), "needs the column text, but has body", 0),
    "bad CSV": ("in.csv", b'text\nfox\n"a', "damaged or cut short", 1),
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("name", "content", "problem", "before"), DAMAGED.values(), ids=DAMAGED)
def test_the_rest_of_a_damaged_file_can_be_skipped(
    tmp_path, name, content, problem, before, workers
):
    """Rows before the damage and those of other files are in the output."""
    damaged = bad(tmp_path, name, content)
    other = bad(tmp_path, "other.jsonl", GOOD)
    options = {"workers": workers, "on_error": "skip"}
    summary = run([damaged, other], tmp_path / "out", **options)
    [listed] = [
        json.loads(line) for line in (tmp_path / "out.errors.jsonl").read_text().splitlines()
    ][-1:]
    assert (listed["where"], summary.skipped >= 1) == (str(damaged), True)
    assert problem in listed["problem"]
    assert summary.documents >= 50 + before
    with pytest.raises(DataError, match=problem):
        run([damaged, other], tmp_path / "out", workers=workers)


def test_a_bad_row_of_a_row_group_has_its_number_in_the_file(tmp_path):
    texts = ["a"] * 25 + [None] + ["b"] * 5
    pq.write_table(pa.table({"text": texts}), tmp_path / "in.parquet", row_group_size=10)
    with pytest.raises(DataError, match=r"in\.parquet row 26: text expected a string"):
        run(tmp_path / "in.parquet", tmp_path / "out", workers=2)


def test_a_vocabulary_that_the_model_lacks_is_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(tiny_tokenizer_folder() / "tokenizer.model", folder)
    model = TINY.model_copy(update={"padded_vocab_size": 128})
    (folder / "config.json").write_text(json.dumps(model.to_hf()))
    source = write_lines(tmp_path / "in.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match="ids, but the model beside it a vocabulary of 128"):
        run(source, tmp_path / "out", tokenizer=folder)


@pytest.mark.parametrize(
    ("name", "content", "options", "sentence"),
    [
        ("in.parquet", parquet_bytes(), {}, "needs the column text, but has body"),
        ("in.parquet", parquet_bytes()[:-40], {}, "damaged or cut short"),
        ("in.parquet", b"", {}, "damaged or cut short"),
        ("in.arrow", b"nonsense", {}, "damaged or cut short"),
        ("in.jsonl", b'{"text": "a"}\n{"text": "b"\n', {}, "in.jsonl:2: is not valid JSON"),
        ("in.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', {}, "in.jsonl:2: is not UTF-8"),
        ("in.jsonl", b'{"text": "a"}\n{"text": 7}\n', {}, "in.jsonl:2: text expected a string"),
        ("in.jsonl", b'{"text": NaN}\n', {}, "text expected a string, got float nan"),
        ("in.jsonl", b'{"body": "a"}\n', {}, "in.jsonl:1: text is missing; the row has body"),
        ("in.jsonl", b"\n\n", {}, "no document to write"),
        ("in.json", b'[{"text": "a"}, {"text": "b"', {}, "ends within the array, at element 2"),
        ("in.json", b'[{"text": "a"}\n, {"text" "b"}]', {}, "in.json:2: is not valid JSON"),
        ("in.json", b'[{"text": "a"}, 5]', {}, "row 2: expected an object with columns, got int"),
        ("in.json", b'[{"text": "a"}] x', {}, "has 'x' after the array"),
        ("in.json", b"", {}, "no document to write"),
        (
            "in.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9],
            {},
            "damaged or cut short",
        ),
        ("in.jsonl.gz", b"plain", {}, "isn't packed as its name says"),
        ("in.jsonl.bz2", bz2.compress(b'{"text": "a"}\n' * 99)[:-9], {}, "damaged or cut short"),
        ("in.jsonl.bz2", b"plain", {}, "isn't packed as its name says"),
        ("in.jsonl.xz", lzma.compress(b'{"text": "a"}\n' * 99)[:-9], {}, "damaged or cut short"),
        ("in.jsonl.xz", b"plain", {}, "isn't packed as its name says"),
        ("in.json", b'{\n "text": "a"\n}\n{\n "text": "b"\n}\n', {}, "objects of several lines"),
        ("in.jsonl.zst", b"plain", {}, "isn't packed as its name says"),
        ("in.csv", b"", {}, "no document to write"),
        ("in.csv", b"text,id\na,1\nb\n", {"json_keys": ["id"]}, "row 2: id expected a string"),
        ("in.doc", b"a", {}, "format that is not known"),
        ("in.jsonl", b'{"text": "a"}\n', {"tokenizer": Path("nowhere")}, "nowhere does not exist"),
    ],
)
def test_bad_input_is_a_sentence_and_leaves_nothing(tmp_path, name, content, options, sentence):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError) as caught:
        run(bad(tmp_path / "in", name, content), tmp_path / "out" / "out", **options)
    assert sentence in caught.value.message
    assert caught.value.hint
    assert not list((tmp_path / "out").iterdir())


def test_a_wrong_type_in_a_parquet_row_names_the_row(tmp_path):
    table = pa.table({"instruction": ["a", "b"], "output": ["c", None]})
    pq.write_table(table, tmp_path / "in.parquet")
    with pytest.raises(DataError, match=r"in\.parquet row 2: output expected a string"):
        run(tmp_path / "in.parquet", tmp_path / "out", handler="instruction")


@pytest.mark.parametrize("name", ["nothing.jsonl", "*.jsonl", "empty"])
def test_missing_inputs_are_named(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=name.replace("*", r"\*")):
        run(tmp_path / name, tmp_path / "out")


def test_an_output_that_cannot_be_written_is_a_sentence(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"text": "a"}])
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="can't write"):
        run(source, tmp_path / "file" / "out")
    with pytest.raises(ConfigError, match="is a folder"):
        run(source, tmp_path)


def test_an_error_keeps_the_files_of_an_earlier_run(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"text": "the fox"}])
    run(source, tmp_path / "out")
    before = outputs(tmp_path)
    write_lines(source, [{"text": "a"}, {"text": 5}])
    with pytest.raises(DataError):
        run(source, tmp_path / "out")
    assert outputs(tmp_path) == before
