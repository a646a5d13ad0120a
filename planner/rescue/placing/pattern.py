"""Which clusters of a window are in use: by what a file system has there, and by a table.

Where they agree in all but a few, and no other window and no other table comes near that, the table
belongs there. What is full, or full up to somewhere, is alike everywhere, and proves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from planner.arrays import I64, Mask
from planner.guestfs.protocol import NO_INODE
from planner.rescue.placing.claims import Claims
from planner.rescue.placing.sites import Site
from planner.rescue.placing.votes import Evidence, Votes

BAR, MARGIN = 0.97, 0.1
"""So much of what either has both must have; and so much more than with any other."""

CHANGES = 6
"""So often at least must used and unused take turns in a window."""

MAX_CLUSTERS = 1 << 27
"""Of disks with more nothing is compared."""


def weigh(site: Site, claims: Claims) -> Iterator[Votes]:
    """Votes of tables that lead to clusters exactly where a file system has something."""
    del claims
    board = site.board
    tables, windows = board.waiting, board.vacant
    per_table = board.geometry.l2_entries
    if not len(tables) or not len(windows) or board.tables.windows * per_table > MAX_CLUSTERS:
        return
    used = _used(site).reshape(-1, per_table)[windows]
    if len(tables) == 1:
        theirs = _used(site, of_files=True).reshape(-1, per_table)[windows]
        yield _only_place(site, tables, windows, theirs)
    changes = np.count_nonzero(used[:, 1:] != used[:, :-1], axis=1)
    windows, used = windows[changes >= CHANGES], used[changes >= CHANGES]
    if not len(windows):
        return
    alike = _alike(board.tables.grid.used(tables), used)
    table, window = np.nonzero(alike >= BAR)
    near = alike > BAR - MARGIN
    alone = (near.sum(axis=1)[table] == 1) & (near.sum(axis=0)[window] == 1)
    table, window = table[alone], window[alone]
    zeros = np.zeros(len(table), dtype=np.int64)
    yield Votes(Evidence.PATTERN, tables[table], windows[window], zeros)


def _only_place(site: Site, tables: I64, windows: I64, used: Mask) -> Votes:
    """The last table, where one window alone has no table and something of a file, and has that
    where the table leads to clusters.

    What a file system has for itself may never have been written.
    """
    something = np.flatnonzero(used.any(axis=1))
    one = np.zeros(1, dtype=np.int64)
    fits = (
        len(something) == 1
        and _alike(site.board.tables.grid.used(tables), used[something])[0, 0] >= BAR
    )
    kept = slice(0, int(fits))
    return Votes(Evidence.ONLY_PLACE, tables[kept], windows[something][kept], one[kept])


def _used(site: Site, *, of_files: bool = False) -> Mask:
    """Which clusters of the disk the file system has something in, or *of_files* alone, bool."""
    bits, board = site.board.geometry.cluster_bits, site.board
    count = board.tables.windows * board.geometry.l2_entries
    steps = np.zeros(count + 1, dtype=np.int32)
    for extents in site.filesystem.extents():
        disk, length = site.to_disk(extents.start), extents.length
        known = (disk >= 0) & (length > 0)
        if of_files:
            known &= extents.inode != NO_INODE
        first = disk[known] >> bits
        end = np.minimum(((disk + length - 1)[known] >> bits) + 1, count)
        inside = first < end
        np.add.at(steps, first[inside], 1)
        np.add.at(steps, end[inside], -1)
    used: Mask = np.cumsum(steps[:-1]) > 0
    return used


def _alike(mine: Mask, theirs: Mask) -> npt.NDArray[np.float32]:
    """Of each row of one with each of the other: how many both have, of those that either has."""
    one, other = mine.astype(np.float32), theirs.astype(np.float32)
    both = one @ other.T
    either = one.sum(axis=1)[:, None] + other.sum(axis=1)[None, :] - both
    alike: npt.NDArray[np.float32] = both / np.maximum(either, 1)
    return alike
