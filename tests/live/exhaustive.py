"""All interleavings of a check with each thing that a program does to an image, and with any two.

`tests.live.exploration` goes through them; here is what is written, and what must not be said.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from planner.check.check import check_image
from planner.check.confirm import OF_REFCOUNTS, without_refcounts
from planner.check.live import check_live
from planner.check.report import Report
from planner.findings.kinds import FindingKind
from planner.source import Bytes
from tests.live.exploration import Ending, Exploration, Remembered, Run
from tests.live.interleave import KINDS, Kind, build, damaged, judge
from tests.live.model import Program
from tests.live.timeline import Timeline, at_random, everywhere, total

USED, USED_DAMAGED = 2, 3
"""Clusters in use of each part of an image; of one that is damaged some more, that it can be."""

EVERYWHERE = 8
"""So many words are written one by one; of more, each write is cut into `PARTS`, anywhere."""

PARTS = 3

WINDOW, STEP = 4, 2
"""While a check goes on, a program gets so far, in words or such parts, and then stands still; the
next window begins so far behind the one before."""

SETTLES = (0.0, 0.0, 0.02)
"""Seconds that a check may take, of which a look takes `LOOK_SECONDS`; then it ends when it can."""


# ---- what a program does -------------------------------------------------------------------------

Does = Callable[[Program], object]


@dataclass(frozen=True, slots=True)
class Operation:
    """What a program *does*; and what it has done ``before``, which all is written by then.

    ``snapshots``: whether it counts every cluster once more, or once less.
    """

    does: Does
    before: Does = lambda program: None
    snapshots: bool = False


def _write(guest: int, table: int = 0) -> Does:
    return lambda program: program.write(table * program.geometry.l2_entries + guest)


def _fill(program: Program) -> None:
    """All but the last refcounts of the block are in use."""
    if program.geometry.refblock_entries <= 256:
        first, end = program.geometry.l2_entries, program.geometry.refblock_entries
        for guest in range(first, first + end):
            if max(at for at, count in program.counts.items() if count) >= end - 2:
                return
            program.write(guest)


def _grow(program: Program) -> None:
    program.grow(program.geometry.l2_entries)


def _grow_and_write(program: Program) -> None:
    first = program.size // program.cluster
    _grow(program)
    program.write(first)


OPERATIONS = {
    "write": Operation(_write(8), _write(0)),
    "write what a snapshot has": Operation(_write(0)),
    "write what was discarded": Operation(_write(0), lambda program: program.discard(0)),
    "write to a new table": Operation(_write(0, table=1)),
    "write to a new refcount block": Operation(_write(8), _fill),
    "discard": Operation(lambda program: program.discard(0), _write(0)),
    "discard what a snapshot has": Operation(lambda program: program.discard(1)),
    "write zeros": Operation(lambda program: program.write_zeros(0), _write(0)),
    "take a snapshot": Operation(Program.snapshot, snapshots=True),
    "delete a snapshot": Operation(Program.delete_snapshot, Program.snapshot, snapshots=True),
    "grow": Operation(_grow),
    "shrink": Operation(
        lambda program: program.shrink(program.geometry.l2_entries), _grow_and_write
    ),
    "add a bitmap": Operation(Program.add_bitmap),
    "remove a bitmap": Operation(Program.remove_bitmap, Program.add_bitmap),
    "move the refcount table": Operation(Program.move_reftable),
}


@dataclass(frozen=True, slots=True)
class Script:
    """What a program does to an image of a kind while it is checked; *seed*: for all else.

    ``settle``: seconds that the check may take. ``is_damaged``: before, in a quiet part.
    """

    kind: Kind
    names: tuple[str, ...]
    seed: int
    settle: float = 0.0
    is_damaged: bool = False


@dataclass(frozen=True, slots=True)
class Played:
    """What came of a script: the file at all times, and how it was damaged before."""

    timeline: Timeline
    damage: str | None


def play(script: Script) -> Played | None:
    """Have a program do all of it, nobody looking; None where that writes nothing."""
    rng = random.Random(str(script))
    operations = [OPERATIONS[name] for name in script.names]
    image = build(script.kind, USED_DAMAGED if script.is_damaged else USED)
    damage = damaged(image, rng) if script.is_damaged else None
    limit, lazy = rng.choice((1, 8)), script.kind.lazy
    program = Program(bytes(image.data), rng, limit=limit, lazy=lazy, data=b"\0")
    for operation in operations:
        operation.before(program)
    program.flush()
    program.run_to_end()
    before = bytes(program.file)
    for operation in operations:
        operation.does(program)
        rng.choice((program.flush, program.evict, lambda: None))()
    program.close()
    timeline = Timeline.of(before, program.pending, everywhere)
    if len(timeline) > EVERYWHERE:
        timeline = Timeline.of(before, program.pending, at_random(rng, PARTS))
    return Played(timeline, damage) if len(timeline) else None


def scripts(seed: int) -> Iterator[Script]:
    """Each operation on each kind of image, in any order; then any two, on any kind."""
    rng = random.Random(f"scripts {seed}")
    kinds = list(dict.fromkeys(KINDS))
    singles = [(kind, (name,)) for kind in kinds for name in OPERATIONS]
    pairs = [(rng.choice(kinds), two) for two in itertools.product(OPERATIONS, repeat=2)]
    rng.shuffle(singles)
    rng.shuffle(pairs)
    for kind, names in singles + pairs:
        is_quiet = not kind.lazy and not any(OPERATIONS[it].snapshots for it in names)
        yield Script(kind, names, seed, rng.choice(SETTLES), is_quiet and rng.random() < 0.3)


# ---- what a check must not say -------------------------------------------------------------------


def healthy_findings(script: Script) -> set[FindingKind]:
    """What there is between two writes of a program that does this to a healthy image."""
    allowed = {FindingKind.LEAK, FindingKind.LEAK_PAST_END, FindingKind.DIRTY_BIT}
    if any(OPERATIONS[name].snapshots for name in script.names):
        allowed |= {FindingKind.L1_COPIED, FindingKind.L2_COPIED}
    if "shrink" in script.names:
        allowed |= {FindingKind.PAST_END}
    return allowed | set(OF_REFCOUNTS if script.kind.lazy else ())


@dataclass(frozen=True, slots=True)
class Explored:
    """What came of all interleavings of a script.

    ``runs``: how often the check was run, from its beginning to its next look or its end;
    ``checks``: of how many different readings an image was checked for that. ``interleavings``: how
    many that stands for. ``wrong``: what a check must not have said.
    """

    script: Script
    words: int = 0
    windows: int = 0
    runs: int = 0
    checks: int = 0
    interleavings: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    wrong: tuple[str, ...] = ()


def explore(script: Script) -> Explored:
    """Check an image while a program does all that, in every way that there is."""
    played = play(script)
    if played is None or (script.is_damaged and played.damage is None):
        return Explored(script)
    remembered, wrong = Remembered(), set[str]()
    verdicts: Counter[str] = Counter()
    windows = runs = interleavings = 0

    def check(run: Run) -> Report:
        return check_live(run.look, run.clock(), remembered, remembered, settle=script.settle)

    for timeline in played.timeline.windows(WINDOW, STEP):
        windows += 1
        exploration, moments = Exploration(timeline, check), Moments(timeline)
        for ending in exploration.endings():
            interleavings += total(ending.ways)
            verdicts[ending.told.verdict] += 1
            has_time = script.settle > 0
            fault = judge(ending.told, played.damage, has_time=has_time) or moments.fault(ending)
            wrong |= {f"window {windows}: {fault}"} if fault else set()
        runs += exploration.runs
    return Explored(
        script,
        words=len(played.timeline),
        windows=windows,
        runs=runs,
        checks=remembered.runs,
        interleavings=interleavings,
        verdicts=verdicts,
        wrong=tuple(sorted(wrong)),
    )


class Moments:
    """What a check of the file says of it at each position, nobody writing."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._said: list[tuple[str, int]] = []

    def fault(self, ending: Ending[Report]) -> str:
        """Where it names a verdict as of a moment, and it was so at none until its end."""
        report = ending.told
        if report.verdict not in ("clean", "leaks", "dirty"):
            return ""
        last = next(at for at, here in enumerate(ending.ways) if any(here))
        while len(self._said) <= last:
            self._said.append(_said(check_image(Bytes(self._timeline.file(len(self._said))))))
        if _said(report) in self._said[: last + 1]:
            return ""
        return f"{_said(report)}, which was so at no moment: {self._said[: last + 1]}"


def _said(report: Report) -> tuple[str, int]:
    """Of lazy refcounts nothing is said while a program writes."""
    if report.layout is not None and report.layout.header.dirty:
        report = without_refcounts(report)
    return report.verdict, report.counters.leaks
