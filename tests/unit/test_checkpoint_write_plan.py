"""The order in which files are filled, and how far one is whose parts are written in any order."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm3cli.checkpoint.files.digests import FileDigests, file_digest
from glm3cli.checkpoint.layouts.write_plan import Front, WritePlan, alternating
from glm3cli.checkpoint.names import slots
from glm3cli.config.parallel import ModelParallelConfig
from glm3cli.config.presets import PRESETS

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


def plan_of_6b():
    model = PRESETS["6b"]
    dtypes = dict.fromkeys(slots(model), torch.float16)
    return WritePlan(model, ModelParallelConfig(), dtypes, 5 * 10**9)


@pytest.mark.parametrize("shares", [[1], [1, 1], [2, 2, 1], [1] * 4, [1] * 5, [1] * 8, [1] * 28])
def test_two_threads_seldom_meet_in_a_file(shares):
    plan = plan_of_6b()
    every = list(slots(plan.model))
    ends = [len(every) * sum(shares[: n + 1]) // sum(shares) for n in range(len(shares))]
    files = [every[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    order = alternating(files, plan)
    assert sorted(order, key=every.index) == every
    where = {slot: number for number, file in enumerate(files) for slot in file}
    for number, file in enumerate(files):  # which is hashed from front to back
        assert [slot for slot in order if where[slot] == number] == file
    assert len(files) == 1 or met(order, where, plan) < 0.1 * plan.total_bytes


def met(order, where, plan):
    """Returns how many bytes one of two threads writes while the other writes to the same file."""
    left = iter(order)
    first, second = next(left), next(left)
    until = [plan.num_bytes(first), plan.num_bytes(second)]
    doing, now, together = [first, second], 0, 0
    while None not in doing:
        ended = until.index(min(until))
        together += (until[ended] - now) * (where[doing[0]] == where[doing[1]])
        now = until[ended]
        doing[ended] = next(left, None)
        if doing[ended] is not None:
            until[ended] += plan.num_bytes(doing[ended])
    return together
