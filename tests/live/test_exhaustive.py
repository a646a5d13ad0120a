"""All interleavings are gone through, and counted; and none of them misleads a check."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from planner.check.check import check_image
from planner.check.report import Report
from planner.source import Bytes, read_bytes
from tests.live.exhaustive import (
    OPERATIONS,
    WINDOW,
    Script,
    explore,
    healthy_findings,
    play,
)
from tests.live.exploration import Exploration, Run
from tests.live.interleave import KINDS, Kind
from tests.live.model import WORD, Step, Truncate, Write
from tests.live.timeline import Timeline, everywhere, total

BEFORE = bytes(2 * WORD)
A, B = b"aaaaaaaa", b"bbbbbbbb"
WRITES: tuple[Step, ...] = (Write(0, A), Write(WORD, B), Write(0, B), Write(2 * WORD, A))


ORDERS = ((0, 1), (1, 0), (0, 1))

NARROW = Kind(refcount_order=6)
"""Of which a block has few refcounts, so that it is soon full."""


def all_seen(run: Run) -> tuple[object, ...]:
    """The size and both words at every look, backwards the second time."""
    seen: list[object] = []
    for number in range(3):
        source = run.look()
        seen += [source.size, *(read_bytes(source, WORD * at, WORD) for at in ORDERS[number])]
    return tuple(seen)


def last_seen(run: Run) -> tuple[object, ...]:
    """The same, but that it forgets what it saw before."""
    for number in range(3):
        source = run.look()
        seen = [source.size, *(read_bytes(source, WORD * at, WORD) for at in ORDERS[number])]
        if number < 2:
            del source, seen
    return tuple(seen)


def by_hand() -> Counter[tuple[object, ...]]:
    """What `all_seen` sees, where each write is a word: at all ascending positions."""
    timeline = Timeline.of(BEFORE, WRITES, everywhere)
    files = [timeline.file(position) for position in range(len(timeline) + 1)]
    seen: Counter[tuple[object, ...]] = Counter()
    for positions in itertools.combinations_with_replacement(range(len(files)), 9):
        what = iter(files[at] for at in positions)
        told: list[object] = []
        for order in ORDERS:
            told.append(len(next(what)))
            told += [next(what)[WORD * at : WORD * at + WORD] for at in order]
        seen[tuple(told)] += 1
    return seen


def explored(exploration: Exploration[tuple[object, ...]]) -> Counter[tuple[object, ...]]:
    found: Counter[tuple[object, ...]] = Counter()
    for ending in exploration.endings():
        found[ending.told] += total(ending.ways)
    return found


def test_every_interleaving_is_counted_once() -> None:
    timeline = Timeline.of(BEFORE, WRITES, everywhere)
    every = by_hand()
    assert every.total() == 715
    assert explored(Exploration(timeline, all_seen)) == every


def test_what_a_check_has_forgotten_is_not_run_again() -> None:
    timeline = Timeline.of(BEFORE, WRITES, everywhere)
    forgetful, other = Exploration(timeline, last_seen), Exploration(timeline, all_seen)
    every: Counter[tuple[object, ...]] = Counter()
    for seen, number in by_hand().items():
        every[seen[-3:]] += number
    assert explored(forgetful) == every
    explored(other)
    assert forgetful.states < other.states


def test_a_write_that_has_begun_ends() -> None:
    """It is seen torn at two looks running, and at no more."""
    timeline = Timeline.of(BEFORE, [Write(0, A + B)], everywhere)
    torn = A, bytes(WORD)
    looks = [
        [tuple(seen[at + 1 : at + 3])[:: -1 if at == 3 else 1] == torn for at in (0, 3, 6)]
        for seen in explored(Exploration(timeline, all_seen))
    ]
    assert [True, True, False] in looks
    assert [True, True, True] not in looks


def test_a_file_is_at_each_position_what_was_written_until_then() -> None:
    steps: list[Step] = [Write(4, b"x" * 12), Write(28, b"y" * 8), Truncate(12)]
    timeline = Timeline.of(BEFORE, steps, everywhere)
    begun = bytes(4) + b"x" * 12
    grown = begun + bytes(12)
    assert [timeline.file(at) for at in range(len(timeline) + 1)] == [
        BEFORE,
        bytes(4) + b"x" * 4 + bytes(8),
        begun,
        grown + b"y" * 4,
        grown + b"y" * 8,
        begun[:12],
    ]
    assert timeline.ends == [0, 2, 2, 4, 4, 5]


# ---- what a program does -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Kind(), KINDS[-1], NARROW, Kind(lazy=True)])
def test_every_operation_leaves_a_healthy_image_healthy(kind: Kind) -> None:
    """At every moment between two of its writes."""
    for name in OPERATIONS:
        script = Script(kind, (name,), 1)
        played = play(script)
        if played is None:
            continue
        for position, end in enumerate(played.timeline.ends):
            if position == end:
                found = check_image(Bytes(played.timeline.file(position))).counts()
                assert found.keys() <= healthy_findings(script), (name, position)


def test_every_operation_is_done() -> None:
    done = {
        name
        for name in OPERATIONS
        for kind in (Kind(), NARROW)
        if play(Script(kind, (name,), 1)) is not None
    }
    assert done == set(OPERATIONS)


# ---- what a check says ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script",
    [
        Script(Kind(), ("write",), 1),
        Script(Kind(), ("discard",), 1, settle=0.03),
        Script(NARROW, ("write zeros", "write"), 1),
        Script(Kind(), ("discard",), 1, is_damaged=True),
    ],
)
def test_no_interleaving_misleads_a_check(script: Script) -> None:
    done = explore(script)
    assert done.interleavings > 50
    assert not done.wrong


def test_a_check_that_looks_once_is_misled() -> None:
    """So that what `test_no_interleaving_misleads_a_check` says is not said of any check."""

    def look_once(run: Run) -> Report:
        return check_image(run.look())

    played = play(Script(Kind(), ("write what a snapshot has",), 1))
    assert played is not None
    (timeline, *_) = played.timeline.windows(2 * WINDOW, WINDOW)
    verdicts = {ending.told.verdict for ending in Exploration(timeline, look_once).endings()}
    assert "corrupt" in verdicts
