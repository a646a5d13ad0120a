"""A row of the table: the medians, and how far the turns lie apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.bench import race
from tests.bench.samples import Samples


class Clock:
    """Time passes as the sides say."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def side(self, seconds: Sequence[float], turns: int | None = None) -> race.Side:
        left = iter(seconds)

        def run() -> None:
            self.now += next(left)

        return race.Side(run, turns=turns)


def measured(sides: Mapping[str, race.Side], monkeypatch: pytest.MonkeyPatch, clock: Clock) -> str:
    """The line of one row of three turns."""
    monkeypatch.setattr("tests.bench.race.time.perf_counter", clock)
    row = race.Row("work", "ours", "peer", 1)
    held = race.Race("name", lambda _samples: nullcontext(sides), (row,), warm=False)
    (result,) = race.run_race(held, Samples(Path()), 3)
    return race.table_line(result)


def test_spread_is_of_turns_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    sides = {"ours": clock.side([1, 2, 9]), "peer": clock.side([2, 2, 3])}
    assert measured(sides, monkeypatch, clock).split()[4:7] == ["s", "1", "0.5-3"]


def test_spread_of_a_peer_that_took_one_turn_is_of_that(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    sides = {"ours": clock.side([1, 2, 9]), "peer": clock.side([4], turns=1)}
    assert measured(sides, monkeypatch, clock).split()[4:7] == ["s", "0.5", "0.25-2.25"]
