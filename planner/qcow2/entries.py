"""L1, L2, refcount-table and bitmap-table words: masks, types and their accessors over arrays.

Which of them are wrong is the business of `planner.check.entry_rules`. Source:
docs/interop/qcow2.txt, "L1 table entry", "L2 table entry", "Refcount table entry", "Bitmap table".
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from planner.arrays import I64, U8, U64, Mask
from planner.qcow2.geometry import SECTOR, Geometry

COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1

L1_OFFSET = 0x00FF_FFFF_FFFF_FE00
L1_RESERVED = 0x7F00_0000_0000_01FF

L2_OFFSET = 0x00FF_FFFF_FFFF_FE00
L2_RESERVED = 0x3F00_0000_0000_01FE

REFTABLE_OFFSET = 0xFFFF_FFFF_FFFF_FE00
REFTABLE_RESERVED = 0x1FF

BITMAP_OFFSET = 0x00FF_FFFF_FFFF_FE00
BITMAP_RESERVED = 0xFF00_0000_0000_01FE
BITMAP_ALL_ONES = 1

SUBCLUSTERS_ALLOCATED = 0x0000_0000_FFFF_FFFF
SUBCLUSTERS_ZERO = 0xFFFF_FFFF_0000_0000

NO_HOST = -1
"""The host offset of what has none."""


class ClusterType(IntEnum):
    """What an L2 entry says of its guest cluster; QEMU's QCow2ClusterType."""

    UNALLOCATED = 0
    ZERO_PLAIN = 1
    ZERO_ALLOC = 2
    NORMAL = 3
    COMPRESSED = 4


def compressed_offset_mask(geometry: Geometry) -> int:
    """Bits of a compressed cluster descriptor that hold the host offset."""
    return (1 << geometry.compressed_shift) - 1


def compressed_sectors_mask(geometry: Geometry) -> int:
    """Bits of a compressed cluster descriptor that hold the number of additional sectors."""
    return ((1 << (geometry.cluster_bits - 8)) - 1) << geometry.compressed_shift


def decode_words(rows: U8) -> U64:
    """Big-endian tables, uint8 (tables, bytes), as native words, uint64 (tables, bytes / 8)."""
    return rows.view(">u8").astype(np.uint64)


def split_entries(words: U64, extended: bool) -> tuple[U64, U64 | None]:
    """L2 entries and, where they are extended, their subcluster bitmaps."""
    if not extended:
        return words, None
    return np.ascontiguousarray(words[:, 0::2]), np.ascontiguousarray(words[:, 1::2])


def l1_offsets(words: U64) -> I64:
    """Host offsets of the L2 tables that L1 entries lead to, bytes, same shape as *words*."""
    return (words & np.uint64(L1_OFFSET)).astype(np.int64)


def l2_offsets(entries: U64) -> I64:
    """Host offsets of standard L2 entries, bytes, same shape as *entries* (uint64)."""
    return (entries & np.uint64(L2_OFFSET)).astype(np.int64)


def cluster_types(entries: U64, geometry: Geometry) -> U8:
    """`ClusterType` of L2 entries (uint64), uint8, same shape; qcow2_get_cluster_type."""
    has_offset = (entries & np.uint64(L2_OFFSET)) != 0
    types = np.where(has_offset, ClusterType.NORMAL, ClusterType.UNALLOCATED).astype(np.uint8)
    if geometry.external_data:
        types[~has_offset & ((entries & np.uint64(COPIED)) != 0)] = ClusterType.NORMAL
    if not geometry.extended_l2:
        zero = (entries & np.uint64(ZERO)) != 0
        types[zero] = np.where(has_offset[zero], ClusterType.ZERO_ALLOC, ClusterType.ZERO_PLAIN)
    types[(entries & np.uint64(COMPRESSED)) != 0] = ClusterType.COMPRESSED
    return types


def has_host_cluster(types: U8) -> Mask:
    """Which `ClusterType`s have a host cluster of their own, whatever the guest reads there."""
    has: Mask = (types == ClusterType.NORMAL) | (types == ClusterType.ZERO_ALLOC)
    return has


def reads_as_zeros(types: U8) -> Mask:
    """Which `ClusterType`s have the zero flag."""
    zeros: Mask = (types == ClusterType.ZERO_PLAIN) | (types == ClusterType.ZERO_ALLOC)
    return zeros


def host_ranges(entries: U64, types: U8, geometry: Geometry) -> tuple[I64, I64]:
    """Host offset and bytes of what L2 entries refer to; `NO_HOST` and 0 where that is nothing."""
    placed, packed = has_host_cluster(types), np.flatnonzero(types == ClusterType.COMPRESSED)
    offset = np.where(placed, l2_offsets(entries), NO_HOST)
    size = np.where(placed, geometry.cluster_size, 0)
    if len(packed):
        offset[packed], size[packed] = compressed_ranges(entries[packed], geometry)
    return offset, size


def compressed_ranges(entries: U64, geometry: Geometry) -> tuple[I64, I64]:
    """Host offset and length in bytes of compressed clusters (qcow2_parse_compressed_l2_entry)."""
    offset = (entries & np.uint64(compressed_offset_mask(geometry))).astype(np.int64)
    shift = np.uint64(geometry.compressed_shift)
    sectors = (entries & np.uint64(compressed_sectors_mask(geometry))) >> shift
    return offset, (sectors.astype(np.int64) + 1) * SECTOR - (offset & (SECTOR - 1))


def bad_bitmap_entries(entries: U64, geometry: Geometry) -> Mask:
    """Which bitmap-table words break the specification (check_table_entry in qcow2-bitmap.c)."""
    offset = entries & np.uint64(BITMAP_OFFSET)
    bad: Mask = (entries & np.uint64(BITMAP_RESERVED)) != 0
    bad |= (offset != 0) & ((entries & np.uint64(BITMAP_ALL_ONES)) != 0)
    bad |= (offset & np.uint64(geometry.cluster_size - 1)) != 0
    return bad
