"""What a file system is read from: a part of the guest's disk, with holes where it is damaged.

Readers see zeros in a hole, and can ask which of their pieces are holes. All offsets are bytes
relative to the source's first.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from planner.arrays import I64, U8, Mask, join_ranges
from planner.guestfs.work import Work
from planner.source import Source, read_around, read_tables

NO_RANGES = np.zeros(0, dtype=np.int64)


class Holes:
    """A source that never fails: what is known to be damaged, or cannot be read, is zeros.

    ``start``, ``end``: the ranges that are known (int64, in any order, may overlap). Grows by the
    ranges whose reads failed; for several threads. ``work``: what reading holes is taken from.
    """

    def __init__(
        self,
        source: Source,
        start: I64 = NO_RANGES,
        end: I64 = NO_RANGES,
        work: Work | None = None,
    ) -> None:
        self._source, self._work = source, work or Work()
        self._known = join_ranges(start, end)
        self._failed: dict[tuple[int, int], None] = {}

    @property
    def size(self) -> int:
        return self._source.size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """As of any source, but that it does not fail."""
        start, end = self._known
        stop, position = offset + len(buffer), offset
        at = int(np.searchsorted(end, offset, side="right"))
        while position < stop:
            # Up to the next hole, which is not read: that it fails is known.
            low, high = (int(start[at]), int(end[at])) if at < len(start) else (stop, stop)
            if position < low:
                self._fill(position, buffer[position - offset : min(low, stop) - offset])
            if low < stop:
                hole = buffer[max(low, position) - offset : min(high, stop) - offset]
                self._work.read(len(hole))
                hole[:] = bytes(len(hole))
            position, at = high, at + 1

    def _fill(self, offset: int, buffer: memoryview) -> None:
        self._failed.update(dict.fromkeys(read_around(self._source, offset, buffer)))

    def data_extents(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        return self._source.data_extents(offset, length)

    def is_hole(self, offset: int, length: int) -> bool:
        """Whether any byte of the range is one that could not be read, or lies past the end."""
        return bool(self.are_holes(np.array([offset]), np.array([length]))[0])

    def are_holes(self, offset: I64, length: I64 | int) -> Mask:
        """Of which of the ranges that is true; of failed reads, once they were tried."""
        start, end = self._known
        if self._failed:
            failed = np.array(list(self._failed), dtype=np.int64)
            start = np.concatenate((start, failed[:, 0]))
            end = np.concatenate((end, failed[:, 1]))
            start, end = self._known = join_ranges(start, end)
            self._failed = {}
        stop = offset + length
        at = np.searchsorted(end, offset, side="right")
        beyond: Mask = stop > self.size
        if not len(start):
            return beyond
        within = at < len(start)
        hit: Mask = within & (start[np.minimum(at, len(start) - 1)] < stop)
        return hit | beyond


class Window:
    """The *length* bytes of a source from *offset* on, such as a partition.

    Where the source ends before that, or the window begins outside of it, there are zeros.
    """

    def __init__(self, source: Source, offset: int, length: int) -> None:
        self._source, self.offset, self._length = source, offset, length

    @property
    def size(self) -> int:
        return self._length

    def read_into(self, offset: int, buffer: memoryview) -> None:
        inside = max(0, min(len(buffer), self._length - offset))
        self._source.read_into(self.offset + offset, buffer[:inside])
        buffer[inside:] = bytes(len(buffer) - inside)

    def data_extents(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        inside = max(0, min(length, self._length - offset))
        for start, end in self._source.data_extents(self.offset + offset, inside):
            yield start - self.offset, end - self.offset


def read_blocks(source: Source, offset: I64, block_size: int) -> U8:
    """Blocks of equal size at *offset*, shape (blocks, block_size), neighbours in one read.

    For some at a time: all that is asked for is in memory at once.
    """
    rows = np.empty((len(offset), block_size), dtype=np.uint8)
    for part, blocks in read_tables(source, offset, block_size):
        rows[part] = blocks
    return rows
