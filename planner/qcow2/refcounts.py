"""Refcount blocks in all seven widths.

Widths of a byte and more are big-endian; narrower ones pack from the least significant bit of each
byte. Source: docs/interop/qcow2.txt, "Refcount block entry".
"""

from __future__ import annotations

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
    width = 1 << order
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    fields = (blocks[..., None] >> shifts) & np.uint8((1 << width) - 1)
    return fields.reshape(*blocks.shape[:-1], -1)


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
    """The refcounts at *indices* of one refcount block (uint8, one cluster)."""
    return unpack_refcounts(block, order)[indices]
