"""Inodes of XFS: the chunks of 64 that they come in, and their records in columns.

Where the tree of a group's chunks is damaged, inodes are looked for in the blocks that are not
free: a record of version 5 says which inode it is, and of which file system.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planner.arrays import I64, U8, U64, Mask, join_ranges
from planner.guestfs.checksums import crc
from planner.guestfs.columns import big
from planner.guestfs.inodes import TYPES, Inodes
from planner.guestfs.reading import Holes
from planner.guestfs.xfs.groups import FREE_BY_BLOCK, INODES, Trees, free_blocks
from planner.guestfs.xfs.superblock import Superblock
from planner.source import BATCH_BYTES, present_tables, read_tables

CHUNK = 64
"""Inodes that are allocated together."""

REALTIME = 0x1
"""Of ``flags``: the data is on another device."""

LARGE_COUNTS = 0x10
"""Of ``flags2``: the numbers of extents are wide (NREXT64)."""

ONE = np.uint64(1)

FIELDS: dict[str, tuple[str, int]] = {
    "magic": ("V2", 0),
    "mode": (">u2", 2),
    "version": ("u1", 4),
    "format": ("u1", 5),
    "nlink": (">u4", 16),
    "big_nextents": (">u8", 24),
    "nextents": (">u4", 76),
    "anextents": (">u2", 80),
    "forkoff": ("u1", 82),
    "aformat": ("u1", 83),
    "flags": (">u2", 90),
}
FIELDS_V3 = {"crc": ("<u4", 100), "flags2": (">u8", 120), "ino": (">u8", 152), "uuid": ("V16", 160)}


def fields_of(superblock: Superblock) -> np.dtype[np.void]:
    """Of an inode those that are used, by the kernel's names without their ``di_``."""
    fields = FIELDS | (FIELDS_V3 if superblock.is_v5 else {})
    formats, offsets = zip(*fields.values(), strict=True)
    itemsize = superblock.inode_size
    return np.dtype(
        {"names": list(fields), "formats": formats, "offsets": offsets, "itemsize": itemsize}
    )


@dataclass(frozen=True, slots=True)
class Chunks:
    """Chunks of inodes, ascending: the number of the first of each (int64).

    ``there``, ``in_use``: a bit an inode (uint64): whether there is a record, and whether the tree
    has it as allocated. ``is_told``: whether the tree says so, or the records only look like it.
    """

    first: I64
    there: U64
    in_use: U64
    is_told: Mask

    def __len__(self) -> int:
        return len(self.first)

    def select(self, which: Mask | I64 | slice) -> Chunks:
        """Some of them."""
        return Chunks(self.first[which], self.there[which], self.in_use[which], self.is_told[which])


# ---- chunks ----


def find_chunks(source: Holes, superblock: Superblock, trees: Trees) -> Chunks:
    """All chunks: those of the trees, and in groups whose tree is damaged what looks like some."""
    parts = [_chunks_of(nodes.group, nodes.record, superblock) for nodes in trees.walk(INODES)]
    told = _together(parts)
    broken = trees.broken(INODES)
    if not len(broken):
        return told
    free = _free_ranges(superblock, trees, broken)
    found = _together(list(_scan(source, superblock, broken, free)))
    # What the tree has is known better.
    return _together([told, found.select(~np.isin(found.first, told.first))])


def _chunks_of(group: I64, record: U8, superblock: Superblock) -> Chunks:
    flat, at = record.reshape(-1), np.arange(len(record), dtype=np.int64) * 16
    within = big(flat, at, 4)
    free = np.ascontiguousarray(record[:, 8:]).view(">u8")[:, 0].astype(np.uint64)
    there = np.full(len(record), ~np.uint64(0))
    if superblock.has_sparse_inodes:
        holes = big(flat, at + 4, 2)
        missing = (holes[:, None] >> (np.arange(CHUNK) // 4)) & 1 != 0
        there = ~_bits(missing)
    first = group << superblock.ag_inode_bits | within
    inside = (within >> superblock.ag_inode_bits == 0) & (superblock.inode_offset(first) > 0)
    chunks = Chunks(first, there, there & ~free, np.ones(len(first), dtype=np.bool_))
    return chunks.select(inside)


def _bits(mask: Mask) -> U64:
    """Rows of 64 as numbers, the first in the lowest bit."""
    packed = np.packbits(mask, axis=1, bitorder="little")
    return np.ascontiguousarray(packed).view("<u8")[:, 0].astype(np.uint64)


def _unpacked(bits: U64) -> Mask:
    raw = np.ascontiguousarray(bits.astype("<u8")).view(np.uint8).reshape(-1, 8)
    return np.unpackbits(raw, axis=1, bitorder="little").astype(np.bool_)


def _together(parts: list[Chunks]) -> Chunks:
    """Ascending; of a chunk that is told of twice the first."""
    if not parts:
        none = np.zeros(0, dtype=np.uint64)
        return Chunks(np.zeros(0, dtype=np.int64), none, none, np.zeros(0, dtype=np.bool_))
    first = np.concatenate([part.first for part in parts])
    order = np.argsort(first, kind="stable")
    ascending = first[order]
    new = np.ones(len(order), dtype=np.bool_)
    new[1:] = ascending[1:] != ascending[:-1]
    return Chunks(
        first,
        np.concatenate([part.there for part in parts]),
        np.concatenate([part.in_use for part in parts]),
        np.concatenate([part.is_told for part in parts]),
    ).select(order[new])


def with_named(chunks: Chunks, number: I64) -> Chunks:
    """*chunks*, and what directories name, ascending: inodes whose records were not found."""
    if not len(number):
        return chunks
    bit = ONE << (number & (CHUNK - 1)).astype(np.uint64)
    first = np.concatenate((chunks.first, number & ~np.int64(CHUNK - 1)))
    order = np.argsort(first, kind="stable")
    ascending = first[order]
    begin = np.flatnonzero(np.append(True, ascending[1:] != ascending[:-1]))
    # That the records are in use is not told by a tree, even where others of the chunk are.
    told = np.concatenate((chunks.is_told, np.zeros(len(number), dtype=np.bool_)))
    return Chunks(
        ascending[begin],
        np.bitwise_or.reduceat(np.concatenate((chunks.there, bit))[order], begin),
        np.bitwise_or.reduceat(np.concatenate((chunks.in_use, bit))[order], begin),
        np.logical_and.reduceat(told[order], begin),
    )


def _free_ranges(superblock: Superblock, trees: Trees, groups: I64) -> tuple[I64, I64]:
    """Free blocks of *groups* as ranges start..end-1: old inodes there are nobody's."""
    parts = []
    for nodes in trees.walk(FREE_BY_BLOCK):
        start, count = free_blocks(superblock, nodes)
        mine = np.isin(start // superblock.ag_blocks, groups)
        parts.append((start[mine], (start + count)[mine]))
    if not parts:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    return join_ranges(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _scan(
    source: Holes, superblock: Superblock, groups: I64, free: tuple[I64, I64]
) -> Iterator[Chunks]:
    size = superblock.block_size
    per_piece = max(1, BATCH_BYTES // size)
    breaks = np.flatnonzero(np.diff(groups) > 1) + 1
    begins = groups[np.append(0, breaks)].tolist()
    ends = (groups[np.append(breaks - 1, len(groups) - 1)] + 1).tolist()
    for begin, end in zip(begins, ends, strict=True):
        low = begin * superblock.ag_blocks
        high = min(end * superblock.ag_blocks, superblock.blocks)
        for start, stop in source.data_extents(low * size, (high - low) * size):
            for first in range(start // size, -(-stop // size), per_piece):
                last = min(first + per_piece, -(-stop // size), high)
                block = np.arange(first, last, dtype=np.int64)
                at = np.searchsorted(free[1], block, side="right")
                if len(free[0]):
                    within = at < len(free[0])
                    block = block[~(within & (free[0][np.minimum(at, len(free[0]) - 1)] <= block))]
                yield from _look_at(source, superblock, block)


def _look_at(source: Holes, superblock: Superblock, block: I64) -> Iterator[Chunks]:
    """The chunks of which any of these blocks looks like a part."""
    size, per_block = superblock.block_size, superblock.block_size // superblock.inode_size
    for part, rows in read_tables(source, block * size, size):
        group, within = np.divmod(block[part], superblock.ag_blocks)
        first = group << superblock.ag_inode_bits | within << superblock.inode_bits
        number = (first[:, None] + np.arange(per_block)).reshape(-1)
        inodes = _records(rows.reshape(-1, superblock.inode_size), number, superblock)
        looks = _looks_like_one(inodes, superblock).reshape(-1, per_block)
        is_one = np.repeat(looks.any(axis=1), per_block)
        number = number[is_one]
        chunk = number & ~np.int64(CHUNK - 1)
        bit = ONE << (number & (CHUNK - 1)).astype(np.uint64)
        if len(chunk):
            begin = np.flatnonzero(np.append(True, chunk[1:] != chunk[:-1]))
            bits = np.bitwise_or.reduceat(bit, begin)
            yield Chunks(chunk[begin], bits, bits, np.zeros(len(begin), dtype=np.bool_))


# ---- records ----


def walk_inodes(
    source: Holes, superblock: Superblock, chunks: Chunks, broken: list[int] | None = None
) -> Iterator[Inodes]:
    """All inodes in use whose record can be read, in batches; to *broken* the number of those
    that make no sense is added.
    """
    size = superblock.inode_size * CHUNK
    offset = superblock.inode_offset(chunks.first)
    there = present_tables(source, offset, size)
    chunks, offset = chunks.select(there), offset[there]
    for part, rows in read_tables(source, offset, size):
        some = chunks.select(part)
        number = (some.first[:, None] + np.arange(CHUNK)).reshape(-1)
        in_use = _unpacked(some.in_use).reshape(-1)
        inodes = _records(
            rows.reshape(-1, superblock.inode_size)[in_use], number[in_use], superblock
        )
        sound = _looks_like_one(inodes, superblock)
        allocated = inodes.field["mode"] != 0
        if superblock.is_v5:
            sound &= _checksums_hold(inodes)
        if broken is not None:
            told = np.repeat(some.is_told, CHUNK)[in_use]
            at = np.flatnonzero(told & ~sound)
            place = superblock.inode_offset(inodes.number[at])
            broken.append(int((~source.are_holes(place, superblock.inode_size)).sum()))
        yield inodes.select(sound & allocated)


def read_inodes(source: Holes, superblock: Superblock, number: I64) -> tuple[I64, Inodes]:
    """The records of *number*, ascending, that make sense, and the rows they are of."""
    offset = superblock.inode_offset(number)
    rows = np.flatnonzero(offset >= 0)
    raw = np.empty((len(rows), superblock.inode_size), dtype=np.uint8)
    for part, records in read_tables(source, offset[rows], superblock.inode_size):
        raw[part] = records
    inodes = _records(raw, number[rows], superblock)
    sound = _looks_like_one(inodes, superblock)
    return rows[sound], inodes.select(sound)


def _records(raw: U8, number: I64, superblock: Superblock) -> Inodes:
    raw = np.ascontiguousarray(raw)
    return Inodes(number, raw.reshape(-1).view(fields_of(superblock)), raw)


def _looks_like_one(inodes: Inodes, superblock: Superblock) -> Mask:
    field = inodes.field
    looks: Mask = (inodes.raw[:, 0] == ord("I")) & (inodes.raw[:, 1] == ord("N"))
    looks &= (field["mode"] == 0) | np.isin(inodes.type, TYPES)
    looks &= (field["format"] <= 3) & (field["aformat"] <= 3)
    if not superblock.is_v5:
        looks &= (field["version"] == 1) | (field["version"] == 2)
        return looks
    own = np.frombuffer(superblock.meta_uuid, dtype=np.uint8)
    looks &= (field["version"] == 3) & (field["ino"].astype(np.int64) == inodes.number)
    looks &= (inodes.raw[:, 160:176] == own).all(axis=1)
    return looks


def _checksums_hold(inodes: Inodes) -> Mask:
    """xfs_verify_cksum, of each."""
    raw = inodes.raw.copy()
    raw[:, 100:104] = 0
    holds: Mask = ~crc(raw, 0xFFFFFFFF) == inodes.field["crc"]
    return holds


def records_in(superblock: Superblock, chunks: Chunks, start: I64, length: I64) -> tuple[I64, Mask]:
    """The inodes in use whose records ascending ranges touch, ascending, and of which of them
    it is told that they are.
    """
    size = superblock.inode_size
    offset = superblock.inode_offset(chunks.first)
    # Chunks ascend by number, and so they do on the disk.
    end = start + length
    at = np.searchsorted(end, offset, side="right")
    hit = at < len(start)
    hit &= (
        start[np.minimum(at, max(0, len(start) - 1))] < offset + size * CHUNK
        if len(start)
        else False
    )
    some, offset = chunks.select(hit), offset[hit]
    place = offset[:, None] + np.arange(CHUNK) * size
    at = np.minimum(np.searchsorted(end, place, side="right"), max(0, len(end) - 1))
    touched = _unpacked(some.in_use)
    if len(start):
        touched &= (start[at] < place + size) & (place < end[at])
    number = (some.first[:, None] + np.arange(CHUNK))[touched]
    return number, np.repeat(some.is_told, CHUNK).reshape(-1, CHUNK)[touched]
