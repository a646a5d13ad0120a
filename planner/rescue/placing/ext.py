"""ext2/3/4: what its blocks say of themselves, and where that puts the tables that lead to them.

With checksums (metadata_csum) each structure's CRC-32C begins with the UUID, the number of the
inode and its generation. Such a sum can be run backwards: from a record and its sum comes the
number of the inode; from a block of a directory or of extents, whose it is. Without checksums a
directory's first block names its inode, and no more.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from planner.arrays import I64, U8, distinct, is_among
from planner.guestfs.checksums import crc, crc_before, crc_of_long
from planner.guestfs.columns import big, little
from planner.guestfs.ext.filesystem import Ext
from planner.guestfs.ext.groups import read_bitmap_checksums
from planner.guestfs.ext.inodes import walk_inodes
from planner.guestfs.ext.superblock import SIZE, is_sound
from planner.guestfs.inodes import TYPE_MASK, TYPES
from planner.guestfs.protocol import NO_INODE, Extents, What
from planner.rescue.placing.board import Board
from planner.rescue.placing.claims import Claims, Piece, Sort, Spotted, uuid_half
from planner.rescue.placing.sites import Site, pairs
from planner.rescue.placing.votes import Evidence, Votes, without_rivals
from planner.source import BATCH_BYTES

MARK = b"\x53\xef", 56
"""Of a superblock, and where it is."""

BLOCK_SIZES = (1024, 2048, 4096)
TAIL = b"\0\0\0\0\x0c\0\0\xde"
"""Of a block of a directory, before its checksum."""

EXTENTS = b"\x0a\xf3"
RECORD = 256
"""Bytes of an inode, but for very old and very unusual file systems."""

JOURNAL = b"\xc0\x3b\x39\x98"
JOURNAL_SUPERBLOCKS = (3, 4)
MIN_PARTS, MAX_PARTS = 4, 256
"""Blocks of a journal's own, to take a table for a part of one; and how many are looked at."""

COPIES_AT_MOST = 4 << 20
"""Bytes behind the last descriptor of a journal that may be copies."""


# ---- what blocks say ----


def spot(piece: Piece) -> Iterator[Spotted]:
    """The claims of blocks of ext2/3/4."""
    yield from _superblocks(piece)
    yield from _directories(piece)
    yield from _blocks(piece)
    yield from _records(piece)
    at = piece.marked(JOURNAL, 0)
    if len(at):
        yield Sort.EXT_JOURNAL, at, big(piece.flat, at + 4, 4), big(piece.flat, at + 8, 4)


def _superblocks(piece: Piece) -> Iterator[Spotted]:
    at = piece.marked(*MARK)
    if not len(at):
        return
    at = at[(at + SIZE <= len(piece.flat))]
    kept = [place for place in at.tolist() if is_sound(piece.flat[place : place + SIZE].tobytes())]
    if kept:
        at = np.array(kept, dtype=np.int64)
        yield Sort.EXT_SUPER, at, little(piece.flat, at + 90, 2), uuid_half(piece.flat, at + 104)


def _directories(piece: Piece) -> Iterator[Spotted]:
    at = piece.marked(b"\x0c\0\x01", 4)
    if not len(at):
        return
    flat = piece.flat
    at = at[(flat[at + 8] == ord(".")) & (flat[at + 9] == 0)]
    at = at[(flat[at + 18] == 2) & (flat[at + 20] == ord(".")) & (flat[at + 21] == ord("."))]
    if len(at):
        yield Sort.EXT_DIRECTORY, at, little(flat, at, 4), np.zeros(len(at), dtype=np.int64)


def _blocks(piece: Piece) -> Iterator[Spotted]:
    """Blocks with a checksum in their tail: of directories, and of extents."""
    heads = piece.marked(EXTENTS, 0)
    for size in BLOCK_SIZES:
        if size > piece.cluster_size:
            return
        at = piece.marked(TAIL, size - 12, size)
        yield from _begun(piece.flat, at, size, size - 12, size - 4)
        most = (size - 12) // 12
        at = heads[heads % size == 0]
        at = at[little(piece.flat, at + 4, 2) == most]
        yield from _begun(piece.flat, at, size, 12 + 12 * most, 12 + 12 * most)


def _begun(flat: U8, at: I64, size: int, length: int, sum_at: int) -> Iterator[Spotted]:
    """What the checksums of blocks were begun with, whose first *length* bytes they are of."""
    if len(at):
        stored = little(flat, at + sum_at, 4).astype(np.uint32)
        rows = np.lib.stride_tricks.sliding_window_view(flat, length)[at]
        key = crc_before(stored, rows).astype(np.int64)
        yield Sort.EXT_BLOCK, at, key, np.full(len(at), size, dtype=np.int64)


def _records(piece: Piece) -> Iterator[Spotted]:
    """Inodes with extents."""
    at = piece.marked(EXTENTS, 40, RECORD) // RECORD
    if not len(at):
        return
    records = piece.flat.reshape(-1, RECORD)
    mode = records[at, 0].astype(np.int64) | records[at, 1].astype(np.int64) << 8
    extra = records[at, 128].astype(np.int64) | records[at, 129].astype(np.int64) << 8
    at = at[np.isin(mode & TYPE_MASK, TYPES) & (extra >= 4) & (extra <= RECORD - 128)]
    if not len(at):
        return
    rows = records[at].copy()
    stored = rows[:, [124, 125, 130, 131]].copy().view("<u4")[:, 0]
    rows[:, [124, 125, 130, 131]] = 0
    begun = crc_before(stored.astype(np.uint32), rows)
    number = crc_before(begun, rows[:, 100:104])
    # What four bytes of a number would have begun with, were they zeros: xor of both.
    number = crc_before(number, np.zeros((len(at), 4), dtype=np.uint8))
    yield Sort.EXT_INODE, at * RECORD, number.astype(np.int64), begun.astype(np.int64)


# ---- what that says of tables ----


def weigh(site: Site, claims: Claims) -> Iterator[Votes]:
    """Votes by an ext2/3/4 that can be read in part."""
    filesystem = site.filesystem
    if not isinstance(filesystem, Ext):
        return
    yield _journal_heads(site, claims)
    yield _journal_parts(site, claims)
    claims = _without_copies(claims)
    if not filesystem.superblock.has_checksums:
        yield _first_blocks(site, filesystem, claims.of(Sort.EXT_DIRECTORY))
        return
    yield _inodes(site, filesystem, claims.of(Sort.EXT_INODE))
    yield _owned_blocks(site, filesystem, claims)
    yield _bitmaps(site, filesystem)


def _journal(site: Site) -> Extents:
    """Where the journal lies."""
    found = [e.select(e.what == What.JOURNAL) for e in site.filesystem.extents()]
    return Extents(
        *(np.concatenate([getattr(e, name) for e in found]) for name in Extents.__slots__)
    )


def _journal_heads(site: Site, claims: Claims) -> Votes:
    """The superblock of a journal, which is the first block of it."""
    claims = claims.of(Sort.EXT_JOURNAL)
    claims = claims.select(np.isin(claims.key, JOURNAL_SUPERBLOCKS))
    extents = _journal(site)
    starts = extents.start[extents.file_offset == 0]
    row = np.repeat(np.arange(len(claims)), len(starts))
    return site.votes(Evidence.CONTENT, claims, row, np.tile(starts, len(claims)))


def _journal_parts(site: Site, claims: Claims) -> Votes:
    """Tables with blocks of a journal's own, which fit one window of those that it lies in."""
    claims = claims.of(Sort.EXT_JOURNAL)
    extents = _journal(site)
    start, end = site.to_disk(extents.start), site.to_disk(extents.start) + extents.length
    windows = distinct(np.concatenate((start, end - 1)) // site.coverage)
    if len(windows):
        windows = np.arange(windows[0], min(windows[-1] + 1, windows[0] + MAX_PARTS))
    windows = windows[site.board.are_vacant(windows)][:MAX_PARTS]
    start, end = start[:MAX_PARTS], end[:MAX_PARTS]
    found = []
    for table in distinct(claims.table[np.isin(claims.table, site.board.waiting)]).tolist():
        inside = claims.inside[claims.table == table][:MAX_PARTS]
        place = windows[:, None] * site.coverage + inside
        within = ((place[..., None] >= start) & (place[..., None] < end)).any(axis=2).all(axis=1)
        if len(inside) >= MIN_PARTS and np.count_nonzero(within) == 1:
            found.append((table, int(windows[within][0]), 0))
    columns = np.array(found, dtype=np.int64).reshape(-1, 3).T
    return without_rivals(Votes(Evidence.CONTENT, *columns))


def _without_copies(claims: Claims) -> Claims:
    """Claims that do not lie behind a descriptor of a journal: what follows one are copies."""
    own = claims.of(Sort.EXT_JOURNAL)
    if not len(own):
        return claims
    # Tables apart by more than a window has.
    stride = int(claims.inside.max()) + 2 * COPIES_AT_MOST
    marks = own.table.astype(np.int64) * stride + own.inside
    place = claims.table.astype(np.int64) * stride + claims.inside
    at = np.searchsorted(marks, place, side="right") - 1
    behind = (at >= 0) & (place - marks[np.maximum(at, 0)] <= COPIES_AT_MOST)
    behind &= own.key[np.maximum(at, 0)] == 1
    return claims.select(~behind)


def _inodes(site: Site, filesystem: Ext, claims: Claims) -> Votes:
    """Records whose checksums say which inode they are."""
    superblock = filesystem.superblock
    number = claims.key ^ superblock.checksum_seed
    known = (number > 0) & (number <= superblock.groups * superblock.inodes_per_group)
    offset = np.full(len(claims), -1, dtype=np.int64)
    offset[known] = filesystem.record_offset(number[known])
    return site.votes(Evidence.CHECKSUM, claims, np.arange(len(claims)), offset)


def _owned_blocks(site: Site, filesystem: Ext, claims: Claims) -> Votes:
    """Blocks of directories and extents whose checksums say whose they are."""
    begun, number = _beginnings(filesystem, claims)
    blocks = claims.of(Sort.EXT_BLOCK)
    blocks = blocks.select(blocks.aux == filesystem.block_size)
    inode, start = _owned(site)
    order = np.argsort(begun, kind="stable")
    begun, number = begun[order], number[order]
    at = np.minimum(np.searchsorted(begun, blocks.key), max(0, len(begun) - 1))
    known = begun[at] == blocks.key if len(begun) else np.zeros(len(blocks), dtype=np.bool_)
    blocks, owner = blocks.select(known), number[at[known]] if len(begun) else number
    row, candidate = pairs(owner, inode)
    return site.votes(Evidence.DIRECTORY, blocks, row, start[candidate])


def _beginnings(filesystem: Ext, claims: Claims) -> tuple[I64, I64]:
    """What checksums of an inode's blocks begin with, and which inode that is."""
    superblock = filesystem.superblock
    mine = claims.of(Sort.EXT_INODE)
    number = mine.key ^ superblock.checksum_seed
    known = (number > 0) & (number <= superblock.groups * superblock.inodes_per_group)
    begun, numbers = [mine.aux[known]], [number[known]]
    for inodes in walk_inodes(filesystem.source, superblock, filesystem.groups):
        own = np.ascontiguousarray(inodes.number.astype("<u4")).view(np.uint8).reshape(-1, 4)
        generation = np.ascontiguousarray(inodes.raw[:, 100:104])
        value = crc(generation, crc(own, superblock.checksum_seed))
        begun.append(value.astype(np.int64))
        numbers.append(inodes.number)
    return np.concatenate(begun), np.concatenate(numbers)


def _owned(site: Site) -> tuple[I64, I64]:
    """The inode and the place in the volume of each block of directories and of extents."""
    size, found = site.filesystem.block_size, []
    for extents in site.filesystem.extents():
        mine = (extents.inode != NO_INODE) & np.isin(
            extents.what, (What.DIRECTORY, What.INODE_TABLE)
        )
        some = extents.select(mine)
        count = some.length // size
        row = np.repeat(np.arange(len(some)), count)
        step = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        found.append((some.inode[row], some.start[row] + step * size))
    if not found:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    inode, start = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(inode, kind="stable")
    return inode[order], start[order]


def _first_blocks(site: Site, filesystem: Ext, claims: Claims) -> Votes:
    """The first blocks of directories, by the number of their inode."""
    found = []
    for extents in filesystem.extents():
        mine = (extents.what == What.DIRECTORY) & (extents.file_offset == 0)
        found.append(extents.select(mine & (extents.inode != NO_INODE)))
    inode = np.concatenate([each.inode for each in found])
    start = np.concatenate([each.start for each in found])
    order = np.argsort(inode, kind="stable")
    row, candidate = pairs(claims.key, inode[order])
    return site.votes(Evidence.DIRECTORY, claims, row, start[order][candidate])


def _bitmaps(site: Site, filesystem: Ext) -> Votes:
    """Bitmaps of groups, by the checksums that their descriptors have of them."""
    board, coverage = site.board, site.coverage
    offset, length, wanted, width = read_bitmap_checksums(
        filesystem.source, filesystem.superblock, filesystem.groups
    )
    disk = site.to_disk(offset)
    missing = (disk >= 0) & board.are_vacant(disk // coverage)
    inside = disk % coverage
    places = distinct(inside[missing])[:MAX_BITMAPS]
    missing &= is_among(inside, places)
    seed, mask = filesystem.superblock.checksum_seed, (1 << width) - 1
    none = np.zeros(0, dtype=np.int64)
    table, window, place = [none], [none], [none]
    for size in distinct(length[missing]).tolist():
        mine = np.flatnonzero(missing & (length == size))
        # What is to be where, as one number.
        key = np.searchsorted(places, inside[mine]) << 32 | wanted[mine]
        mine = mine[np.argsort(key, kind="stable")]
        key.sort()
        for tables, where, rows in _blocks_at(board, distinct(inside[mine]), size):
            value = crc_of_long(rows, seed).astype(np.int64) & mask
            row, at = pairs(np.searchsorted(places, where) << 32 | value, key)
            table.append(tables[row])
            window.append(disk[mine[at]] // coverage)
            place.append(where[row])
    columns = (np.concatenate(each) for each in (table, window, place))
    return without_rivals(Votes(Evidence.CHECKSUM, *columns))


def _blocks_at(board: Board, places: I64, size: int) -> Iterator[tuple[I64, I64, U8]]:
    """What is *size* bytes long at *places* within the windows of tables that wait, but zeros.

    The tables, the places, and the bytes, (n, size): some at a time.
    """
    waiting, bits = board.waiting, board.geometry.cluster_bits
    most, found, count = max(1, BATCH_BYTES // size), [], 0
    for where in places.tolist():
        there = waiting[board.tables.grid.leads(waiting, where >> bits)]
        for start in range(0, len(there), most):
            some = there[start : start + most]
            rows = board.rows_of(some, where, size)
            filled = np.flatnonzero(rows.any(axis=1))
            found.append((some[filled], np.full(len(filled), where), rows[filled]))
            count += len(filled)
            if count >= most:
                yield _joined(found)
                found, count = [], 0
    if count:
        yield _joined(found)


def _joined(found: list[tuple[I64, I64, U8]]) -> tuple[I64, I64, U8]:
    tables, places, rows = map(np.concatenate, zip(*found, strict=True))
    return tables, places, rows


MAX_BITMAPS = 256
"""Places within a window at which bitmaps are compared."""
