"""Files of any bytes: never a traceback, and nothing is lost in silence.

Each check is run on a few inputs here, and on thousands by `pytest -m slow`. What the readers
should find is derived by Python's own parsers of whole files.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from glm3cli.data.preprocess.handlers import choose_columns
from glm3cli.data.preprocess.readers.bad_rows import BadRow
from glm3cli.data.preprocess.readers.chunks import Damage, DamageError
from glm3cli.data.preprocess.readers.sources import parse_line, read_chunks, rows_of
from glm3cli.errors import DataError
from tests.support.fuzz import check, templated
from tests.support.preprocess_runs import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# ---- files

TEXTS = st.lists(
    st.text(max_size=12)
    | st.sampled_from(['"', 'a "b" c', "x,y", "你好", "a\nb", "\\", "{}", "[,]"]),
    max_size=8,
)
FORMS = ["jsonl", "json", "csv", "txt", "parquet", "arrow"]
Edit = tuple[str, float, bytes]
# What is done to the bytes of a file: where, as a share of it, and with which bytes.
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["insert", "replace", "delete", "cut"]),
        st.floats(0, 1),
        st.sampled_from(
            [b'"', b"\n", b",", b"[", b"]", b"{", b"}", b"\\", b"\x00", b"\xff", b"\xc4"]
        )
        | st.binary(min_size=1, max_size=4),
    ),
    max_size=3,
)


def content_of(form: str, texts: list[str]) -> bytes:
    objects = [{"text": text} for text in texts]
    if form == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in objects).encode()
    if form == "json":
        return json.dumps(objects, indent=len(texts) % 2 or None, ensure_ascii=False).encode()
    if form == "txt":
        return "".join(text + "\n" for text in texts).encode()
    if form == "csv":
        file = io.StringIO(newline="")
        # Python 3.11 quotes only those line breaks that are its own line's end.
        end = "\r\n" if any("\r" in text for text in texts) else "\n"
        rows = [["text", "id"], *([text, "1"] for text in texts)]
        csv.writer(file, lineterminator=end).writerows(rows)
        return file.getvalue().encode()
    table, out = pa.table({"text": pa.array(texts, pa.string())}), io.BytesIO()
    if form == "parquet":
        pq.write_table(table, out, row_group_size=3)
    else:
        with pa.ipc.new_file(out, table.schema) as stream:
            stream.write_table(table, max_chunksize=3)
    return out.getvalue()


def _packed(content: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(content)
    if suffix == ".bz2":
        return bz2.compress(content)
    if suffix == ".xz":
        return lzma.compress(content)
    return pa.compress(content, "zstd", asbytes=True)


def edited(content: bytes, edits: list[Edit]) -> bytes:
    for what, share, data in edits:
        at = round(share * len(content))
        if what == "cut":
            content = content[:at]
        elif what == "insert":
            content = content[:at] + data + content[at:]
        else:
            content = (
                content[:at] + (data if what == "replace" else b"") + content[at + len(data) :]
            )
    return content


def read(path: Path) -> tuple[list[Any], int, list[DamageError]]:
    """Returns the rows of a file, the number of bad ones, and what can't be read."""
    good, bad, damage = [], 0, []
    for chunk in read_chunks(path, lambda names: choose_columns(templated("text", ""), names)):
        if isinstance(chunk, Damage):
            damage.append(chunk.error)
            continue
        try:
            rows = rows_of(chunk)
        except DamageError as error:
            damage.append(error)
            continue
        for row in rows:
            try:
                parsed = parse_line(chunk.kind, row) if chunk.kind in ("json", "text") else row
            except ValueError:
                bad += 1
                continue
            if isinstance(parsed, BadRow):
                assert parsed.problem
                bad += 1
            elif parsed is not None:
                good.append(parsed)
    for error in damage:
        assert error.message
        assert error.hint
        assert error.share is None or 0 <= error.share <= 1
    return good, bad, damage


def expected(form: str, content: bytes) -> list[Any] | None:
    """Returns the rows that Python's parsers find in a whole file; None if it isn't valid."""
    content = content.removeprefix(b"\xef\xbb\xbf")
    try:
        if form == "jsonl":
            lines = content.decode().split("\n")
            return [json.loads(line) for line in lines if line and not line.isspace()]
        if form == "json":
            return json.loads(content)
        if form == "txt":
            lines = content.decode().split("\n")
            whole = lines[:-1] if not lines[-1] else lines
            return [{"text": line.removesuffix("\r")} for line in whole]
        # A column that isn't read may have any bytes.
        text = content.decode(errors="surrogateescape")
        if not text:
            return []
        header, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        "".join(header).encode()
        if any(row and len(row) != len(header) for row in rows) or header.count("text") != 1:
            return None
        found = [{"text": row[header.index("text")]} for row in rows if row]
        "".join(row["text"] for row in found).encode()
        return found
    except (ValueError, csv.Error, RecursionError, StopIteration):
        return None


def check_file(folder: Path) -> Callable[..., None]:
    """Returns the check that a damaged file gives its rows, or says that it doesn't."""

    def body(form: str, packed: str, texts: list[str], edits: list[Edit], outside: bool) -> None:
        whole = content_of(form, texts)
        packed = packed if form not in ("parquet", "arrow") else ""
        content = whole if outside else edited(whole, edits)
        if packed:
            content = _packed(content, packed)
        content = edited(content, edits) if outside else content
        path = folder / f"in.{form}{packed}"
        path.write_bytes(content)
        good, bad, damage = read(path)
        if form in ("parquet", "arrow"):
            if not edits:
                assert (good, bad, damage) == ([{"text": text} for text in texts], 0, [])
            return
        try:
            plain = gzip.decompress(content) if packed == ".gz" else content
        except (OSError, EOFError, zlib.error):
            plain = b""
            assert damage
            return
        if packed in (".zst", ".bz2", ".xz"):
            if outside and edits:
                return
            plain = edited(whole, edits)
        if plain.startswith((b"\xff\xfe", b"\xfe\xff")):
            assert damage
            return
        if form in ("json", "jsonl"):
            start = plain.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
            form = "json" if start == b"[" else "jsonl"
        rows = expected(form, plain)
        if rows is None and form == "json" and not (bad or damage):
            # White space that JSON doesn't know, between values, does no harm.
            spaced = "".join(" " if one.isspace() else one for one in plain.decode("utf-8-sig"))
            assert len(good) == len(json.loads(spaced))
        elif rows is None:
            assert bad or damage
        elif form == "csv" and not plain.strip() and plain.removeprefix(b"\xef\xbb\xbf"):
            assert damage  # where the names of columns should be
        else:
            assert good == rows
            assert (bad, damage) == (0, [])

    return body


FILES = {
    "form": st.sampled_from(FORMS),
    "packed": st.sampled_from(["", "", ".gz", ".zst", ".bz2", ".xz"]),
    "texts": TEXTS,
    "edits": EDITS,
    "outside": st.booleans(),
}


def test_damaged_files(folder: Path) -> None:
    check(300, check_file(folder), **FILES)


@pytest.mark.slow
def test_many_damaged_files(folder: Path) -> None:
    check(8000, check_file(folder), **FILES)


# ---- bad rows among good ones

BAD_LINES = [
    '{"text": bad}',
    '{"text": "a "b" c"}',
    '{"text": "x",}',
    '{"text" "x"}',
    '{"text": "\\d"}',
]
BAD_RECORDS = ['"a" b,1', "a", "a,b,c", '"a"b"c,1']


def check_bad_rows(folder: Path) -> Callable[..., None]:
    """Returns the check that bad rows take no others with them."""

    def body(form: str, rows: list[str | int], packed: str) -> None:
        bad_rows = BAD_RECORDS if form == "csv" else BAD_LINES
        good = [row for row in rows if isinstance(row, str)]
        lines = []
        for row in rows:
            if isinstance(row, int):
                lines.append(bad_rows[row % len(bad_rows)])
            elif form == "csv":
                quoted = row.replace('"', '""')
                lines.append(f'"{quoted}",1')
            else:
                lines.append(json.dumps({"text": row}))
        text = {
            "json": "[" + ", \n".join(lines) + "]",
            "csv": "\n".join(["text,id", *lines]) + "\n",
        }
        content = text.get(form, "\n".join(lines)).encode()
        if packed:
            content = gzip.compress(content)
        path = folder / f"rows.{form}{packed}"
        path.write_bytes(content)
        found, bad, damage = read(path)
        assert found == [{"text": row} for row in good]
        assert (bad, damage) == (len(rows) - len(good), [])

    return body


ROWS = {
    "form": st.sampled_from(["jsonl", "json", "csv"]),
    # A text with line breaks could be one that a stray quote before it has joined with other rows.
    "rows": st.lists(
        st.integers(0, 19)
        | st.text(
            st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\x85\u2028\u2029"),
            max_size=9,
        ),
        max_size=8,
    ),
    "packed": st.sampled_from(["", ".gz"]),
}


def test_bad_rows_among_good_ones(folder: Path) -> None:
    check(200, check_bad_rows(folder), **ROWS)


@pytest.mark.slow
def test_many_bad_rows_among_good_ones(folder: Path) -> None:
    check(4000, check_bad_rows(folder), **ROWS)


# ---- whole runs


def check_run(folder: Path) -> Callable[..., None]:
    """Returns the check that a run writes its files, or ends with a sentence."""

    def body(form: str, texts: list[str], edits: list[Edit], on_error: str) -> None:
        path = folder / f"whole.{form}"
        path.write_bytes(edited(content_of(form, texts), edits))
        try:
            summary = run(path, folder / "out", on_error=on_error, force=True)
        except DataError:
            return
        assert summary.documents > 0
        if on_error == "stop":
            assert (summary.skipped, summary.lost) == (0, {})
        if not edits:
            assert summary.documents == sum(map(has_tokens, texts_of(form, texts)))

    return body


def has_tokens(text: str) -> bool:
    """Whether a text has tokens; a line break alone may have none."""
    sequences = templated("text", "").encode({"text": text}).sequences
    return any(len(ids) for group in sequences.values() for ids in group)


def texts_of(form: str, texts: list[str]) -> list[str]:
    """A line of a text file is a document of its own."""
    return (
        content_of(form, texts).decode().replace("\r\n", "\n").split("\n")
        if form == "txt"
        else texts
    )


RUNS = {
    "form": st.sampled_from(FORMS),
    "texts": TEXTS,
    "edits": EDITS,
    "on_error": st.sampled_from(["stop", "skip"]),
}


def test_runs_on_damaged_files(folder: Path) -> None:
    check(40, check_run(folder), **RUNS)


@pytest.mark.slow
def test_many_runs_on_damaged_files(folder: Path) -> None:
    check(1000, check_run(folder), **RUNS)
