"""NTFS: records of files say their number, and blocks of directories whose they are.

Where record *n* lies is told by the runs of the MFT, where a block of a directory lies by those of
the directory's record.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from planner.arrays import I64, U8
from planner.guestfs.columns import little
from planner.guestfs.ntfs.attributes import NUMBER
from planner.guestfs.ntfs.boot import RECORD_SIZES
from planner.guestfs.ntfs.filesystem import Ntfs
from planner.guestfs.protocol import What
from planner.rescue.placing.claims import Claims, Piece, Sort, Spotted
from planner.rescue.placing.sites import Site, pairs
from planner.rescue.placing.votes import Evidence, Votes

NUMBERED = 0x30
"""Where the updates of a record begin that says its number, which those of Windows XP do."""

FILE_NAME_BYTES = 66
LAST_ENTRY = 2
LOG_PAGE = 4096
MIRRORED = 4
"""Records that the mirror of the MFT has at least."""


def spot(piece: Piece) -> Iterator[Spotted]:
    """The claims of records of files and of blocks of directories."""
    flat = piece.flat
    at = piece.marked(b"FILE", 0)
    if len(at):
        at = at[(little(flat, at + 4, 2) == NUMBERED)]
        size = little(flat, at + 28, 4)
        kept = np.isin(size, RECORD_SIZES)
        at = at[kept]
        yield Sort.NTFS_RECORD, at, little(flat, at + 44, 4), size[kept]
    at = piece.marked(b"INDX", 0)
    if len(at):
        yield from _directories(flat, at)
    at = piece.marked(b"RSTR", 0)
    if len(at):
        none = np.zeros(len(at), dtype=np.int64)
        yield Sort.NTFS_LOG, at, none, none


def _directories(flat: U8, at: I64) -> Iterator[Spotted]:
    first = at + 24 + little(flat, at + 24, 4)
    inside = (first + 24 + 8 <= len(flat)) & (first < at + 4096)
    at, first = at[inside], first[inside]
    named = (little(flat, first + 10, 2) >= FILE_NAME_BYTES) & (
        little(flat, first + 12, 2) & LAST_ENTRY == 0
    )
    at, first = at[named], first[named]
    owner = little(flat, first + 16, 8) & NUMBER
    yield Sort.NTFS_INDEX, at, owner, little(flat, at + 16, 8)


def weigh(site: Site, claims: Claims) -> Iterator[Votes]:
    """Votes by an NTFS of which a boot sector is known."""
    filesystem = site.filesystem
    if isinstance(filesystem, Ntfs):
        yield _records(site, filesystem, claims.of(Sort.NTFS_RECORD))
        yield _indexes(site, claims.of(Sort.NTFS_INDEX))
        yield _log(site, claims.of(Sort.NTFS_LOG))


def _records(site: Site, filesystem: Ntfs, claims: Claims) -> Votes:
    boot, pieces = filesystem.boot, filesystem.table.pieces
    claims = claims.select(claims.aux == boot.record_size)
    number = claims.key
    places = [pieces.places(number * boot.record_size)]
    # Where the first record is not known yet, the boot sector says where the first few are.
    for start in (boot.mft, boot.mirror):
        offset = start * boot.cluster_size + number * boot.record_size
        places.append(np.where(number < MIRRORED, offset, -1))
    row = np.tile(np.arange(len(claims)), len(places))
    return site.votes(Evidence.SELF_ADDRESS, claims, row, np.concatenate(places))


def _indexes(site: Site, claims: Claims) -> Votes:
    found = [
        extents.select(extents.what == What.DIRECTORY) for extents in site.filesystem.extents()
    ]
    inode, begin, length, start = _columns(
        [(each.inode, each.file_offset, each.length, each.start) for each in found]
    )
    order = np.argsort(inode, kind="stable")
    inode, begin, length, start = (each[order] for each in (inode, begin, length, start))
    row, at = pairs(claims.key, inode)
    unit = min(site.filesystem.block_size, 4096) if site.filesystem.block_size <= 4096 else 512
    within = claims.aux[row] * unit - begin[at]
    inside = (within >= 0) & (within < length[at])
    row, at, within = row[inside], at[inside], within[inside]
    return site.votes(Evidence.DIRECTORY, claims, row, start[at] + within)


def _log(site: Site, claims: Claims) -> Votes:
    """The two pages that the log begins with."""
    found = [each.select(each.what == What.JOURNAL) for each in site.filesystem.extents()]
    first = [each.start[each.file_offset == 0] for each in found]
    start = np.concatenate([np.zeros(0, dtype=np.int64), *first])
    places = np.concatenate((start, start + LOG_PAGE))
    row = np.repeat(np.arange(len(claims)), len(places))
    return site.votes(Evidence.CONTENT, claims, row, np.tile(places, len(claims)))


def _columns(rows: list[tuple[I64, ...]]) -> list[I64]:
    none = np.zeros(0, dtype=np.int64)
    return [np.concatenate([none, *(row[number] for row in rows)]) for number in range(4)]
