"""The one way to tell how far work is, and to end it."""

import pytest

from planner.errors import Cancelled
from planner.progress import Meter, tell_nobody, unless


def test_a_meter_adds_up_and_tells_no_more_than_there_is() -> None:
    told: list[tuple[str, int, int]] = []
    meter = Meter(lambda *step: told.append(step), "census", 10)
    meter.advance(4)
    meter.advance(0)
    meter.advance(40)
    meter.begin("owners", 3)
    meter.advance(1)
    meter.begin("nothing to do", 0)
    assert told == [
        ("census", 4, 10),
        ("census", 4, 10),
        ("census", 10, 10),
        ("owners", 0, 3),
        ("owners", 1, 3),
        ("nothing to do", 0, 1),
    ]


def test_a_meter_that_nobody_reads_measures_all_the_same() -> None:
    Meter().advance(1)
    Meter(tell_nobody, "census", 1).advance(1)


def test_work_ends_once_it_is_unwanted_and_is_told_no_more() -> None:
    told: list[tuple[str, int, int]] = []
    answers = iter([False, False, True])
    progress = unless(lambda: next(answers), lambda *step: told.append(step))
    meter = Meter(progress, "census", 3)
    meter.advance(1)
    meter.advance(1)
    with pytest.raises(Cancelled):
        meter.advance(1)
    assert told == [("census", 1, 3), ("census", 2, 3)]


def test_what_the_told_one_raises_comes_out() -> None:
    def fail(_stage: str, _done: int, _total: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Meter(unless(lambda: False, fail), "census", 1).advance(1)
