"""Every interleaving of a check with a program that writes, all that look the same to it at once.

What a check says depends on nothing but what its reads saw. So it is run again and again, and each
word that it reads is given each value in turn that the word may have by then (`Timeline`); words
that never change, and moments between which a word does not, make no difference. Each time that it
looks at the image anew its state is taken, all local variables of its functions and how far they
are: where two runs have come to the same state, they go on as one. How many interleavings that are
is counted on the way, so that in the end they are counted to the last. An interleaving: at which
position the program is when each of those words is read that change at all.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Generic, TypeVar

from planner.arrays import I64
from planner.check.check import check_image
from planner.check.live import Clock
from planner.check.report import Report
from planner.source import Source, read_bytes
from tests.live.model import WORD
from tests.live.timeline import Timeline, Ways, joined, split

T = TypeVar("T")
Value = TypeVar("Value", bytes, int)

LOOK_SECONDS = 0.01
"""So long takes a look, by the clock of a check."""

Told = Callable[["Run"], T]
"""A check: it has a `Run`'s `look`, and its `clock`."""


@dataclass(frozen=True, slots=True)
class Ending(Generic[T]):
    """What a check says, ``told``, of so many interleavings, by where the program is at its end."""

    told: T
    ways: Ways


@dataclass(frozen=True, slots=True)
class _Path:
    """What was read, value by value, and in how many ways one has come so far."""

    values: tuple[Any, ...]
    ways: Ways


class _CameThisFarError(Exception):
    """A check is about to look once more. Nothing in it catches that."""


class Exploration(Generic[T]):
    """All that a *check* may say while a program writes as *timeline* says.

    ``runs``: how often it was run, to the next look or to its end; ``states``: how many states it
    was in when it looked.
    """

    def __init__(self, timeline: Timeline, check: Told[T]) -> None:
        self.timeline, self._check = timeline, check
        self.runs = self.states = 0

    def endings(self) -> Iterator[Ending[T]]:
        """Look by look, so that all that has led to a state is known when it is gone on from."""
        here = [_Path((), self.timeline.beginning())]
        looks = 0
        while here:
            looks += 1
            further: dict[bytes, _Path] = {}
            for state in here:
                self.states += 1
                yield from self._from(state, looks, further)
            here = list(further.values())

    def _from(self, state: _Path, looks: int, further: dict[bytes, _Path]) -> Iterator[Ending[T]]:
        """All runs that go on from *state*, at the look of that number."""
        left = [state]
        while left:
            run = Run(self.timeline, left.pop(), looks)
            self.runs += 1
            try:
                told = self._check(run)
            except _CameThisFarError:
                there = run.path()
                known = further.get(run.state)
                ways = there.ways if known is None else joined(known.ways, there.ways)
                further[run.state] = _Path((known or there).values, ways)
            else:
                yield Ending(told, run.path().ways)
            left += run.others


class Run:
    """One run of a check: as it was so far on *path*, then with the first value that there can be.

    ``others``: the paths that lead elsewhere. ``state``: in which it was when it looked again,
    behind look number *looks*.
    """

    def __init__(self, timeline: Timeline, path: _Path, looks: int) -> None:
        self.timeline, self.others, self.state = timeline, list[_Path](), b""
        self._known, self._looks = path.values, looks
        self._read = list(path.values)
        self._ways = path.ways
        self._at = self._looked = 0
        self._seconds = 0.0

    def path(self) -> _Path:
        return _Path(tuple(self._read), self._ways)

    def look(self) -> Source:
        """The file, as long as it is now."""
        if self._looked == self._looks:
            self.state = _state(sys._getframe(1), self._seconds)
            raise _CameThisFarError
        self._looked += 1
        self._seconds += LOOK_SECONDS
        if self._at == len(self._known):
            self._ways = self.timeline.look(self._ways)
        return Seen(self, self.observe(self.timeline.sizes))

    def clock(self) -> Clock:
        """It goes on with looks and pauses, not with what is read."""
        return Clock(self._now, self._pause)

    def _now(self) -> float:
        return self._seconds

    def _pause(self, seconds: float) -> None:
        self._seconds += seconds

    def observe(self, values: list[Value]) -> Value:
        """What is read of something that has these *values*, by position."""
        if self._at == len(self._read):
            choices = split(self.timeline.go_on(self._ways), values)
            (first, self._ways), *others = choices.items()
            self.others += [_Path((*self._read, other), ways) for other, ways in others]
            self._read.append(first)
        self._at += 1
        value: Value = self._read[self._at - 1]
        return value


@dataclass(frozen=True, slots=True)
class Seen:
    """The file as it is while *run* reads it."""

    run: Run
    size: int

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Each word that changes is an observation of its own."""
        timeline, view = self.run.timeline, buffer.cast("B")
        end = offset + len(view)
        part = timeline.start[offset:end]
        view[: len(part)] = part
        view[len(part) :] = bytes(len(view) - len(part))
        for at in timeline.changing(offset, end):
            word = self.run.observe(timeline.words[at])
            low, high = max(offset, at), min(end, at + WORD)
            view[low - offset : high - offset] = word[low - at : high - at]

    def data_extents(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        end = min(offset + length, self.size)
        return [(offset, end)] if offset < end else []


# ---- the state of a check ------------------------------------------------------------------------


def _state(frame: FrameType | None, seconds: float) -> bytes:
    """All on which it depends what the functions from *frame* up to `Exploration` do next.

    That is how far each is, its local variables, and the clock. What it is in the middle of
    evaluating must follow from those: a loop over numbers does, whose last one is a variable.
    """
    frames: list[Any] = []
    while frame is not None and frame.f_code is not Exploration._from.__code__:
        frames.append((frame.f_code.co_qualname, frame.f_lasti, frame.f_locals))
        frame = frame.f_back
    memory = io.BytesIO()
    _Pickler(memory, protocol=pickle.HIGHEST_PROTOCOL).dump((frames, seconds))
    return hashlib.blake2b(memory.getbuffer(), digest_size=16).digest()


class _Pickler(pickle.Pickler):
    """Of what this module gives a check nothing counts but what it does."""

    def persistent_id(self, obj: object) -> object:
        """By it such an object is known; None for all others."""
        if isinstance(obj, Seen):
            return "seen", obj.size
        if isinstance(obj, Run | Remembered):
            return type(obj).__name__
        return None


# ---- checks that are not run twice ---------------------------------------------------------------


@dataclass(slots=True)
class _Known:
    """What a check does next that has read so much: ``asked``, offset and length; or its end."""

    asked: tuple[int, int] | None = None
    answers: dict[bytes, _Known] = field(default_factory=dict)
    report: Report | None = None


class Remembered:
    """`check_image`, which is not run again where all that it reads is as it was another time.

    ``runs``: how often it was.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, bytes | None], _Known] = {}
        self.runs = 0

    def __call__(self, source: Source, *, only: I64 | None = None) -> Report:
        """As `check_image`."""
        key = source.size, None if only is None else only.tobytes()
        known = beginning = self._known.setdefault(key, _Known())
        read: list[bytes] = []
        while known.report is None:
            if known.asked is None:
                self.runs += 1
                return _Recorded(source, beginning, read).check(only)
            read.append(read_bytes(source, *known.asked))
            known = known.answers.setdefault(read[-1], _Known())
        return known.report


class _Recorded:
    """A source of which *read* was read already. What else is read is kept in *known*."""

    def __init__(self, source: Source, known: _Known, read: list[bytes]) -> None:
        self._source, self._known, self._read = source, known, iter(read)

    @property
    def size(self) -> int:
        return self._source.size

    def check(self, only: I64 | None) -> Report:
        self._known.report = report = check_image(self, only=only)
        return report

    def read_into(self, offset: int, buffer: memoryview) -> None:
        view = buffer.cast("B")
        data = next(self._read, None)
        if data is None:
            self._source.read_into(offset, view)
            data = bytes(view)
        view[:] = data
        self._known.asked = offset, len(view)
        self._known = self._known.answers.setdefault(data, _Known())

    def data_extents(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        return self._source.data_extents(offset, length)
