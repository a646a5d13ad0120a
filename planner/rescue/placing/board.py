"""The disk as far as it is put together: tables in their windows, and holes in between.

A *window* is what one L2 table maps, and its number is the L1 index that leads there. Usable as a
source: what lies in a window without a table, or is compressed, cannot be read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from planner.arrays import I64, U8, Mask
from planner.errors import ReadFailed
from planner.guestfs.work import Work
from planner.rescue.placing.grid import NOWHERE, PACKED
from planner.rescue.placing.tables import NO_WINDOW, Tables
from planner.source import Salvaged, Source, read_tables

ENTRIES_A_TIME = 1 << 14
"""Of tables that are looked through together, if there are so many in more than one."""

WINDOWS_A_TIME = 1 << 14
"""That are asked for a table together."""


class Board:
    """Tables that have a window, and those that wait for one. Grows with `place`.

    ``window``: of each table, `NO_WINDOW` for those that wait. ``size``: of the disk, bytes.
    ``work``: what asking the disk is taken from; raises `WorkSpent` where that is done.
    """

    def __init__(
        self,
        source: Source,
        tables: Tables,
        size: int,
        *,
        has_backing: bool = False,
        work: Work | None = None,
    ) -> None:
        self._source, self.tables, self._size = source, tables, size
        self.work = work or Work()
        self.has_backing = has_backing
        self.geometry = tables.geometry
        self.coverage = tables.geometry.l2_coverage
        self.window = tables.window.copy()
        # Of each window the table in it and 1 more: of those that have none, zeros take no memory.
        self._next_of = np.zeros(max(1, tables.windows), dtype=np.int32)
        placed = np.flatnonzero(self.window >= 0)
        inside = placed[self.window[placed] < tables.windows]
        self._next_of[self.window[inside]] = inside + 1

    # ---- the state of it ----

    @property
    def size(self) -> int:
        return self._size

    @property
    def waiting(self) -> I64:
        """The tables without a window; but not those of snapshots."""
        return np.flatnonzero(self.window == NO_WINDOW)

    @property
    def vacant(self) -> I64:
        """The windows without a table, ascending."""
        return np.flatnonzero(self._next_of == 0)

    def are_vacant(self, window: I64) -> Mask:
        """Which of them there are, without a table."""
        inside = (window >= 0) & (window < len(self._next_of))
        vacant: Mask = inside.copy()
        vacant[inside] = self._next_of[window[inside]] == 0
        return vacant

    def place(self, tables: I64, windows: I64) -> None:
        """Put each of *tables* there, where nothing is."""
        self.window[tables], self._next_of[windows] = windows, tables + 1

    def holes(self) -> tuple[I64, I64]:
        """The ranges of the disk that nothing is known of, start and end, ascending."""
        edges = np.flatnonzero(np.diff(self._next_of == 0, prepend=False, append=False))
        first, count = edges[::2], edges[1::2] - edges[::2]
        start = first * self.coverage
        end = np.minimum(start + count * self.coverage, self._size)
        kept = start < end
        return start[kept], end[kept]

    # ---- its bytes ----

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Raises `ReadFailed` for what is not known."""
        self.work.read(len(buffer))
        buffer[:] = bytes(len(buffer))
        position, end = offset, min(offset + len(buffer), self._size)
        while position < end:
            window = position // self.coverage
            stop = min(end, (window + 1) * self.coverage)
            table = int(self._next_of[window]) - 1 if window < len(self._next_of) else -1
            if table < 0:
                raise ReadFailed
            part = buffer[position - offset : stop - offset]
            self.read_table(table, position - window * self.coverage, part)
            position = stop

    def read_table(self, table: int, inside: int, buffer: memoryview) -> None:
        """What *table* maps, *inside* bytes from the first on. Raises `ReadFailed`."""
        bits = self.geometry.cluster_bits
        first, last = inside >> bits, (inside + len(buffer) - 1) >> bits
        if first == last:
            self._read_cluster(self.tables.grid.at(table, first), inside, buffer)
            return
        hosts = self.tables.grid.cut(table, first, last + 1)
        if (hosts == PACKED).any() or (self.has_backing and (hosts == 0).any()):
            raise ReadFailed
        buffer[:] = bytes(len(buffer))
        breaks = np.flatnonzero(np.diff(hosts) != 1) + 1
        for low, high in zip([0, *breaks], [*breaks, len(hosts)], strict=True):
            if hosts[low] <= 0:
                continue
            start = max(inside, (first + int(low)) << bits)
            stop = min(inside + len(buffer), (first + int(high)) << bits)
            skip = start - ((first + int(low)) << bits)
            part = buffer[start - inside : stop - inside]
            self._source.read_into((int(hosts[low]) << bits) + skip, part)

    def _read_cluster(self, host: int, inside: int, buffer: memoryview) -> None:
        """As of a table, within the cluster *host*: most that is asked for is small."""
        if host == PACKED or (self.has_backing and host == NOWHERE):
            raise ReadFailed
        if host <= 0:
            buffer[:] = bytes(len(buffer))
            return
        bits = self.geometry.cluster_bits
        self._source.read_into((host << bits) + inside % (1 << bits), buffer)

    def bytes_of(self, table: int, inside: int, length: int) -> bytes:
        """The same as bytes; zeros where it cannot be read, or lies outside of the window."""
        if inside < 0 or inside + length > self.coverage:
            return bytes(length)
        buffer = bytearray(length)
        try:
            self.read_table(table, inside, memoryview(buffer))
        except ReadFailed:
            return bytes(length)
        return bytes(buffer)

    def rows_of(self, tables: I64, inside: int, length: int) -> U8:
        """`bytes_of` of each of *tables*; (tables, length)."""
        rows = np.zeros((len(tables), length), dtype=np.uint8)
        bits = self.geometry.cluster_bits
        within = inside % (1 << bits)
        if within + length > 1 << bits:  # of several clusters, each of which may be anywhere
            for row, table in zip(rows, tables.tolist(), strict=True):
                row[:] = np.frombuffer(self.bytes_of(table, inside, length), dtype=np.uint8)
            return rows
        host = self.tables.grid.of_each(tables, inside >> bits)
        at = np.argsort(host, kind="stable")
        at = at[host[at] > 0]
        for part, some in read_tables(Salvaged(self._source), (host[at] << bits) + within, length):
            rows[at[part]] = some
        return rows

    def data_extents(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        """What is allocated, in the windows that have a table."""
        self.work.ask()
        end = min(offset + length, self._size)
        first, last = offset // self.coverage, min(-(-end // self.coverage), len(self._next_of))
        many = max(1, ENTRIES_A_TIME // self.geometry.l2_entries)
        while first < last and offset < end:
            step = min(WINDOWS_A_TIME, last - first)
            windows = first + np.flatnonzero(self._next_of[first : first + step])
            for at in range(0, len(windows), many):
                yield from self._extents(windows[at : at + many], offset, end)
            first += step

    def _extents(self, windows: I64, low: int, high: int) -> Iterator[tuple[int, int]]:
        """Of *windows*, which have tables, as far as it lies between *low* and *high*."""
        bits, start = self.geometry.cluster_bits, windows * self.coverage
        first = np.maximum(low - start, 0) >> bits
        end = np.minimum(-(-(high - start) >> bits), self.geometry.l2_entries)
        tables = self._next_of[windows].astype(np.int64) - 1
        at, entry = self.tables.grid.allocated(tables, first, end)
        begins = np.ones(len(at) + 1, dtype=np.bool_)
        begins[1:-1] = (np.diff(at) != 0) | (np.diff(entry) != 1)
        ones = np.flatnonzero(begins)
        where = start[at] + (entry << bits)
        begin = np.maximum(where[ones[:-1]], low).tolist()
        stop = np.minimum(where[ones[1:] - 1] + (1 << bits), high).tolist()
        yield from zip(begin, stop, strict=True)
