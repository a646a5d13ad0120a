"""The groups of ext2/3/4: their descriptors, from whichever copy is whole, and what is fixed.

Every group has a block bitmap, an inode bitmap and a piece of the inode table, which with flex_bg
may lie in another. Where the primary table of descriptors is damaged, its backups are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planner.arrays import I64, U8, U32, Mask, distinct, expand_ranges
from planner.guestfs.checksums import CRC16, crc
from planner.guestfs.ext.superblock import Compat, Incompat, RoCompat, Superblock
from planner.guestfs.protocol import Extents, What, own_extents
from planner.guestfs.reading import Holes
from planner.source import read_tables

FIELDS = {
    "block_bitmap": (0, 0x20),
    "inode_bitmap": (4, 0x24),
    "inode_table": (8, 0x28),
}
"""Where the low and the high 32 bits of each block number are in a descriptor."""

FLAGS, ITABLE_UNUSED, CHECKSUM = 0x12, 0x1C, 0x1E
INODE_UNINIT, BLOCK_UNINIT = 1, 2

MAX_COPIES = 16
"""Of the table of descriptors that are tried."""

NO_NUMBERS = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Groups:
    """Those whose descriptor is known, ascending by ``number``; int64 columns of block numbers.

    ``unused``: inodes at the end of the table that were never initialised. ``has_bitmap``: whether
    the block bitmap was ever written: if not, nothing is in use but what is fixed.
    """

    number: I64
    block_bitmap: I64
    inode_bitmap: I64
    inode_table: I64
    unused: I64
    has_bitmap: Mask

    def __len__(self) -> int:
        return len(self.number)


def read_groups(source: Holes, superblock: Superblock) -> Groups:
    """The descriptors of all groups, each from the first copy in which it makes sense."""
    total = superblock.groups
    columns = {name: np.zeros(total, dtype=np.int64) for name in FIELDS}
    unused = np.zeros(total, dtype=np.int64)
    has_bitmap = np.ones(total, dtype=np.bool_)
    known = np.zeros(total, dtype=np.bool_)
    # Last of all the primary once more: rather a wrong checksum than nothing.
    for copy, is_strict in [*((copy, True) for copy in range(MAX_COPIES)), (0, False)]:
        index = distinct(np.flatnonzero(~known) // superblock.descriptors_per_block)
        blocks = _descriptor_blocks(superblock, index, copy)
        index, blocks = index[blocks > 0], blocks[blocks > 0]
        size = superblock.block_size
        for part, rows in read_tables(source, blocks * size, size):
            raw, number = _rows(rows, index[part], superblock)
            found = _decode(raw, number, superblock)
            good = found.sound & (found.checked | (not is_strict)) & ~known[number]
            at = number[good]
            for name, column in columns.items():
                column[at] = found.columns[name][good]
            # A backup is as old as the file system: what it says of use is long out of date.
            if copy == 0 and is_strict:
                unused[at] = found.unused[good]
                has_bitmap[at] = found.has_bitmap[good]
            known[at] = True
    at = np.flatnonzero(known)
    return Groups(
        at,
        columns["block_bitmap"][at],
        columns["inode_bitmap"][at],
        columns["inode_table"][at],
        unused[at],
        has_bitmap[at],
    )


def _descriptor_blocks(superblock: Superblock, index: I64, copy: int) -> I64:
    """Where the *copy*th copy of each block of descriptors *index* is; 0: there is none."""
    result = np.zeros(len(index), dtype=np.int64)
    has_meta = Incompat.META_BG in superblock.incompat
    is_meta = has_meta & (index >= superblock.first_meta_bg)
    plain = ~is_meta
    holders = superblock.groups_with_superblock()
    if copy < len(holders):
        result[plain] = superblock.group_start(holders[copy]) + 1 + index[plain]
    if copy < 3 and is_meta.any():
        per_block = superblock.descriptors_per_block
        group = index[is_meta] * per_block + (0, 1, per_block - 1)[copy]
        first = superblock.first_data_block + group * superblock.blocks_per_group
        if superblock.first_data_block == 0 and superblock.block_size == 1024:
            first[group == 0] = 1
        within = group < superblock.groups
        result[is_meta] = np.where(within, first + _have_superblock(superblock, group), 0)
    result[result >= superblock.blocks] = 0
    return result


def _have_superblock(superblock: Superblock, group: I64) -> I64:
    holders = np.array(superblock.groups_with_superblock(), dtype=np.int64)
    return np.isin(group, holders).astype(np.int64)


def _rows(blocks: U8, index: I64, superblock: Superblock) -> tuple[U8, I64]:
    """The descriptors in some *blocks*, and the number of the group that each is of."""
    per_block = superblock.descriptors_per_block
    raw = blocks[:, : per_block * superblock.desc_size].reshape(-1, superblock.desc_size)
    number = (index[:, None] * per_block + np.arange(per_block)).reshape(-1)
    inside = number < superblock.groups
    return raw[inside], number[inside]


@dataclass(frozen=True, slots=True)
class _Decoded:
    columns: dict[str, I64]
    unused: I64
    has_bitmap: Mask
    sound: Mask
    checked: Mask


def _decode(raw: U8, number: I64, superblock: Superblock) -> _Decoded:
    has_high = superblock.desc_size >= 64
    columns = {}
    sound = np.ones(len(raw), dtype=np.bool_)
    for name, (low, high) in FIELDS.items():
        value = _number(raw, low, 4)
        if has_high:
            value |= _number(raw, high, 4) << 32
        columns[name] = value
        length = superblock.inode_table_blocks if name == "inode_table" else 1
        sound &= (value > 0) & (value + length <= superblock.blocks)
    unused, flags = _number(raw, ITABLE_UNUSED, 2), _number(raw, FLAGS, 2)
    has_flags = bool(superblock.ro_compat & (RoCompat.GDT_CSUM | RoCompat.METADATA_CSUM))
    checked = np.ones(len(raw), dtype=np.bool_)
    if has_flags:
        checked = _checksum(raw, number, superblock) == _number(raw, CHECKSUM, 2)
        unused[(flags & INODE_UNINIT) != 0] = superblock.inodes_per_group
    else:
        unused[:] = 0
        flags[:] = 0
    np.clip(unused, 0, superblock.inodes_per_group, out=unused)
    return _Decoded(columns, unused, (flags & BLOCK_UNINIT) == 0, sound, checked)


def _number(raw: U8, at: int, size: int) -> I64:
    return np.ascontiguousarray(raw[:, at : at + size]).view(f"<u{size}")[:, 0].astype(np.int64)


def _checksum(raw: U8, number: I64, superblock: Superblock) -> I64:
    """ext4_group_desc_csum, of each."""
    numbers = np.ascontiguousarray(number.astype("<u4")).view(np.uint8).reshape(-1, 4)
    if superblock.has_checksums:
        copy = raw.copy()
        copy[:, CHECKSUM : CHECKSUM + 2] = 0
        value = crc(copy, crc(numbers, superblock.checksum_seed))
        return (value & 0xFFFF).astype(np.int64)
    identity = np.frombuffer(superblock.raw_uuid, dtype=np.uint8)[None]
    seed: U32 = crc(identity, 0xFFFF, CRC16)
    value = crc(numbers, int(seed[0]), CRC16)
    value = crc(raw[:, :CHECKSUM], value, CRC16)
    if superblock.desc_size > CHECKSUM + 2:
        value = crc(raw[:, CHECKSUM + 2 :], value, CRC16)
    return value.astype(np.int64)


def read_bitmap_checksums(
    source: Holes, superblock: Superblock, groups: Groups
) -> tuple[I64, I64, I64, int]:
    """What the primary descriptors say of bitmaps that are in use, where these can be read.

    Offset of each bitmap and how many bytes of it are summed up, its checksum, and how many bits
    of that there are.
    """
    size, per_block = superblock.block_size, superblock.descriptors_per_block
    has_high = superblock.desc_size >= 64
    index = distinct(groups.number // per_block)
    blocks = _descriptor_blocks(superblock, index, 0)
    index, blocks = index[blocks > 0], blocks[blocks > 0]
    ratio = superblock.cluster_size // superblock.block_size
    lengths = (superblock.blocks_per_group // ratio // 8, superblock.inodes_per_group // 8)
    found = [(NO_NUMBERS, NO_NUMBERS, NO_NUMBERS)]
    for part, rows in read_tables(source, blocks * size, size):
        raw, number = _rows(rows, index[part], superblock)
        checked = _checksum(raw, number, superblock) == _number(raw, CHECKSUM, 2)
        flags = _number(raw, FLAGS, 2)
        for name, summed, low, high, unwritten in (
            ("block_bitmap", lengths[0], 0x18, 0x38, BLOCK_UNINIT),
            ("inode_bitmap", lengths[1], 0x1A, 0x3A, INODE_UNINIT),
        ):
            place, value = _number(raw, FIELDS[name][0], 4), _number(raw, low, 2)
            if has_high:
                place |= _number(raw, FIELDS[name][1], 4) << 32
                value |= _number(raw, high, 2) << 16
            written = checked & (flags & unwritten == 0) & (place > 0) & (place < superblock.blocks)
            lasts = np.full(int(written.sum()), summed, dtype=np.int64)
            found.append((place[written] * size, lasts, value[written]))
    offset, length, value = (np.concatenate(column) for column in zip(*found, strict=True))
    return offset, length, value, 32 if has_high else 16


def fixed_extents(superblock: Superblock, groups: Groups) -> Iterator[Extents]:
    """What is of the file system itself: superblocks, descriptors, bitmaps, inode tables."""
    size = superblock.block_size

    def blocks(what: What, start: I64, length: int | I64) -> Extents:
        inside = (start >= 0) & (start < superblock.blocks)
        count = np.minimum(start + length, superblock.blocks) - start
        return own_extents(what, start[inside] * size, count[inside] * size)

    holders = np.array(superblock.groups_with_superblock(), dtype=np.int64)
    start = superblock.first_data_block + holders * superblock.blocks_per_group
    length = np.ones(len(start), dtype=np.int64)
    if len(start) and superblock.first_data_block == 0 and size == 1024:
        length[0] += 1  # what lies before the superblock
    if Incompat.META_BG in superblock.incompat:
        length += min(superblock.first_meta_bg, superblock.descriptor_blocks)
    else:
        length += superblock.descriptor_blocks
        if Compat.RESIZE_INODE in superblock.compat:
            length += superblock.reserved_gdt_blocks
    if len(start) and superblock.first_data_block == 1:
        start[0], length[0] = 0, length[0] + 1
    yield blocks(What.SUPERBLOCK, start, length)
    if Incompat.META_BG in superblock.incompat:
        index = np.arange(
            min(superblock.first_meta_bg, superblock.descriptor_blocks),
            superblock.descriptor_blocks,
        )
        for copy in range(3):
            at = _descriptor_blocks(superblock, index, copy)
            yield blocks(What.SUPERBLOCK, at[at > 0], 1)
    if superblock.mmp_block:
        yield blocks(What.SUPERBLOCK, np.array([superblock.mmp_block], dtype=np.int64), 1)
    yield blocks(What.BITMAP, groups.block_bitmap, 1)
    yield blocks(What.BITMAP, groups.inode_bitmap, 1)
    yield blocks(What.INODE_TABLE, groups.inode_table, superblock.inode_table_blocks)


def free_spans(
    source: Holes, superblock: Superblock, groups: Groups, per_batch: int = 64
) -> Iterator[tuple[I64, I64]]:
    """Free blocks, as first block and number of them: of all groups whose bitmap can be read."""
    ratio = superblock.cluster_size // superblock.block_size
    bits = superblock.blocks_per_group // ratio
    used_bytes = min(superblock.block_size, -(-bits // 8))
    size = superblock.block_size
    for at in range(0, len(groups), per_batch):
        part = slice(at, at + per_batch)
        offset, number = groups.block_bitmap[part] * size, groups.number[part]
        is_known = ~source.are_holes(offset, size) | ~groups.has_bitmap[part]
        rows = np.zeros((len(offset), size), dtype=np.uint8)
        for inside, blocks in read_tables(source, offset, size):
            rows[inside] = blocks
        is_known &= ~source.are_holes(offset, size) | ~groups.has_bitmap[part]
        rows[~groups.has_bitmap[part]] = 0
        free = np.zeros((len(rows), bits + 2), dtype=np.int8)
        unpacked = np.unpackbits(rows[:, :used_bytes], axis=1, bitorder="little")
        free[:, 1 : bits + 1] = unpacked[:, :bits] == 0
        free[~is_known] = 0
        step = np.diff(free, axis=1)
        row, first = np.nonzero(step == 1)
        _, end = np.nonzero(step == -1)
        base = superblock.first_data_block + number[row] * superblock.blocks_per_group
        start = base + first * ratio
        stop = np.minimum(base + end * ratio, superblock.blocks)
        inside_fs = start < stop
        yield start[inside_fs], (stop - start)[inside_fs]


def inode_blocks(superblock: Superblock, groups: Groups) -> Iterator[tuple[I64, I64]]:
    """The blocks of the inode tables that can hold inodes in use, and the first inode of each.

    Of some groups at a time.
    """
    per_block = superblock.block_size // superblock.inode_size
    used = superblock.inodes_per_group - groups.unused
    wanted = -(-used // per_block)
    limit = 1 << 16
    at = 0
    while at < len(groups):
        stop = at + max(1, int(np.searchsorted(np.cumsum(wanted[at : at + limit]), limit)))
        part = slice(at, stop)
        some = np.flatnonzero(wanted[part] > 0) + at
        if len(some):
            counts = wanted[some]
            within = expand_ranges(np.zeros_like(counts), counts - 1)
            table = np.repeat(groups.inode_table[some], counts)
            first = np.repeat(groups.number[some], counts) * superblock.inodes_per_group + 1
            yield table + within, first + within * per_block
        at = stop
