"""What files hold, as far as that shows where they lie: how they end.

Behind the last byte of a file its block is zeros, and how long the file is says its inode. That one
block ends so is chance; that many do at the very places is none.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from planner.arrays import I64, distinct
from planner.guestfs.ext.filesystem import Ext
from planner.guestfs.ntfs.filesystem import Ntfs
from planner.guestfs.protocol import NO_INODE, Extents, What
from planner.guestfs.xfs.filesystem import Xfs
from planner.rescue.placing.claims import Claims, Piece, Sort, Spotted
from planner.rescue.placing.sites import Site, pairs
from planner.rescue.placing.votes import Evidence, Votes
from planner.source import SECTOR

LONGEST = SECTOR - 4  # one word of four bytes, as `spot` looks for it
"""Bytes of a sector before its end: data that ends in a zero or two is nothing special."""

ENOUGH = 3
"""Files that end where they should, to be no chance; fewer where little else ends in a table."""

SHARE = 5


def spot(piece: Piece) -> Iterator[Spotted]:
    """Sectors that end in zeros, and of the first in a kilobyte those behind which zeros follow."""
    if piece.cluster_size < 2 * SECTOR:
        return
    words = piece.flat.view("<u8").reshape(-1, SECTOR // 8)
    tails = piece.flat.view("<u4")[SECTOR // 4 - 1 :: SECTOR // 4]
    at = np.flatnonzero(tails == 0)
    if not len(at):
        return
    filled = words[at] != 0
    last = filled.shape[1] - 1 - np.argmax(filled[:, ::-1], axis=1)
    kept = filled[np.arange(len(at)), last]
    at, last = at[kept], last[kept]
    is_first = at % 2 == 0
    goes_on = words[at[is_first] + 1].any(axis=1)
    kept = np.delete(np.arange(len(at)), np.flatnonzero(is_first)[goes_on])
    at, last = at[kept], last[kept]
    # The last word that is not all zeros, and its last byte that is none.
    word = words[at, last]
    length = last * 8 + 1 + sum((word >> np.uint64(8 * byte) != 0) for byte in range(1, 8))
    if len(at):
        yield Sort.END, at * SECTOR, length.astype(np.int64), np.zeros(len(at), dtype=np.int64)


def ends_of(site: Site) -> I64:
    """Where files end, behind their last byte, bytes of the volume; but for those that end with a
    sector."""
    filesystem = site.filesystem
    if not isinstance(filesystem, Ext | Xfs | Ntfs):
        return np.zeros(0, dtype=np.int64)
    sized = list(filesystem.sizes())
    none = np.zeros(0, dtype=np.int64)
    inode = np.concatenate([none, *(each[0] for each in sized)])
    size = np.concatenate([none, *(each[1] for each in sized)])
    kept = (size % SECTOR > 0) & (size % SECTOR <= LONGEST)
    inode, size = inode[kept], size[kept]
    order = np.argsort(inode, kind="stable")
    inode, size = inode[order], size[order]
    return np.concatenate([none, *(_ends(e, inode, size) for e in filesystem.extents())])


def _ends(extents: Extents, inode: I64, size: I64) -> I64:
    """The ends of those files whose last byte is in *extents*."""
    some = extents.select((extents.what == What.DATA) & (extents.inode != NO_INODE))
    row, at = pairs(some.inode, inode)
    last = size[at] - some.file_offset[row]
    inside = (last > 0) & (last <= some.length[row])
    ends: I64 = some.start[row][inside] + last[inside]
    return ends


def weigh(site: Site, claims: Claims) -> Iterator[Votes]:
    """Votes of sectors that end where files do, or did: a record of NTFS outlives its file."""
    claims = claims.of(Sort.END)
    yield _votes(site, claims, ends_of(site))
    if isinstance(site.filesystem, Ntfs):
        ends = site.filesystem.former_ends()
        kept = (ends % SECTOR > 0) & (ends % SECTOR <= LONGEST)
        yield _votes(site, claims, ends[kept])


def _votes(site: Site, claims: Claims, ends: I64) -> Votes:
    disk = distinct(site.to_disk(ends - 1) + 1)
    disk = disk[(disk > 0) & site.board.are_vacant((disk - 1) // site.coverage)]
    sector = (disk - 1) // SECTOR * SECTOR
    # A place within a window, and how much of the sector there is filled.
    wanted = sector % site.coverage + (disk - sector)
    order = np.argsort(wanted, kind="stable")
    row, at = pairs(claims.inside + claims.key, wanted[order])
    votes = site.votes_at(Evidence.CONTENT, claims, row, sector[order][at])
    return _beyond_chance(votes, sector // site.coverage, claims)


def _beyond_chance(votes: Votes, expected: I64, claims: Claims) -> Votes:
    """Those of tables in which half of the files end that are *expected* to, windows of these.

    Few are enough only where not much else in the table ends like a file.
    """
    if not len(votes):
        return votes
    _, pair, hits = np.unique(
        np.stack((votes.table, votes.window)), axis=1, return_inverse=True, return_counts=True
    )
    hits = hits[pair.reshape(-1)]
    all_of_window = np.bincount(expected)[votes.window]
    all_of_table = np.bincount(claims.table)[votes.table]
    kept = (hits * 2 >= all_of_window) & ((hits >= ENOUGH) | (hits * SHARE >= all_of_table))
    return votes.select(kept)
