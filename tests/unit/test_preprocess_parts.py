"""`preprocess --part` and `--merge`: the parts, joined, are what one machine would have written."""

import gzip
import json
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from glm3cli.cli.app import app
from glm3cli.config.preprocess import PreprocessConfig
from glm3cli.data.indexed import IndexedDocuments
from glm3cli.data.preprocess import merge as merge_module
from glm3cli.data.preprocess.readers import chunks
from glm3cli.data.preprocess.run import preprocess
from glm3cli.data.preprocess.writing import output as output_module
from glm3cli.errors import ConfigError, DataError
from tests.support.preprocess_runs import outputs, run, write_lines
from tests.support.tiny_tokenizer import tiny_tokenizer_folder

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "你好", "世界")
HANDLERS = {
    "texts": {"handler": "text", "json_keys": ["text,title"]},
    "packed conversations": {"handler": "chat", "seq_length": 48, "pack": True},
    "packed pairs": {"handler": "preference", "seq_length": 48, "pack": True},
}


@pytest.fixture(scope="module", autouse=True)
def _small_chunks():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(chunks, "CHUNK_BYTES", 3000)
        patched.setattr(chunks, "CHUNK_ROWS", 17)
        patched.setattr(merge_module, "_DOCUMENTS", 23)
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[Path]:
    """A file of each format; one has bad rows, one is cut short, one is empty."""
    folder, rng = tmp_path_factory.mktemp("inputs"), random.Random(7)

    def text(most: int = 40) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    def row() -> dict[str, str]:
        return {"text": text(), "title": text(4), "instruction": text(), "output": text()} | {
            "prompt": text(9), "chosen": text(), "rejected": text()
        }  # fmt: skip

    tables = [pa.Table.from_pylist([row() for _ in range(n)]) for n in (90, 60, 70)]
    bad = [{"text": 1}, *(row() for _ in range(120)), {"text": 2}, *(row() for _ in range(40))]
    write_lines(folder / "a.jsonl", bad)
    pq.write_table(tables[0], folder / "b.parquet", row_group_size=20)
    pa.csv.write_csv(tables[1], folder / "c.csv")
    (folder / "d.json").write_text(json.dumps([row() for _ in range(80)]), "utf-8")
    lines = "".join(json.dumps(row()) + "\n" for _ in range(100)).encode()
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "f.jsonl.gz").write_bytes(gzip.compress(lines)[:-900])
    (folder / "g.jsonl").touch()
    with (
        pa.OSFile(str(folder / "h.arrow"), "wb") as file,
        pa.ipc.new_file(file, tables[2].schema) as stream,
    ):
        stream.write_table(tables[2], max_chunksize=30)
    return sorted(folder.iterdir())


def in_parts(source: list[Path], prefix: Path, count: int, **options) -> list[Path]:
    """Runs all parts, the last one first, and returns their folders."""
    for number in range(count, 0, -1):
        run(source, prefix, part=f"{number}/{count}", **options)
    return [
        prefix.with_name(f"{prefix.name}-part-{number}-of-{count}")
        for number in range(1, count + 1)
    ]


def merge(folders: list[Path], prefix: Path, **options):
    values = {"merge": folders, "output_prefix": prefix, **options}
    return preprocess(PreprocessConfig.parse(values))


def written(folder: Path) -> dict[str, object]:
    """The token files, the bad rows, and all statistics but the record's time of writing."""
    stats = json.loads((folder / "out.stats.json").read_text("utf-8"))
    errors = folder / "out.errors.jsonl"
    return {**outputs(folder), "stats": stats, "errors": errors.exists() and errors.read_bytes()}


@pytest.mark.parametrize("options", HANDLERS.values(), ids=HANDLERS)
def test_joined_parts_are_what_one_machine_writes(inputs, tmp_path, options):
    options = {**options, "on_error": "skip"}
    (tmp_path / "whole").mkdir()
    whole = run(inputs, tmp_path / "whole/out", **options)
    expected = written(tmp_path / "whole")
    assert whole.lost
    assert expected["errors"]
    for count in (1, 3, 8):
        place = tmp_path / str(count)
        folders = in_parts(inputs, place / "out", count, **options)
        assert sum(map(documents, folders)) == whole.documents
        summary = merge(folders[::-1], place / "out")
        assert written(place) == expected
        assert (summary.skipped, summary.lost) == (whole.skipped, whole.lost)
    # What one machine would have written is not written again.
    assert run(inputs, tmp_path / "3/out", **options).repeated
    assert merge(folders, tmp_path / "8/out").repeated


def documents(folder: Path) -> int:
    return json.loads((folder / "out.stats.json").read_text("utf-8"))["documents"]


def test_parts_have_equal_shares_of_the_work(inputs, tmp_path):
    folders = in_parts([inputs[0]] * 2, tmp_path / "out", 4, on_error="skip")
    assert all(60 < documents(folder) < 100 for folder in folders)  # of 320


def test_there_may_be_more_parts_than_rows(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"text": "the fox"}, {"text": "a dog"}])
    for count in (1, 9):
        merge(in_parts([source], tmp_path / "out", count), tmp_path / f"of_{count}")
    assert (tmp_path / "of_9_text_document.idx").read_bytes() == (
        tmp_path / "of_1_text_document.idx"
    ).read_bytes()


class StopError(Exception):
    """Ends a run in its middle."""


def test_a_part_and_a_merge_go_on_where_they_were_stopped(inputs, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(output_module, "_SECONDS_BETWEEN_NOTES", 0.0)
    inputs, options = inputs[:3], {"handler": "chat", "on_error": "skip"}
    (tmp_path / "whole").mkdir()
    run(inputs, tmp_path / "whole/out", **options)

    def stop_after(reports: int):
        left = iter(range(reports))

        def report(_progress):
            if next(left, None) is None:
                raise StopError

        return report

    for steps in (1, 0):
        with pytest.raises(StopError):
            run(inputs, tmp_path / "out", stop_after(steps), part="2/3", **options)
    folders = in_parts(inputs, tmp_path / "out", 3, **options)
    values = {"merge": [tmp_path / "out-part-*-of-3"], "output_prefix": tmp_path / "out"}
    for steps in (3, 0, 6):
        with pytest.raises(StopError):
            preprocess(PreprocessConfig.parse(values), stop_after(steps))
    preprocess(PreprocessConfig.parse(values))
    assert written(tmp_path) == written(tmp_path / "whole")
    assert caplog.text.count("going on with an unfinished run") == 5
    assert [f.name for f in folders] == [f"out-part-{i}-of-3" for i in (1, 2, 3)]


@pytest.fixture(scope="module")
def parts(inputs, tmp_path_factory) -> Path:
    """A folder with three parts of one run."""
    place = tmp_path_factory.mktemp("parts")
    in_parts(inputs, place / "out", 3, on_error="skip")
    return place


def no_part(place, _inputs):
    shutil.rmtree(place / "out-part-2-of-3")
    return "lacks part 2 of 3"


def twice(place, _inputs):
    shutil.copytree(place / "out-part-2-of-3", place / "out-part-4-of-3")
    return "has a part twice"


def unfinished(place, _inputs):
    next((place / "out-part-3-of-3").glob(".*.record.json")).unlink()
    return "has no finished part"


def damaged(place, _inputs):
    path = next((place / "out-part-1-of-3").glob("*.bin"))
    path.write_bytes(path.read_bytes()[:-4])
    return "is missing or damaged"


def no_index(place, _inputs):
    path = next((place / "out-part-1-of-3").glob("*.idx"))
    path.write_bytes(bytes(path.stat().st_size))
    return f"--merge {place}/out-part-1-of-3: .* is damaged"


def other_settings(place, inputs):
    shutil.rmtree(place / "out-part-2-of-3")
    run(inputs, place / "out", part="2/3", append_eod=True, on_error="skip")
    return "are parts of different runs"


def other_number(place, inputs):
    run(inputs, place / "out-part-2-of-3", part="2/4", on_error="skip")
    return "are parts of different runs|has the parts of two runs"


def two_handlers(place, inputs):
    run(inputs, place / "out", part="1/3", handler="chat", on_error="skip")
    return r"has the parts of two runs \(chat and text\)"


def other_reading(place, _inputs):
    path = next((place / "out-part-2-of-3").glob(".*.record.json"))
    record = json.loads(path.read_text("utf-8"))
    record["part"]["begin"][1] += 1
    path.write_text(json.dumps(record), "utf-8")
    return "doesn't begin where the part before it ends"


@pytest.mark.parametrize(
    "change",
    [no_part, twice, unfinished, damaged, no_index, other_settings, other_number, two_handlers,
     other_reading],
)  # fmt: skip
def test_parts_that_do_not_belong_together_are_refused(parts, inputs, tmp_path, change):
    place = shutil.copytree(parts, tmp_path / "place")
    message = change(place, inputs)
    with pytest.raises(DataError, match=message):
        merge([place / "out-part-*"], place / "out")
    assert not list(place.glob("*.bin"))
    assert not list(place.glob(".*"))


def test_parts_may_come_from_machines_with_their_own_copies(parts, inputs, tmp_path):
    (tmp_path / "copy").mkdir()
    copies = [shutil.copyfile(path, tmp_path / "copy" / path.name) for path in inputs]
    run(copies, tmp_path / "out", part="2/3", on_error="skip")
    for number in (1, 3):
        folder = f"out-part-{number}-of-3"
        shutil.copytree(parts / folder, tmp_path / folder)
    merge([tmp_path / "out-part-*"], tmp_path / "out")
    run(inputs, tmp_path / "whole", on_error="skip")
    for ending in ("bin", "idx"):
        joined, whole = (tmp_path / f"{name}_text_document.{ending}" for name in ("out", "whole"))
        assert joined.read_bytes() == whole.read_bytes()


def test_a_prefix_may_say_itself_which_part_it_is(parts, inputs, tmp_path):
    for name, part in (("x-part-1", "1/2"), ("x-part-02-of-2", "2/2")):
        run(inputs, tmp_path / name, part=part, on_error="skip")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x-part-02-of-2", "x-part-1"]
    assert merge([tmp_path / "x-part-*"], tmp_path / "x").documents


REFUSED = {
    "0/3": "give I/N", "4/3": "give I/N", "1": "give I/N", "a/b": "give I/N"
}  # fmt: skip


def test_options_that_do_not_go_together():
    values = {"input": [Path("a.jsonl")], "tokenizer": Path("t"), "output_prefix": Path("out")}
    for part, message in REFUSED.items():
        with pytest.raises(ConfigError, match=message):
            PreprocessConfig.parse({**values, "part": part})
    with pytest.raises(ConfigError, match="a pipe can't be cut"):
        PreprocessConfig.parse({**values, "input": [Path("-")], "part": "1/2"})
    with pytest.raises(ConfigError, match="--tokenizer is missing"):
        PreprocessConfig.parse({k: v for k, v in values.items() if k != "tokenizer"})
    for more in ({"handler": "chat"}, {"tokenizer": Path("t")}, {"pack": True}, {"part": "1/2"}):
        flag = next(iter(more))
        with pytest.raises(ConfigError, match=f"--{flag} doesn't go with --merge"):
            PreprocessConfig.parse({"merge": [Path("p")], "output_prefix": Path("out"), **more})


def test_the_command_line(inputs, tmp_path):
    def call(*words: object):
        result = CliRunner().invoke(app, ["preprocess", *map(str, words)])
        assert result.exit_code == 0, result.output
        return result

    out = ["--output-prefix", tmp_path / "out"]
    for part in ("1/2", "2/2"):
        made = call(
            "--input", *inputs[1:3], "--tokenizer", tiny_tokenizer_folder(), *out,
            "--part", part, "--workers", 1,
        )  # fmt: skip
    assert f"--merge {tmp_path}/out-part-*-of-2 --output-prefix {tmp_path}/out" in made.stderr
    folders = sorted(tmp_path.glob("out-part-*"))
    result = call("--merge", *folders, *out, "--json")
    assert json.loads(result.stdout)["documents"] == 150
    assert "150 documents" in call("--merge", *folders, *out).stdout


def test_an_index_that_has_more_documents_than_tokens_is_damaged(tmp_path):
    run(write_lines(tmp_path / "in.jsonl", [{"text": "the fox"}]), tmp_path / "out")
    (tmp_path / "out_text_document.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"PLACE: .*out_text_document.bin is damaged"):
        IndexedDocuments(tmp_path / "out_text_document", "PLACE")
