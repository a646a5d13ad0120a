"""A volume's bytes: which pieces of the disk they are, in order or dealt out in stripes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from planner.arrays import I64, expand_ranges
from planner.source import Source, join_extents

MAX_PIECES = 1 << 21
"""Pieces into which ranges are cut by stripes; beyond, whole rows of stripes are taken for one."""


@dataclass(frozen=True, slots=True)
class Segment:
    """``length`` bytes of a volume from ``start`` on, on ``legs``: where on the disk each begins.

    Of more than one leg each has ``stripe`` bytes in turn. A leg below 0 is on another disk.
    """

    start: int
    length: int
    legs: tuple[int, ...]
    stripe: int

    @property
    def on_each(self) -> int:
        """Bytes on one leg."""
        return self.length // len(self.legs)


def linear(length: int, offset: int) -> tuple[Segment, ...]:
    """*length* bytes that lie together at *offset*."""
    return (Segment(0, length, (offset,), length),)


@dataclass(frozen=True, slots=True)
class Pieces:
    """Ranges of the disk as what they are of a volume: int64, ascending by ``start``.

    ``row``: of which of the ranges that were asked about; ``disk``: where it is on the disk.
    """

    start: I64
    length: I64
    disk: I64
    row: I64


class Space:
    """The source that a volume is: *segments*, ascending, of what *disk* holds.

    What is on another disk, or between segments, is zeros.
    """

    def __init__(self, disk: Source, segments: Sequence[Segment]) -> None:
        self._disk, self.segments = disk, tuple(segments)

    @property
    def size(self) -> int:
        return max((each.start + each.length for each in self.segments), default=0)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        position, stop = offset, offset + len(buffer)
        for start, length, disk in self._runs(offset, stop):
            buffer[position - offset : start - offset] = bytes(start - position)
            part = buffer[start - offset : start + length - offset]
            if disk < 0:
                part[:] = bytes(length)
            else:
                self._disk.read_into(disk, part)
            position = start + length
        buffer[position - offset :] = bytes(stop - position)

    def _runs(self, low: int, high: int) -> Iterator[tuple[int, int, int]]:
        """(start, length, on the disk) of what lies there, ascending."""
        for each in self.segments:
            position, end = max(low, each.start), min(high, each.start + each.length)
            while position < end:
                number, inside = divmod(position - each.start, each.stripe)
                row, leg = divmod(number, len(each.legs))
                length = min(each.stripe - inside, end - position)
                at = each.legs[leg]
                yield position, length, at + row * each.stripe + inside if at >= 0 else -1
                position += length

    def data_extents(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        if len(self.segments) == 1 and self.segments[0] == Segment(0, self.size, (0,), self.size):
            inside = max(0, min(length, self.size - offset))
            return self._disk.data_extents(offset, inside)  # the whole disk, as it is
        return join_extents(self._extents(offset, offset + length))

    def _extents(self, low: int, high: int) -> Iterator[tuple[int, int]]:
        for each in self.segments:
            start, end = max(low, each.start), min(high, each.start + each.length)
            if start >= end:
                continue
            if len(each.legs) > 1:
                yield start, end
            elif each.legs[0] >= 0:
                shift = each.legs[0] - each.start
                for first, last in self._disk.data_extents(start + shift, end - start):
                    yield first - shift, last - shift

    def pieces(self, start: I64, end: I64) -> Pieces:
        """What the disk's ranges (ascending, disjoint) are of the volume; those that are none are
        left out, one that is in several places is each of them.
        """
        found = [
            _of_leg(segment, leg, start, end)
            for segment in self.segments
            for leg in range(len(segment.legs))
            if segment.legs[leg] >= 0
        ]
        columns = [np.concatenate(column) for column in zip(*found, strict=True)] if found else [
            np.zeros(0, dtype=np.int64)
        ] * 4  # fmt: skip
        order = np.argsort(columns[0], kind="stable")
        return Pieces(*(column[order] for column in columns))


def _of_leg(segment: Segment, leg: int, start: I64, end: I64) -> tuple[I64, I64, I64, I64]:
    """(start, length, disk, row) of the ranges that lie on one leg."""
    base, count, stripe = segment.legs[leg], len(segment.legs), segment.stripe
    size = segment.on_each
    first = int(np.searchsorted(end, base, side="right"))
    last = int(np.searchsorted(start, base + size, side="left"))
    row = np.arange(first, max(first, last))
    low = np.maximum(start[row], base) - base
    high = np.minimum(end[row], base + size) - base
    if count == 1:
        return segment.start + low, high - low, base + low, row
    first_stripe, last_stripe = low // stripe, (high - 1) // stripe
    cut = int((last_stripe - first_stripe + 1).sum())
    if cut > MAX_PIECES:
        # All legs of these rows, rather than millions of pieces.
        whole = first_stripe * stripe
        length = (last_stripe + 1) * stripe - whole
        return segment.start + whole * count, length * count, base + whole, row
    number = expand_ranges(first_stripe, last_stripe)
    of = np.repeat(np.arange(len(row)), last_stripe - first_stripe + 1)
    low, high = np.maximum(low[of], number * stripe), np.minimum(high[of], (number + 1) * stripe)
    at = segment.start + (number * count + leg) * stripe + low - number * stripe
    return at, high - low, base + low, row[of]
