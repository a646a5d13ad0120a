"""Inodes of ext2/3/4 in columns, and which of them are in use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planner.arrays import I64, U8, U32, Mask, distinct
from planner.guestfs.checksums import crc
from planner.guestfs.ext.groups import Groups, inode_blocks
from planner.guestfs.ext.superblock import ROOT_INODE, Superblock
from planner.guestfs.inodes import TYPES
from planner.guestfs.inodes import Inodes as UnixInodes
from planner.guestfs.reading import Holes
from planner.source import present_tables, read_tables

EXTENTS_FL = 0x80000
INLINE_DATA_FL = 0x10000000

FAST_SYMLINK = 60
"""A symbolic link that is shorter is in its inode."""


def fields_of(inode_size: int) -> np.dtype[np.void]:
    """Of an inode those that are used, by the kernel's names without their ``i_``."""
    fields: dict[str, tuple[str, int]] = {
        "mode": ("<u2", 0),
        "size_lo": ("<u4", 4),
        "dtime": ("<u4", 20),
        "links_count": ("<u2", 26),
        "flags": ("<u4", 32),
        "block": ("60u1", 40),
        "generation": ("<u4", 100),
        "file_acl_lo": ("<u4", 104),
        "size_high": ("<u4", 108),
        "file_acl_high": ("<u2", 118),
        "checksum_lo": ("<u2", 124),
    }
    if inode_size > 128:
        fields |= {"extra_isize": ("<u2", 128), "checksum_hi": ("<u2", 130)}
    formats, offsets = zip(*fields.values(), strict=True)
    return np.dtype(
        {"names": list(fields), "formats": formats, "offsets": offsets, "itemsize": inode_size}
    )


@dataclass(frozen=True, slots=True)
class Inodes(UnixInodes):
    """Some inodes of ext2/3/4."""

    @property
    def flags(self) -> U32:
        flags: U32 = self.field["flags"].astype(np.uint32)
        return flags


def walk_inodes(
    source: Holes, superblock: Superblock, groups: Groups, damaged: list[int] | None = None
) -> Iterator[Inodes]:
    """All inodes in use whose record can be read, in batches; to *damaged* the number of those
    that make no sense is added.
    """
    size = superblock.block_size
    for blocks, first in inode_blocks(superblock, groups):
        order = np.argsort(blocks, kind="stable")
        offset, numbers = blocks[order] * size, first[order]
        there = present_tables(source, offset, size)
        offset, numbers = offset[there], numbers[there]
        for part, rows in read_tables(source, offset, size):
            some, broken = sound_inodes(inodes_in(rows, numbers[part], superblock), superblock)
            if damaged is not None:
                damaged.append(broken)
            some = _without_deleted(source, superblock, groups, some)
            if len(some):
                yield some


def _without_deleted(
    source: Holes, superblock: Superblock, groups: Groups, inodes: Inodes
) -> Inodes:
    has_links = inodes.field["links_count"] != 0
    if has_links.all():
        return inodes
    at = np.flatnonzero(~has_links)
    in_use, _ = inodes_in_use(source, superblock, groups, inodes.number[at])
    has_links[at] = in_use
    return inodes.select(has_links)


def inodes_in_use(
    source: Holes, superblock: Superblock, groups: Groups, number: I64
) -> tuple[Mask, Mask]:
    """Which inodes are in use, by the bitmaps, and of which that is known."""
    size = superblock.block_size
    in_use = np.zeros(len(number), dtype=np.bool_)
    is_known = np.zeros(len(number), dtype=np.bool_)
    group, index = np.divmod(number - 1, superblock.inodes_per_group)
    at = np.searchsorted(groups.number, group)
    places = distinct(at)
    of_number = np.searchsorted(places, at)
    offset = groups.inode_bitmap[places] * size
    for part, rows in read_tables(source, offset, size):
        holes = source.are_holes(offset[part], size)
        mine = (of_number >= part.start) & (of_number < part.stop)
        row, bit = of_number[mine] - part.start, index[mine]
        in_use[mine] = (rows[row, bit >> 3] >> (bit & 7).astype(np.uint8)) & 1 != 0
        is_known[mine] = ~holes[row]
    uninitialised = index >= superblock.inodes_per_group - groups.unused[at]
    return in_use & ~uninitialised, is_known | uninitialised


def inodes_in(blocks: U8, first: I64, superblock: Superblock) -> Inodes:
    """What some *blocks* of an inode table hold, each beginning with inode *first*."""
    size = superblock.inode_size
    per_block = superblock.block_size // size
    raw = blocks.reshape(-1, size)
    number = (first[:, None] + np.arange(per_block)).reshape(-1)
    return Inodes(number, raw.reshape(-1).view(fields_of(size)), raw)


def sound_inodes(inodes: Inodes, superblock: Superblock) -> tuple[Inodes, int]:
    """Those that make sense and may be in use, and how many make none.

    Of those without links only the bitmap knows.
    """
    field = inodes.field
    # A deleted one keeps what it was, says when that was, and has given its blocks away.
    some = inodes.select(
        (field["mode"] != 0) & ((field["links_count"] == 0) | (field["dtime"] == 0))
    )
    known = np.isin(some.type, TYPES)
    if superblock.has_checksums:
        known &= _checksums_hold(some, superblock)
    return some.select(known), int((~known).sum())


def _checksums_hold(inodes: Inodes, superblock: Superblock) -> Mask:
    """ext4_inode_csum_verify, of each."""
    raw, size = inodes.raw.copy(), superblock.inode_size
    raw[:, 124:126] = 0
    stored = inodes.field["checksum_lo"].astype(np.uint32)
    mask = np.full(len(raw), 0xFFFF, dtype=np.uint32)
    if size > 128:
        has_high = inodes.field["extra_isize"] >= 4
        raw[has_high, 130:132] = 0
        stored[has_high] |= inodes.field["checksum_hi"][has_high].astype(np.uint32) << 16
        mask[has_high] = 0xFFFFFFFF
    number = np.ascontiguousarray(inodes.number.astype("<u4")).view(np.uint8).reshape(-1, 4)
    value = crc(number, superblock.checksum_seed)
    value = crc(raw[:, 100:104], value)
    value = crc(raw, value)
    holds: Mask = (value & mask) == stored
    return holds


def are_own(number: I64, superblock: Superblock) -> Mask:
    """Which inodes are the file system's: reserved ones, the journal, quotas."""
    own: Mask = (number < superblock.first_inode) & (number != ROOT_INODE)
    extra = [superblock.journal_inode, superblock.orphan_inode, *superblock.quota_inodes]
    return own | np.isin(number, [each for each in extra if each])
