"""L1, L2, refcount-table and bitmap-table words: masks, types and their accessors over arrays.

Which of them are wrong is the business of `planner.check.entry_rules`. Source:
docs/interop/qcow2.txt, "L1 table entry", "L2 table entry", "Refcount table entry", "Bitmap table".
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np

from planner.arrays import I64, U8, U64, Mask
from planner.qcow2.geometry import SECTOR, Geometry

COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1

L1_OFFSET = 0x00FF_FFFF_FFFF_FE00
L1_RESERVED = 0x7F00_0000_0000_01FF

UNREADABLE = L1_OFFSET
"""An L1 entry that leads where no cluster is: what it maps cannot be read, by QEMU either, but for
clusters of 512 bytes. A rescue has it where a lost table may belong."""

L2_OFFSET = 0x00FF_FFFF_FFFF_FE00
L2_RESERVED = 0x3F00_0000_0000_01FE

LEAST_PACKED_BITS = 62 - (21 - 8)
"""Bits of where compressed data begins, with the largest clusters."""

REFTABLE_OFFSET = 0xFFFF_FFFF_FFFF_FE00
REFTABLE_RESERVED = 0x1FF

BITMAP_OFFSET = 0x00FF_FFFF_FFFF_FE00
BITMAP_RESERVED = 0xFF00_0000_0000_01FE
BITMAP_ALL_ONES = 1

SUBCLUSTERS_ALLOCATED = 0x0000_0000_FFFF_FFFF
SUBCLUSTERS_ZERO = 0xFFFF_FFFF_0000_0000

NO_HOST = -5
"""The host offset of what has none; neither a number of `planner.findings.kinds` nor of a guest."""


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


def bitmaps_of(words: U64, bitmaps: U64 | None) -> U64:
    """The subcluster bitmaps of L2 entries: zeros where these are not extended (None)."""
    return (
        np.broadcast_to(np.zeros(1, dtype=np.uint64), words.shape) if bitmaps is None else bitmaps
    )


@dataclass(frozen=True)
class L2Entries:
    """L2 entries in columns, and what they say by themselves: worked out when it is asked for.

    ``word``: uint64, 1-D. ``bitmap``: subcluster bitmaps, see `bitmaps_of`. What is true of an
    entry is a mask; whether it may be is the business of `planner.check.entry_rules`, and whether
    it can be read all the same that of `planner.guest.mapping`.
    """

    geometry: Geometry
    word: U64
    bitmap: U64

    @cached_property
    def nowhere(self) -> Mask:
        """No entry at all."""
        return np.zeros(self.word.shape, dtype=np.bool_)

    @cached_property
    def types(self) -> U8:
        """`ClusterType` of each."""
        return cluster_types(self.word, self.geometry)

    @cached_property
    def has_cluster(self) -> Mask:
        return has_host_cluster(self.types)

    @cached_property
    def is_compressed(self) -> Mask:
        compressed: Mask = self.types == ClusterType.COMPRESSED
        return compressed

    @property
    def copied(self) -> Mask:
        return self.word >= np.uint64(COPIED)

    @cached_property
    def _ranges(self) -> tuple[I64, I64]:
        return host_ranges(self.word, self.types, self.geometry)

    @property
    def offset(self) -> I64:
        """As `host_ranges` has it."""
        return self._ranges[0]

    @property
    def size(self) -> I64:
        return self._ranges[1]

    @property
    def has_reserved_bits(self) -> Mask:
        """Compressed entries have none: their bits all say where they are, and how long."""
        reserved: Mask = (self.word & np.uint64(L2_RESERVED)) != 0
        reserved &= ~self.is_compressed
        return reserved

    @property
    def is_zero_in_version_2(self) -> Mask:
        """The zero flag came with version 3."""
        return reads_as_zeros(self.types) if self.geometry.version < 3 else self.nowhere

    @property
    def is_compressed_elsewhere(self) -> Mask:
        """Data files hold nothing that is compressed."""
        return self.is_compressed if self.geometry.external_data else self.nowhere

    @cached_property
    def is_misaligned(self) -> Mask:
        """Whose cluster does not begin where one can."""
        misaligned: Mask = (self.offset & (self.geometry.cluster_size - 1)) != 0
        misaligned &= self.has_cluster
        return misaligned

    @cached_property
    def has_subclusters(self) -> Mask:
        """Which have allocated subclusters."""
        if not self.geometry.extended_l2:
            return self.nowhere
        allocated: Mask = (self.bitmap & np.uint64(SUBCLUSTERS_ALLOCATED)) != 0
        return allocated

    @property
    def holds_data(self) -> Mask:
        """Which have anything in their cluster that the guest reads."""
        if self.geometry.extended_l2:
            return self.has_cluster & self.has_subclusters
        data: Mask = self.types == ClusterType.NORMAL
        return data

    @property
    def has_subclusters_without_cluster(self) -> Mask:
        """What is allocated has nowhere to be."""
        without: Mask = self.types == ClusterType.UNALLOCATED
        without &= self.has_subclusters
        return without

    @property
    def has_subcluster_conflict(self) -> Mask:
        """A subcluster is allocated, and reads as zeros."""
        if not self.geometry.extended_l2:
            return self.nowhere
        conflict: Mask = ((self.bitmap >> np.uint64(32)) & self.bitmap) != 0
        conflict &= self.has_cluster
        return conflict
