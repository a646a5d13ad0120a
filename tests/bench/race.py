"""Contestants that take turns, and the rows of the table: one of them beside another.

On a shared machine an absolute time says little; a ratio of two things that took turns does. Both
wall time and processor time are taken: the first is what a user waits, the second is what it cost,
and it is quieter. Everything about measuring lives here; what is measured does not.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from tests.bench.samples import Samples

WALL, CPU = 0, 1


class Unavailable(Exception):
    """A race cannot be held on this machine; the message says what is missing."""


def nothing() -> None:
    """No preparation."""


def no_daemon() -> float:
    """Nobody but this process and its children works for this side."""
    return 0.0


@dataclass(frozen=True, slots=True)
class Side:
    """One contestant.

    ``run`` is timed; ``prepare`` comes before each turn and is not. ``daemon_cpu``: seconds that a
    process has used which works for it and is no finished child of ours; see `process_cpu`.
    ``turns``: so many at most, for a peer that takes minutes.
    """

    run: Callable[[], object]
    prepare: Callable[[], object] = nothing
    daemon_cpu: Callable[[], float] = no_daemon
    turns: int | None = None


Enter = Callable[[Samples], AbstractContextManager[Mapping[str, Side]]]
"""Gives the sides of a race by name, for as long as its context lasts; raises `Unavailable`."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: the side *ours* beside the side *peer*.

    The target is ``at_most``: our share of the peer's wall time; or ``more``: seconds above it.
    """

    work: str
    ours: str
    peer: str
    at_most: float | None = None
    more: float | None = None


@dataclass(frozen=True, slots=True)
class Race:
    """Sides that take turns on the same samples, and what to compare of them.

    ``warm``: an untimed turn of each comes first.
    """

    name: str
    enter: Enter
    rows: tuple[Row, ...]
    warm: bool = True


@dataclass(frozen=True, slots=True)
class Result:
    """One row, measured: medians in seconds. ``ratio``: ours by the peer's, wall time.

    ``least_ratio``, ``most_ratio``: of one turn, our time in it by the peer's in the same turn, or
    by its median where it took fewer.
    """

    race: str
    work: str
    ours: str
    peer: str
    ours_wall: float
    peer_wall: float
    ours_cpu: float
    peer_cpu: float
    ratio: float
    least_ratio: float
    most_ratio: float
    cpu_ratio: float
    target: str
    met: bool | None
    ours_turns: tuple[tuple[float, float], ...] = field(repr=False)
    peer_turns: tuple[tuple[float, float], ...] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """All of it; each turn is [wall, processor] seconds."""
        return {name: getattr(self, name) for name in self.__slots__}


def process_cpu(pid: int) -> float:
    """Processor seconds that a running process has used so far, all its threads together."""
    return time.clock_gettime(~pid << 3 | 2)  # clock_getcpuclockid(3), as the kernel encodes it


def run_race(race: Race, samples: Samples, turns: int) -> Iterator[Result]:
    """Let the sides take turns, then give one result a row."""
    with race.enter(samples) as sides:
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for turn in range(turns + race.warm):
            for name, side in sides.items():
                limit = turns if side.turns is None else min(turns, side.turns)
                is_warm_up = race.warm and turn == 0 and side.turns is None
                if is_warm_up or len(taken[name]) < limit:
                    times = _take_turn(side)
                    if not is_warm_up:
                        taken[name].append(times)
        for row in race.rows:
            yield _compare(race, row, taken[row.ours], taken[row.peer])


def _take_turn(side: Side) -> tuple[float, float]:
    """Wall and processor seconds."""
    side.prepare()
    cpu, wall = _cpu() + side.daemon_cpu(), time.perf_counter()
    side.run()
    return time.perf_counter() - wall, _cpu() + side.daemon_cpu() - cpu


def _cpu() -> float:
    """Processor seconds of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _compare(
    race: Race, row: Row, ours: list[tuple[float, float]], peer: list[tuple[float, float]]
) -> Result:
    our, its = (
        [statistics.median(turn[i] for turn in side) for i in (WALL, CPU)] for side in (ours, peer)
    )
    target, met = "", None
    if row.at_most is not None:
        target, met = f"{row.at_most:.3g}", our[WALL] <= row.at_most * its[WALL]
    elif row.more is not None:
        target, met = f"+{row.more * 1000:g} ms", our[WALL] <= its[WALL] + row.more
    beside = [turn[WALL] for turn in peer] if len(peer) == len(ours) else [its[WALL]] * len(ours)
    ratios = [turn[WALL] / other for turn, other in zip(ours, beside, strict=True)]
    return Result(
        race=race.name,
        work=row.work,
        ours=row.ours,
        peer=row.peer,
        ours_wall=our[WALL],
        peer_wall=its[WALL],
        ours_cpu=our[CPU],
        peer_cpu=its[CPU],
        ratio=our[WALL] / its[WALL],
        least_ratio=min(ratios),
        most_ratio=max(ratios),
        cpu_ratio=our[CPU] / its[CPU] if its[CPU] else 0.0,
        target=target,
        met=met,
        ours_turns=tuple(ours),
        peer_turns=tuple(peer),
    )


HEADLINE = (
    f"{'work':<58}{'ours':>10}{'peer':>10}{'ratio':>9}{'its turns':>16}{'target':>9}"
    f"{'':>5}{'cpu':>8}  peer is"
)


def table_line(result: Result) -> str:
    """One row of the table. ``cpu`` is the ratio of the processor times."""
    spread = f"{result.least_ratio:.3g}-{result.most_ratio:.3g}"
    mark = {True: "ok", False: "MISS", None: ""}[result.met]
    return (
        f"{result.work:<58}{_seconds(result.ours_wall):>10}{_seconds(result.peer_wall):>10}"
        f"{result.ratio:>9.4g}{spread:>16}{result.target:>9}{mark:>5}{result.cpu_ratio:>8.3g}"
        f"  {result.peer}"
    )


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if value >= 0.1 else f"{value * 1000:.2f} ms"
