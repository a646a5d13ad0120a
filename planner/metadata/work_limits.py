"""Tables laid over each other, or in the holes of a file: how much of that a check follows.

In a sound image no two tables share a byte. In a hostile one a small file can hold thousands of
tables that all lie in the same place, or where nothing is, each counted on its own: work and memory
are the product of two numbers that an attacker names. QEMU counts for hours; here the check stops.

What else bounds the work on one image, or chooses the way that costs less, is in `Limits`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.arrays import I64, U64, Mask
from planner.source import READABLE_END


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of an image is looked at, kept, or done in which way.

    Of a check: up to ``dense_clusters``, or while the metadata is as large, one counter a cluster
    is cheap. For ``owned_low_clusters`` with too low a refcount their owners are looked up, and
    ``owners`` are kept; a report with more says that it does not list them all, and with 0 none
    is looked for, nor which clusters have two that cannot both be right. Unless ``past_end``, what
    is counted past the end of the file is not looked at, which is in none of the counters, and no
    file is said to be cut off; unless ``overwritten``, nor is it told of tables that they hold
    something else, and unless ``beyond_disk``, nor what is mapped behind the end of the disk, which
    are in none either. Unless ``entry_findings``, what is wrong with L2 entries is not kept, and in
    no counter; what they refer to is counted all the same. Of tables with less than
    ``version_entries``, comparing costs more than counting; versions of a table that differ in more
    than one of ``version_share`` entries are counted one by one.

    Of triage: ``triaged_bytes`` of leaked clusters are looked into; of more, every nth cluster, and
    of ``screened`` the first sector, to find those like tables. ``former_tables`` are described one
    by one; more are counted.

    Of bitmaps: ``bitmap_bytes`` of all of them together are read; each costs ``bitmap_cost`` at
    least.
    """

    dense_clusters: int = 1 << 22
    owned_low_clusters: int = 1 << 12
    owners: int = 1 << 18
    past_end: bool = True
    overwritten: bool = True
    entry_findings: bool = True
    beyond_disk: bool = True
    version_entries: int = 1 << 11
    version_share: int = 8
    triaged_bytes: int = 1 << 30
    screened: int = 1 << 18
    former_tables: int = 1 << 12
    bitmap_bytes: int = 1 << 30
    bitmap_cost: int = 256 << 10


LIMITS = Limits()
"""Those that hold unless a caller has others."""

MAX_TABLE_BYTES = 1 << 30
"""Tables that may lie in holes have no more together: 2^27 entries."""

MAX_LUKS_BYTES = 64 << 20
"""Of a LUKS header no more is counted: one of eight long keys has 2 MiB."""

MAX_SHARED_BYTES = 2 << 20
"""So much of them lies over others, and one more table: 2^18 entries are read again, and its.

No less than the largest cluster: one entry that was damaged leads to a table over two others.
"""


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


def followed_tables(offset: I64 | U64, entries: I64, file_size: int) -> Mask:
    """The same of tables of so many *entries* of 8 bytes, which may lie anywhere at all.

    As their lengths are only claimed, at most `MAX_TABLE_BYTES` of them are followed.
    """
    # What lies past the end of any file shares nothing.
    start = np.minimum(offset, READABLE_END).astype(np.int64)
    end = np.minimum(start + entries * 8, file_size)
    return followed(start, end) & (np.cumsum(np.maximum(end - start, 0)) <= MAX_TABLE_BYTES)
