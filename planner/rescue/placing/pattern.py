"""Which clusters of a window are in use: by what a file system has there, and by a table.

Where they agree in all but a few, and no other window and no other table comes near that, the table
belongs there. What is full, or full up to somewhere, is alike everywhere, and proves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from planner.arrays import I64, Mask, expand_ranges, join_ranges
from planner.guestfs.protocol import NO_INODE
from planner.rescue.placing.claims import Claims
from planner.rescue.placing.sites import Site
from planner.rescue.placing.votes import Evidence, Votes

BAR, MARGIN = 0.97, 0.1
"""So much of what either has both must have; and so much more than with any other."""

CHANGES = 6
"""So often at least must used and unused take turns in a window."""

MAX_CLUSTERS = 1 << 27
"""Of the windows that are compared; where there are more none is."""


def weigh(site: Site, claims: Claims) -> Iterator[Votes]:
    """Votes of tables that lead to clusters exactly where a file system has something."""
    del claims
    board = site.board
    tables, windows = board.waiting, board.vacant
    if not len(tables) or not len(windows):
        return
    if len(tables) == 1:
        yield _only_place(site, tables, windows)
    used = _Used.of(site)
    # A run begins and ends once.
    windows = windows[2 * used.count_runs(windows) >= CHANGES]
    if len(windows) * board.geometry.l2_entries > MAX_CLUSTERS:
        return
    rows = used.rows(windows)
    changes = np.count_nonzero(rows[:, 1:] != rows[:, :-1], axis=1)
    windows, rows = windows[changes >= CHANGES], rows[changes >= CHANGES]
    if not len(windows):
        return
    alike = _alike(board.tables.grid.used(tables), rows)
    table, window = np.nonzero(alike >= BAR)
    near = alike > BAR - MARGIN
    alone = (near.sum(axis=1)[table] == 1) & (near.sum(axis=0)[window] == 1)
    table, window = table[alone], window[alone]
    zeros = np.zeros(len(table), dtype=np.int64)
    yield Votes(Evidence.PATTERN, tables[table], windows[window], zeros)


def _only_place(site: Site, tables: I64, windows: I64) -> Votes:
    """The last table, where one window alone has no table and something of a file, and has that
    where the table leads to clusters.

    What a file system has for itself may never have been written.
    """
    used = _Used.of(site, of_files=True)
    something = np.flatnonzero(used.count_runs(windows))
    one = np.zeros(1, dtype=np.int64)
    fits = (
        len(something) == 1
        and _alike(site.board.tables.grid.used(tables), used.rows(windows[something]))[0, 0] >= BAR
    )
    kept = slice(0, int(fits))
    return Votes(Evidence.ONLY_PLACE, tables[kept], windows[something][kept], one[kept])


@dataclass(frozen=True, slots=True)
class _Used:
    """Which clusters of the disk a file system has something in: ascending runs, of which none
    touches another. ``width``: clusters of a window.
    """

    first: I64
    end: I64
    width: int

    @classmethod
    def of(cls, site: Site, *, of_files: bool = False) -> _Used:
        """Those of *site*, or *of_files* alone."""
        bits, board = site.board.geometry.cluster_bits, site.board
        count = board.tables.windows * board.geometry.l2_entries
        starts, ends = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        for extents in site.filesystem.extents():
            disk, length = site.to_disk(extents.start), extents.length
            known = (disk >= 0) & (length > 0)
            if of_files:
                known &= extents.inode != NO_INODE
            first = disk[known] >> bits
            end = np.minimum(((disk + length - 1)[known] >> bits) + 1, count)
            inside = first < end
            start, end = join_ranges(first[inside], end[inside])
            starts.append(start)
            ends.append(end)
        start, end = join_ranges(np.concatenate(starts), np.concatenate(ends))
        return cls(start, end, board.geometry.l2_entries)

    def count_runs(self, windows: I64) -> I64:
        """How many runs reach into each of *windows*."""
        low, high = self._runs(windows)
        return high - low

    def rows(self, windows: I64) -> Mask:
        """Which clusters of each of *windows* are in use; bool (windows, clusters of one)."""
        low, high = self._runs(windows)
        run, row = expand_ranges(low, high - 1), np.repeat(np.arange(len(windows)), high - low)
        begin = windows[row] * self.width
        steps = np.zeros((len(windows), self.width + 1), dtype=np.int8)
        steps[row, np.maximum(self.first[run] - begin, 0)] = 1
        steps[row, np.minimum(self.end[run] - begin, self.width)] = -1
        used: Mask = np.cumsum(steps[:, :-1], axis=1, dtype=np.int8) > 0
        return used

    def _runs(self, windows: I64) -> tuple[I64, I64]:
        begin = windows * self.width
        low = np.searchsorted(self.end, begin, side="right")
        return low, np.searchsorted(self.first, begin + self.width, side="left")


def _alike(mine: Mask, theirs: Mask) -> npt.NDArray[np.float32]:
    """Of each row of one with each of the other: how many both have, of those that either has."""
    one, other = mine.astype(np.float32), theirs.astype(np.float32)
    both = one @ other.T
    either = one.sum(axis=1)[:, None] + other.sum(axis=1)[None, :] - both
    alike: npt.NDArray[np.float32] = both / np.maximum(either, 1)
    return alike
