"""Refcount blocks in all seven widths.

Widths of a byte and more are big-endian; narrower ones pack from the least significant bit of each
byte. Source: docs/interop/qcow2.txt, "Refcount block entry".
"""

from __future__ import annotations

from functools import cache

import numpy as np

from planner.arrays import I64, U8, Counts

_WIDE = {3: "u1", 4: ">u2", 5: ">u4", 6: ">u8"}


def unpack_refcounts(blocks: U8, order: int) -> Counts:
    """All refcounts of refcount blocks, native order, in the smallest dtype that holds the width.

    *blocks* is uint8 of shape (..., cluster_size); the result has shape (..., refblock_entries).
    *order* is log2 of the width in bits, 0 to 6.
    """
    if order in _WIDE:
        wide = np.ascontiguousarray(blocks).view(_WIDE[order])
        return wide.astype(wide.dtype.newbyteorder("="), copy=False)
    if order == 0:
        return np.unpackbits(blocks, axis=-1, bitorder="little")
    # A word for each byte, of a refcount a byte: far faster than shifting each byte several times.
    return _words_of_bytes(order)[blocks].view(np.uint8)


@cache
def _words_of_bytes(order: int) -> np.ndarray:
    """For each value of a byte the refcounts in it, a byte each, as one word; *order* is 1 or 2."""
    width = 1 << order
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    each = np.arange(256, dtype=np.uint8)[:, None] >> shifts & np.uint8((1 << width) - 1)
    return np.ascontiguousarray(each).view(f"u{8 // width}").reshape(-1)


def pack_refcounts(refcounts: Counts, order: int) -> U8:
    """The inverse of `unpack_refcounts`; every value must fit its width."""
    if order in _WIDE:
        return np.ascontiguousarray(refcounts.astype(_WIDE[order])).view(np.uint8)
    if order == 0:
        return np.packbits(refcounts.astype(np.uint8), axis=-1, bitorder="little")
    width = 1 << order
    per_byte = 8 // width
    fields = refcounts.astype(np.uint8).reshape(*refcounts.shape[:-1], -1, per_byte)
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    packed: U8 = np.bitwise_or.reduce(fields << shifts, axis=-1)
    return packed


def read_refcount_in_block(block: U8, indices: I64, order: int) -> Counts:
    """The refcounts at *indices* of one refcount block (uint8, flat), or of several in a row.

    No others are unpacked: a block of 2 MiB has 16 million.
    """
    if order in _WIDE:
        wide = np.ascontiguousarray(block).view(_WIDE[order])[indices]
        return wide.astype(wide.dtype.newbyteorder("="), copy=False)
    bit = indices << order
    found: Counts = block[bit >> 3] >> (bit & 7).astype(np.uint8)
    return found & np.uint8((1 << (1 << order)) - 1)


def count_from(block: U8, first: int, order: int) -> int:
    """How many refcounts of a block (uint8, flat) from number *first* on are not 0."""
    if order in _WIDE:
        return int(np.count_nonzero(np.ascontiguousarray(block).view(_WIDE[order])[first:]))
    byte, before = divmod(first, 8 >> order)
    rest = block[byte:]
    used = int(_used_in_bytes(order)[rest[rest != 0]].sum(dtype=np.int64))
    return used - int(np.count_nonzero(unpack_refcounts(block[byte : byte + 1], order)[:before]))


@cache
def _used_in_bytes(order: int) -> U8:
    """How many of the refcounts in each value of a byte are not 0; *order* is 0 to 2."""
    each = unpack_refcounts(np.arange(256, dtype=np.uint8)[:, None], order)
    used: U8 = np.count_nonzero(each, axis=1).astype(np.uint8)
    return used


def counts_from(block: U8, first: int, order: int) -> bool:
    """Whether any refcount of a block (uint8, flat) from number *first* on is not 0."""
    byte, bit = divmod(first << order, 8)
    rest = block[byte:]
    return bool(len(rest) and (rest[0] >> bit or rest[1:].any()))
