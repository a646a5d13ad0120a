"""Checksums of many structures at once: no Python loop over them, only over their bytes."""

from __future__ import annotations

from functools import cache

import numpy as np

from planner.arrays import U8, U32

CRC32C = 0x82F63B78
CRC16 = 0xA001
"""The reversed polynomials of Castagnoli's CRC-32 and of the CRC-16 that ext4 has of old."""


@cache
def crc_table(polynomial: int) -> U32:
    """What each byte does to a sum; uint32 (256,)."""
    values = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        values = np.where(values & 1, (values >> 1) ^ np.uint32(polynomial), values >> 1)
    return values.astype(np.uint32)


def crc(rows: U8, seed: U32 | int, polynomial: int = CRC32C) -> U32:
    """Of each row of *rows*, shape (n, bytes), begun with *seed*, one or one a row; uint32.

    As the kernel's `crc32c_le` and `crc16` compute them: nothing is inverted before or after.
    """
    table = crc_table(polynomial)
    value = np.full(len(rows), seed, dtype=np.uint32)
    for column in np.ascontiguousarray(rows.T):
        value = table[(value ^ column) & 0xFF] ^ (value >> np.uint32(8))
    return value


PIECE = 256
"""Bytes of a long row that are computed beside each other."""


def crc_of_long(rows: U8, seed: int, polynomial: int = CRC32C) -> U32:
    """As `crc`, of rows of thousands of bytes.

    The pieces of a row are computed at once and put together afterwards: as many steps as a row has
    pieces and a piece has bytes, not as a row has bytes.
    """
    count, size = rows.shape
    head = size % PIECE
    value = crc(rows[:, :head], seed, polynomial)
    pieces = np.ascontiguousarray(rows[:, head:]).reshape(-1, PIECE)
    parts = crc(pieces, 0, polynomial).reshape(count, -1)
    shift = _shift_of_piece(polynomial)
    for part in range(size // PIECE):
        moved = np.zeros(count, dtype=np.uint32)
        for byte in range(4):
            moved ^= shift[byte][(value >> np.uint32(8 * byte)) & 0xFF]
        value = moved ^ parts[:, part]
    return value


@cache
def _shift_of_piece(polynomial: int) -> list[U32]:
    """What `PIECE` zero bytes make of a value: of each of its four bytes, which do not meddle."""
    zeros = np.zeros((256, PIECE), dtype=np.uint8)
    byte = np.arange(256, dtype=np.uint32)
    return [crc(zeros, byte << np.uint32(8 * place), polynomial) for place in range(4)]
