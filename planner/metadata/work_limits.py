"""Tables laid over each other, or in the holes of a file: how much of that a check follows.

In a sound image no two tables share a byte. In a hostile one a small file can hold thousands of
tables that all lie in the same place, or where nothing is, each counted on its own: work and memory
are the product of two numbers that an attacker names. QEMU counts for hours; here the check stops.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planner.arrays import I64, Mask
from planner.source import READABLE_END

MAX_TABLE_BYTES = 1 << 30
"""Tables that may lie in holes have no more together: 2^27 entries."""


MAX_SHARED_BYTES = 1 << 20
"""So much of them lies over others, and one more table: 2^17 entries are read again, and its."""


def followed(start: I64, end: I64) -> Mask:
    """Which tables of one sort to look at. Their ranges are in bytes, in any order.

    Those that share no byte are all among them: what is there of them bounds the work.
    """
    chosen: Mask = np.ones(len(start), dtype=np.bool_)
    if len(start) < 2:
        return chosen
    order = np.argsort(start, kind="stable")
    first, last = start[order], end[order]
    reach = np.maximum.accumulate(last)[:-1]
    shared = np.maximum(np.minimum(last[1:], reach) - first[1:], 0)
    # No sum passes 2^63: no sort of table has 2^27 of them, nor any of them 2^32 bytes.
    chosen[order[1:]] &= (shared == 0) | (np.cumsum(shared) - shared < MAX_SHARED_BYTES)
    return chosen


def followed_tables(tables: Sequence[tuple[int, int, int]], file_size: int) -> Mask:
    """The same of tables (number, offset, entries of 8 bytes), which may lie anywhere at all.

    As their lengths are only claimed, at most `MAX_TABLE_BYTES` of them are followed.
    """
    # What lies past the end of any file shares nothing.
    start = np.array([min(offset, READABLE_END) for _, offset, _ in tables], dtype=np.int64)
    size = np.array([entries * 8 for _, _, entries in tables], dtype=np.int64)
    end = np.minimum(start + size, file_size)
    return followed(start, end) & (np.cumsum(np.maximum(end - start, 0)) <= MAX_TABLE_BYTES)
