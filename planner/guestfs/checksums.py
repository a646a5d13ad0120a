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


RECORD, BLOCK = 256, 4096
"""Bytes that `crc_before` is asked about, at most: of an inode, of a block."""

AT_ONCE = 1 << 15
"""Bytes that are looked up at once by `crc_before`."""


def crc_before(value: U32, rows: U8) -> U32:
    """What a CRC-32C was begun with that came out as *value* after each of *rows*; uint32 (n,).

    Shape (n, bytes), of which `BLOCK` is the most. A sum is linear: what the bytes did to it goes
    off, and what is left is taken back over as many zeros.
    """
    size = rows.shape[1]
    table = _by_distance(RECORD if size <= RECORD else BLOCK)
    first = np.arange(size - 1, -1, -1) * 256
    left = value.copy()
    step = max(1, AT_ONCE // max(1, size))
    for start in range(0, len(rows), step):
        some = slice(start, start + step)
        left[some] ^= np.bitwise_xor.reduce(table[first + rows[some]], axis=1)
    return _through(_zeros_back(size), left)


@cache
def _by_distance(size: int) -> U32:
    """What each byte does to a sum, behind which so many others follow; (size * 256,)."""
    table = crc_table(CRC32C)
    result = np.empty((size, 256), dtype=np.uint32)
    result[0] = table
    for distance in range(1, size):
        before = result[distance - 1]
        result[distance] = (before >> np.uint32(8)) ^ table[before & 0xFF]
    return result.reshape(-1)


@cache
def _zeros_back(size: int) -> U32:
    """What a sum was before so many zeros, by each of its four bytes; (4, 256)."""
    if size == 0:
        places = np.arange(0, 32, 8, dtype=np.uint32)[:, None]
        return np.arange(256, dtype=np.uint32) << places
    if size % 2 == 0:
        half = _zeros_back(size // 2)
        return _through(half, half)
    value, table = _zeros_back(size - 1), crc_table(CRC32C)
    # Which entry of the table has which highest byte.
    inverse = np.zeros(256, dtype=np.uint32)
    inverse[table >> np.uint32(24)] = np.arange(256, dtype=np.uint32)
    index = inverse[value >> np.uint32(24)]
    before: U32 = (value ^ table[index]) << np.uint32(8) | index
    return before


def _through(tables: U32, value: U32) -> U32:
    """*value* as those tables of its four bytes have it, any shape."""
    result = np.zeros_like(value)
    for place in range(4):
        result ^= tables[place][value >> np.uint32(8 * place) & np.uint32(0xFF)]
    return result
