"""A source with a plan laid on it: what a repair leaves, before a byte of it is written."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

import numpy as np

from planner.arrays import I64
from planner.repair.plan import Plan
from planner.source import SECTOR, Executor, Source, executor_of, join_extents


class Overlay:
    """A source with a plan laid on it: what the file will be when all stages are written."""

    def __init__(self, source: Source, plan: Plan) -> None:
        self._source = source
        self._size = plan.size_after
        # One over the other, as they are: nothing is copied, however many overlays there are.
        self._layers = [(stage.sectors, stage.after) for stage in plan.stages]

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
        rows = np.frombuffer(buffer, dtype=np.uint8).reshape(-1, SECTOR)
        # Of sectors that several stages change, the last stage's content holds.
        for sectors, content in self._layers:
            inside = _between(sectors, offset, offset + length)
            rows[sectors[inside] - offset // SECTOR] = content[inside]
        if offset + length > self._size:
            buffer[max(0, self._size - offset) :] = bytes(min(length, offset + length - self._size))

    def data_extents(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        end = min(offset + length, self._size)
        runs = (_runs(sectors, offset, end) for sectors, _ in self._layers)
        beneath = self._source.data_extents(offset, max(0, end - offset))
        return join_extents(heapq.merge(beneath, *runs))


def _between(sectors: I64, offset: int, end: int) -> slice:
    """Where in ascending *sectors* those stand that the bytes from *offset* to *end* touch."""
    return slice(*np.searchsorted(sectors, [offset // SECTOR, -(-end // SECTOR)]).tolist())


def _runs(sectors: I64, offset: int, end: int) -> Iterator[tuple[int, int]]:
    """The runs of neighbours among *sectors*, as ascending byte extents from *offset* to *end*."""
    inside = sectors[_between(sectors, offset, end)]
    for run in np.split(inside, np.flatnonzero(np.diff(inside) != 1) + 1):
        if len(run):
            yield max(offset, int(run[0]) * SECTOR), min(end, (int(run[-1]) + 1) * SECTOR)
