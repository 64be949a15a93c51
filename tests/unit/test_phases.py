"""The clock of a run's phases counts every second once."""

import pytest

from glm3cli.train.progress.phases import PHASES, STEP_PHASES, Phases, describe


class Clock:
    """A clock that stands still between the test's changes of `now`."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_an_inner_phase_is_not_counted_in_the_outer_one(clock):
    phases = Phases(clock)
    clock.now += 1
    with phases.phase("forward_backward"):
        clock.now += 2
        with phases.phase("data_wait"):
            clock.now += 4
        clock.now += 8
    clock.now += 16
    totals = phases.totals()
    assert totals == {
        **dict.fromkeys(PHASES, 0.0),
        "data_wait": 4,
        "forward_backward": 10,
        "other": 17,
    }


def test_only_the_wait_for_an_item_is_waiting(clock):
    def slow():
        for item in "ab":
            clock.now += 3
            yield item
        clock.now += 1  # finding out that there is no more

    phases, got = Phases(clock), []
    for item in phases.waits(slow()):
        clock.now += 10
        got.append(item)
    assert got == ["a", "b"]
    assert phases.totals()["data_wait"] == 7
    assert phases.totals()["other"] == 20


def test_a_step_is_the_sum_of_its_parts_and_nothing_from_before(clock):
    phases = Phases(clock)
    with phases.phase("save"):
        clock.now += 50
    with phases.phase("optimizer"):
        clock.now += 7
    phases.begin_step()
    with phases.phase("optimizer"):
        clock.now += 2
    clock.now += 0.5
    step = phases.step()
    assert step == {"data_wait": 0, "forward_backward": 0, "optimizer": 2, "other": 0.5}
    assert tuple(step) == STEP_PHASES
    assert phases.totals()["save"] == 50
    assert phases.totals()["optimizer"] == 9


def test_a_phase_that_fails_ends(clock):
    def fail():
        with phases.phase("save"):
            clock.now += 1
            raise KeyError

    phases = Phases(clock)
    with pytest.raises(KeyError):
        fail()
    clock.now += 2
    assert (phases.totals()["save"], phases.totals()["other"]) == (1, 2)


def test_the_summary_has_seconds_and_shares():
    line = describe({"data_wait": 1.0, "forward_backward": 3.0})
    assert line == "time: data wait 1.0 s (25.0%) | forward backward 3.0 s (75.0%)"
    assert describe({"save": 0.0}) == "time: save 0.0 s (0.0%)"
