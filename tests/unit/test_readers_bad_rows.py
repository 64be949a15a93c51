"""A bad row takes no other row with it, and what can't be read is said with its share."""

import datetime
import gzip
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glm3cli.data.preprocess.readers import csv_rows
from glm3cli.data.preprocess.readers.bad_rows import BadRow
from glm3cli.data.preprocess.readers.chunks import Damage
from glm3cli.data.preprocess.readers.sources import parse_line, read_chunks, rows_of
from glm3cli.errors import DataError
from tests.support.preprocess_runs import run

GBK = "你好".encode("gbk")


def read(path: Path, content: bytes | None = None) -> tuple[list[Any], list[BadRow], list[Damage]]:
    """Reads a file; returns its good rows, its bad rows, and its damage."""
    if content is not None:
        path.write_bytes(content)
    good: list[Any] = []
    bad: list[BadRow] = []
    damage: list[Damage] = []
    for chunk in read_chunks(path, list):
        if isinstance(chunk, Damage):
            damage.append(chunk)
            continue
        for row in rows_of(chunk):
            parsed = parse_line(chunk.kind, row) if chunk.kind in ("json", "text") else row
            (bad if isinstance(parsed, BadRow) else good).append(parsed)
    return good, bad, damage


def bad_file(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def texts(*names: str) -> list[dict[str, str]]:
    return [{"text": name} for name in names]


ONE, TWO, LAST = ('{"text": "one"}', '{"text": "two"}', '{"text": "last"}')
BAD_ELEMENTS = {
    "a word": '{"text": bad}',
    "a stray quote": '{"text": "say "hi" now"}',
    "an odd stray quote": '{"text": "5" wide"}',
    "no closing quote": '{"text": "open}',
    "no closing bracket": '{"text": ["open"}',
    "no closing brace": '{"text": "open"',
    "a comma too many": '{"text": "x",}',
    "no colon": '{"text" "x"}',
    "nothing": "",
    "a bare word": "None",
    "a nested object of other keys": '{"text": [{"a": bad}, {"a": 1}, {"a": 2}]}',
    "a line break in a text": '{"text": "a\nb"}',
    "a bad escape": r'{"text": "\d"}',
    "a long number": '{"text": ' + "9" * 5000 + "}",
    "deep lists": '{"text": ' + "[" * 3000 + "]" * 3000 + "}",
    "rather deep lists": '{"text": ' + "[" * 150 + "]" * 150 + "}",
}


@pytest.mark.parametrize("separator", [", ", ",\n"], ids=["in a line", "in lines"])
@pytest.mark.parametrize("element", BAD_ELEMENTS.values(), ids=BAD_ELEMENTS)
def test_a_bad_element_of_an_array_takes_no_other_with_it(tmp_path, element, separator):
    array = f"[{separator.join([ONE, element, TWO, element, LAST])}]"
    good, bad, damage = read(tmp_path / "in.json", array.encode())
    assert good == texts("one", "two", "last")
    assert (len(bad), damage) == (2, [])


@pytest.mark.parametrize("element", BAD_ELEMENTS.values(), ids=BAD_ELEMENTS)
def test_a_bad_element_may_be_the_first_or_the_last(tmp_path, element):
    good, bad, damage = read(tmp_path / "in.json", f"[{element},\n{ONE},\n{TWO}]".encode())
    assert (good, len(bad), damage) == (texts("one", "two"), 1, [])
    good, bad, damage = read(tmp_path / "in.json", f"[{ONE},\n{TWO},\n{element}]\n".encode())
    assert good == texts("one", "two")
    assert (len(bad), len(damage)) in ((1, 0), (0, 1))  # without an end, the file may be cut short


def test_an_array_that_lacks_a_comma_loses_no_element(tmp_path):
    good, bad, damage = read(tmp_path / "in.json", f"[{ONE} {TWO}, {LAST}]".encode())
    assert (good, damage) == (texts("one", "two", "last"), [])
    assert "expected , or ]" in bad[0].problem


def test_what_follows_an_array_is_lost_with_its_share(tmp_path):
    good, _, damage = read(tmp_path / "in.json", f"[{ONE}]\n[{TWO}]".encode())
    assert good == texts("one")
    assert damage[0].error.share == pytest.approx(0.5, abs=0.05)


def test_the_array_is_searched_beyond_one_block(tmp_path):
    """The bad element is longer than what is read at once."""
    long = f'{{"text": "a "bad" quote", "more": [{", ".join(["1"] * 800_000)}]}}'
    good, bad, damage = read(tmp_path / "in.json", f"[{ONE}, {long}, {LAST}]".encode())
    assert (good, len(bad), damage) == (texts("one", "last"), 1, [])


@pytest.mark.parametrize("name", ["in.csv", "in.json", "in.jsonl", "in.txt"])
def test_a_row_that_is_not_utf8_says_so_and_how_to_convert_it(tmp_path, name):
    lines = [b"one", GBK, b"last"]
    content = {
        "in.csv": b"text\n" + b"\n".join(lines),
        "in.txt": b"\n".join(lines),
        "in.json": b"[" + b",\n".join(b'{"text": "%s"}' % line for line in lines) + b"]",
        "in.jsonl": b"\n".join(b'{"text": "%s"}' % line for line in lines),
    }[name]
    if name in ("in.csv", "in.json"):
        good, [bad], damage = read(tmp_path / name, content)
        assert (good, damage) == (texts("one", "last"), [])
        problem = bad.problem
    else:  # a worker parses the lines
        summary = run(bad_file(tmp_path, name, content), tmp_path / "out", on_error="skip")
        assert (summary.documents, summary.skipped) == (2, 1)
        problem = json.loads((tmp_path / "out.errors.jsonl").read_text())["problem"]
    assert "is not UTF-8" in problem
    assert "iconv -f GB18030" in problem


def test_utf16_is_named(tmp_path):
    for name in ("in.csv", "in.jsonl", "in.txt", "in.json"):
        _, _, [damage] = read(tmp_path / name, 'text\n{"text": "好"}\n'.encode("utf-16"))
        assert "is UTF-16" in damage.error.message
        assert damage.error.share == 1


HEADER = "instruction,input,output\n"
BAD_RECORDS = {
    "too wide": "Name 3, please,,red, green\n",
    "too narrow": "q,a\n",
    "a stray quote": '"a" word,,b\n',
    "an open quote": '"open,,b\n',
    "a quote in a later cell": 'a,"b"c,d\n',
}


@pytest.mark.parametrize("record", BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_a_bad_record_takes_no_other_with_it(tmp_path, record):
    rows = ["a,b,c\n", '"say ""hi""","x\ny",c\n', "d,,e\n"]
    content = HEADER + rows[0] + record + rows[1] + record + rows[2]
    good, bad, damage = read(tmp_path / "in.csv", content.encode())
    assert [tuple(row.values()) for row in good] == [
        ("a", "b", "c"),
        ('say "hi"', "x\ny", "c"),
        ("d", "", "e"),
    ]
    assert (len(bad), damage) == (2, [])


@pytest.mark.parametrize("content", ["d,,e\n", ""])
def test_an_open_quote_in_the_last_line_is_damage(tmp_path, content):
    """Nothing follows it, and the file may be cut short."""
    good, bad, [damage] = read(tmp_path / "in.csv", f'{HEADER}a,b,c\n{content}"op'.encode())
    assert (len(good), bad) == (2 if content else 1, [])
    assert "a quote is not closed" in damage.error.message


def test_the_other_lines_of_a_bad_text_are_no_rows(tmp_path):
    """With one column, a line of a text could be a row."""
    content = 'text\n"two\nlines"\n"a "bad" quote\nin\nlines"\nlast\n'
    good, bad, _ = read(tmp_path / "in.csv", content.encode())
    assert good[0] == {"text": "two\nlines"}
    assert good[-1] == {"text": "last"}
    assert "lines belong to it" in bad[0].problem or len(bad) > 1


def test_an_open_quote_is_searched_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_rows, "_MOST_CHARACTERS", 50)
    lines = "".join(f"row {i},x,y\n" for i in range(99))
    good, bad, damage = read(tmp_path / "in.csv", f'{HEADER}"open,x,y\n{lines}'.encode())
    assert (len(good), len(bad), damage) == (99, 1, [])


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    _, _, [damage] = read(tmp_path / "in.csv", b"text,text\na,b\n")
    assert "has the column text twice" in damage.error.message


@pytest.mark.parametrize(
    ("name", "header", "sentence"),
    [
        ("in.csv", "text;id", "has semicolons between its columns, not commas"),
        ("in.csv", "text\tid", "has tabs between its columns, not commas"),
        ("in.tsv", "text,id", "has commas between its columns, not tabs"),
    ],
)
def test_another_separator_is_named(tmp_path, name, header, sentence):
    (tmp_path / name).write_text(f"{header}\n")
    with pytest.raises(DataError, match=sentence) as caught:
        run(tmp_path / name, tmp_path / "out")
    assert caught.value.hint
    mark = "," if name == "in.csv" else "\t"
    (tmp_path / name).write_text(f"a;b{mark}c\n")
    with pytest.raises(DataError, match="needs the column text, but has a;b, c"):
        run(tmp_path / name, tmp_path / "out")


def test_a_file_without_lines_has_no_rows(tmp_path):
    """As an empty shard of JSON Lines among others."""
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("" if name == "a.csv" else "text\nthe fox\n")
    assert run(tmp_path, tmp_path / "out").documents == 1
    _, _, [damage] = read(tmp_path / "c.csv", b"\ntext\n")
    assert "begins with an empty line" in damage.error.message


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_a_file_that_is_not_packed_as_its_name_says_is_named(tmp_path, suffix):
    for content in (ONE.encode(), b"PK\x03\x04"):
        _, _, [damage] = read(tmp_path / f"in.jsonl{suffix}", content)
        assert "isn't packed as its name says: it begins with" in damage.error.message
        assert damage.error.share == 1.0


@pytest.mark.skipif(shutil.which("zstd") is None, reason="zstd is not installed")
def test_a_window_of_zstd_that_is_too_large_is_named(tmp_path):
    command = ["zstd", "-q", "--ultra", "--long=31", "-o", str(tmp_path / "in.jsonl.zst")]
    subprocess.run(command, input=b'{"text": "a"}\n', check=True)
    _, _, [damage] = read(tmp_path / "in.jsonl.zst")
    assert "packed with a window above 128 MiB" in damage.error.message
    assert "zstd -dc --long=31" in damage.error.hint
    skipped = b"\x50*M\x18\x00\x00\x00\x00"  # as pzstd begins
    packed = skipped + compressed(ONE.encode(), ".zst")
    assert read(tmp_path / "in.jsonl.zst", packed)[0] == texts("one")


def compressed(content: bytes, name: str) -> bytes:
    return (
        gzip.compress(content)
        if name.endswith(".gz")
        else pa.compress(content, "zstd", asbytes=True)
    )


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("form", ["jsonl", "csv", "json", "txt"])
def test_a_packed_file_that_is_cut_gives_all_whole_rows_before(tmp_path, form, suffix):
    """The row that is cut is left out, though a cut text could be taken for a whole one."""
    numbers = [f"{i} {i * 7919 % 10007 * 104729}" for i in range(30_000)]
    lines = [json.dumps({"text": number}) for number in numbers]
    content = {
        "jsonl": "\n".join(lines),
        "csv": "text\n" + "\n".join(numbers),
        "json": "[" + ",\n".join(lines) + "]",
        "txt": "\n".join(numbers),
    }[form]
    packed = compressed(content.encode(), suffix)
    good, bad, [damage] = read(tmp_path / f"in.{form}{suffix}", packed[: len(packed) * 2 // 3])
    assert len(good) > 3000  # zstd packs large blocks
    assert (good, bad) == (texts(*numbers[: len(good)]), [])
    assert "damaged or cut short" in damage.error.message
    assert damage.error.share is None


def test_a_damaged_row_group_is_lost_alone_with_its_share(tmp_path, monkeypatch):
    path = tmp_path / "in.parquet"
    table = pa.table({"text": [f"row {i}" for i in range(100)]})
    pq.write_table(table, path, row_group_size=25, write_page_checksum=True, use_dictionary=False)
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 8] = bytes(8)
    path.write_bytes(content)
    from glm3cli.data.preprocess.readers import tables

    monkeypatch.setattr(tables, "_GROUP_BYTES", 0)  # read here, not by a worker
    good, _, [damage] = read(path)
    assert [row["text"] for row in good] == [f"row {i}" for i in [*range(25), *range(50, 100)]]
    assert damage.error.share == 0.25


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_column_whose_name_is_not_utf8_is_damage(tmp_path, form):
    path, table = tmp_path / f"in.{form}", pa.table({"text": ["one"]})
    if form == "parquet":
        pq.write_table(table, path, store_schema=False)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    good, bad, [damage] = read(path, path.read_bytes().replace(b"text", b"te\x80t"))
    assert (good, bad, damage.error.share) == ([], [], 1.0)
    assert "damaged or cut short: 'utf-8' codec" in damage.error.message


def test_a_text_of_a_table_that_is_not_utf8_is_one_bad_row(tmp_path):
    array = pa.array([b"one", GBK, b"last"]).cast(pa.string(), safe=False)
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        pass
    else:
        pytest.fail("the text is UTF-8")
    table = pa.table({"text": array})
    pq.write_table(table, tmp_path / "in.parquet")
    path = str(tmp_path / "in.arrow")
    with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, table.schema) as stream:
        stream.write_table(table)
    good, bad, damage = read(tmp_path / "in.arrow")
    assert (good, len(bad), damage) == (texts("one", "last"), 1, [])
    [group] = read_chunks(tmp_path / "in.parquet", list)
    assert [isinstance(row, BadRow) for row in rows_of(group)] == [False, True, False]


TOOL_ROWS = [
    {
        "text": "a",
        "call": {"name": "f", "arguments": {"city": "北京", "list": [1, None]}},
        "tools": None,
    },
    {"text": "b", "call": {"name": "g", "arguments": {"days": 3}}, "tools": [{"x": {"y": "z"}}]},
    {"text": "c", "call": {"name": "h", "arguments": {}}, "tools": [{"x": {}}, {"other": 1}]},
]


def written(path, table):
    """Writes a table in the format of the file's name."""
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    return path


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_what_arrow_pads_is_dropped(tmp_path, form):
    table = pa.Table.from_pylist(TOOL_ROWS)
    path = written(tmp_path / f"in.{form}", table)
    rows = [row for chunk in read_chunks(path, list) for row in rows_of(chunk)]
    assert rows == TOOL_ROWS


def test_an_arrow_map_is_read_as_an_object(tmp_path):
    """Empty ones, too, at any depth: the properties of a tool without parameters are {}."""
    kind = pa.map_(pa.string(), pa.int64())
    tool = pa.struct([("properties", pa.map_(pa.binary(), pa.list_(pa.binary())))])
    table = pa.table(
        {
            "arguments": pa.array([[("a", 1), ("b", None)], [], None], kind),
            "tools": pa.array(
                [
                    [{"properties": []}, {"properties": [(b"a", [b"x", GBK])]}],
                    [{"properties": None}, None],
                    [],
                ],
                pa.large_list(tool),
            ),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    [chunk] = read_chunks(tmp_path / "in.parquet", list)
    assert rows_of(chunk) == [
        {
            "arguments": {"a": 1, "b": None},
            "tools": [{"properties": {}}, {"properties": {"a": ["x", GBK]}}],
        },
        {"arguments": {}, "tools": [{}, None]},
        {"arguments": None, "tools": []},
    ]


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_times_that_python_cannot_read_spoil_no_row(tmp_path, form):
    """A zone that it doesn't know, and nanoseconds, which it doesn't have."""
    zone, when = "GMT+8", 1_700_000_000_123_456_789
    turn = pa.struct([("said", pa.string()), ("at", pa.timestamp("ns", zone))])
    table = pa.table(
        {
            "turns": pa.array([[{"said": "hi", "at": when}], []], pa.list_(turn)),
            "at": pa.array([when // 10**9, None], pa.timestamp("s", zone)),
            "all": pa.array([[("a", when)], None], pa.map_(pa.string(), pa.timestamp("ns", zone))),
            "two": pa.array([[1, 2], None], pa.list_(pa.duration("ns"), 2)),
        }
    )
    path = written(tmp_path / f"in.{form}", table)
    first, second = [row for chunk in read_chunks(path, list) for row in rows_of(chunk)]
    moment = datetime.datetime(2023, 11, 14, 22, 13, 20, 123456)
    assert first["turns"] == [{"said": "hi", "at": moment}]
    assert first["at"] == moment.replace(microsecond=0)
    assert (first["all"], second["turns"], second["at"]) == ({"a": moment}, [], None)
