"""Ranges laid over ranges, by the hundred thousand: which touch, and what is left over."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.arrays import I64, join_ranges


@dataclass(frozen=True, slots=True)
class Overlaps:
    """What is in a range of one column and one of the other: rows of both, and from where to where.

    ``row``, ``of``: which of the ranges that were asked about, and which of those that are known.
    """

    row: I64
    of: I64
    start: I64
    end: I64

    def __len__(self) -> int:
        return len(self.row)


def overlaps(start: I64, end: I64, known_start: I64, known_end: I64) -> Overlaps:
    """Of ranges in any order with the known ones, which ascend and are disjoint."""
    first = np.searchsorted(known_end, start, side="right")
    count = np.maximum(np.searchsorted(known_start, end, side="left") - first, 0)
    row = np.repeat(np.arange(len(start)), count)
    before = np.repeat(np.cumsum(count) - count, count)
    of = np.arange(len(row)) - before + first[row]
    low = np.maximum(start[row], known_start[of])
    high = np.minimum(end[row], known_end[of])
    inside = low < high
    return Overlaps(row[inside], of[inside], low[inside], high[inside])


class Rest:
    """What is left of ascending, disjoint ranges once others are taken away, some at a time."""

    COLLECTED = 1 << 18

    def __init__(self, start: I64, end: I64) -> None:
        self._start, self._end = start, end
        self._taken: list[tuple[I64, I64]] = []
        self._count = 0

    def take(self, start: I64, end: I64) -> None:
        """Take ranges away that lie within them, in any order."""
        self._taken.append((start, end))
        self._count += len(start)
        if self._count > self.COLLECTED:
            self._join()

    def _join(self) -> None:
        nothing = np.zeros(0, dtype=np.int64)
        start = np.concatenate([nothing, *(each[0] for each in self._taken)])
        end = np.concatenate([nothing, *(each[1] for each in self._taken)])
        self._taken = [join_ranges(start, end)]
        self._count = 0

    def left(self) -> tuple[I64, I64]:
        """Ascending and disjoint; a range that was cut is several."""
        self._join()
        taken_start, taken_end = self._taken[0]
        # What lies between what was taken, over all of the ranges.
        low = np.concatenate((np.array([np.iinfo(np.int64).min]), taken_end))
        high = np.concatenate((taken_start, np.array([np.iinfo(np.int64).max])))
        gaps = overlaps(self._start, self._end, low, high)
        return gaps.start, gaps.end
