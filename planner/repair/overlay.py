"""A source with a plan laid on it: what a repair leaves, before a byte of it is written."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from planner.arrays import I64, U8
from planner.repair.plan import Plan
from planner.source import SECTOR, Executor, Source, executor_of, join_extents

Layer = tuple[I64, U8]
"""Ascending sector numbers, and what is in them, (n, 512)."""


class Layered:
    """*size* bytes of a source under *layers*, each of which lies over those before it."""

    def __init__(self, source: Source, size: int, layers: Sequence[Layer]) -> None:
        # One over the other, as they are: nothing is copied, however many overlays there are.
        self._source, self._size, self._layers = source, size, tuple(layers)
        self._extents = [_runs(sectors) for sectors, _ in layers]

    @property
    def size(self) -> int:
        return self._size

    @property
    def executor(self) -> Executor | None:
        """That of the source beneath."""
        return executor_of(self._source)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        first = offset // SECTOR * SECTOR
        length = -(-(offset + len(buffer) - first) // SECTOR) * SECTOR
        if (first, length) != (offset, len(buffer)):
            whole = memoryview(bytearray(length))
            self.read_into(first, whole)
            buffer[:] = whole[offset - first : offset - first + len(buffer)]
            return
        self._source.read_into(offset, buffer)
        # Of sectors that several stages change, the last stage's content holds.
        for sectors, content in self._layers:
            inside = _between(sectors, offset, offset + length)
            if inside.start < inside.stop:
                rows = np.frombuffer(buffer, dtype=np.uint8).reshape(-1, SECTOR)
                rows[sectors[inside] - offset // SECTOR] = content[inside]
        if offset + length > self._size:
            buffer[max(0, self._size - offset) :] = bytes(min(length, offset + length - self._size))

    def data_extents(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        end = min(offset + length, self._size)
        layers = (_within(extents, offset, end) for extents in self._extents)
        beneath = self._source.data_extents(offset, max(0, end - offset))
        return join_extents(heapq.merge(beneath, *layers))


class Overlay(Layered):
    """A source with a plan laid on it: what the file will be when all stages are written."""

    def __init__(self, source: Source, plan: Plan) -> None:
        layers = [(stage.sectors, stage.after) for stage in plan.stages]
        super().__init__(source, plan.size_after, layers)


def _between(sectors: I64, offset: int, end: int) -> slice:
    """Where in ascending *sectors* those stand that the bytes from *offset* to *end* touch."""
    low = int(sectors.searchsorted(offset // SECTOR))
    if low == len(sectors) or sectors[low] * SECTOR >= end:  # most that is read is not touched
        return slice(low, low)
    return slice(low, int(sectors.searchsorted(-(-end // SECTOR))))


def _runs(sectors: I64) -> tuple[I64, I64]:
    """The runs of neighbours among ascending *sectors*: where each begins and ends, bytes."""
    start = np.flatnonzero(np.diff(sectors, prepend=-2) != 1)
    last = np.append(start[1:], len(sectors))[: len(start)] - 1
    return sectors[start] * SECTOR, (sectors[last] + 1) * SECTOR


def _within(extents: tuple[I64, I64], offset: int, end: int) -> Iterator[tuple[int, int]]:
    """Ascending *extents* as far as they are between *offset* and *end*, one by one.

    Who leaps from one to the next takes the first and asks anew.
    """
    starts, ends = extents
    low, high = int(np.searchsorted(ends, offset, "right")), int(np.searchsorted(starts, end))
    for at in range(low, high):
        yield max(offset, int(starts[at])), min(end, int(ends[at]))
