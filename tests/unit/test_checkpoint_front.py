"""How far a file is complete whose parts are written in any order."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from glm3cli.checkpoint.files.digests import FileDigests, file_digest
from glm3cli.checkpoint.layouts.front import Front

FILE = Path("file")
BEGINS, END = [10, 30, 60, 100], 150


def test_parts_in_their_order_move_it_byte_by_byte():
    told = []
    front = Front(FILE, BEGINS, END, lambda path, end: told.append((path, end)))
    front.advance(0, 20)
    front.complete(0)
    front.advance(1, 45)
    front.complete(1)
    assert told == [(FILE, 20), (FILE, 30), (FILE, 45), (FILE, 60)]


def test_what_stands_behind_a_missing_part_moves_nothing():
    told = []
    front = Front(FILE, BEGINS, END, lambda _path, end: told.append(end))
    front.advance(1, 45)
    front.advance(0, 20)
    front.complete(1)
    assert told == [20]
    front.complete(0)
    front.complete(3)
    front.complete(2)
    assert told == [20, 60, END]


@given(order=st.permutations(range(4)))
def test_it_never_goes_back_and_never_beyond_what_is_missing(order):
    told, missing = [0], set(order)

    def final(_path, end):
        assert end >= told[-1]
        assert all(end <= BEGINS[part] for part in missing - {writing})
        told.append(end)

    front = Front(FILE, BEGINS, END, final)
    for writing in order:
        front.advance(writing, BEGINS[writing] + 5)
        missing.discard(writing)
        front.complete(writing)
    assert told[-1] == END


def test_bytes_that_were_hashed_are_hashed_once(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(200)))
    digests = FileDigests()
    for end in (80, 30, 120):
        digests.advance(path, end)
    assert digests.digest(path) == file_digest(path)
