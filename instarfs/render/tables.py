"""``tables/l1.tsv`` and ``tables/l2/N.tsv``: the active tables, a row an entry.

Neighbours that are all zeros are one row, so that the rows cover the whole disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import numpy as np

from instarfs.render.clusters import findings_label
from instarfs.render.columns import (
    decimals,
    hexadecimals,
    labels,
    remark,
    same,
    tsv,
    tsv_lines,
)
from planner.arrays import I64, U8, U64, Mask
from planner.errors import ImageError
from planner.findings.kinds import BATCH_ROWS, KINDS, NONE
from planner.qcow2 import entries
from planner.qcow2.entries import ClusterType
from planner.views.host_map import kinds_in
from planner.views.table_view import L1Page, L2Page

L1_HEADER = (
    "l1_index",
    "count",
    "guest_offset",
    "guest_length",
    "l2_offset",
    "copied",
    "word",
    "finding",
)
L2_HEADER = (
    "l2_index",
    "count",
    "guest_offset",
    "guest_length",
    "type",
    "host_offset",
    "host_length",
    "copied",
    "word",
    "subclusters",
    "finding",
)

TYPE_LABELS = {
    ClusterType.UNALLOCATED: "unallocated",
    ClusterType.ZERO_PLAIN: "zero",
    ClusterType.ZERO_ALLOC: "zero-allocated",
    ClusterType.NORMAL: "normal",
    ClusterType.COMPRESSED: "compressed",
}


def l1_tsv(page: L1Page | ImageError) -> Iterator[bytes]:
    """The active L1 table."""
    if isinstance(page, ImageError):
        return tsv(L1_HEADER, [remark(str(page))])
    size = page.layout.header.l1_size
    return tsv(L1_HEADER, (_l1_lines(page, *part) for part in _rows_of(page.index, size)))


def _l1_lines(page: L1Page, first: I64, count: I64, used: Mask) -> bytes:
    coverage = page.layout.geometry.l2_coverage
    words, found = np.zeros((2, len(first)), dtype=np.uint64)
    at = np.searchsorted(page.index, first[used])
    words[used], found[used] = page.words[at], page.findings[at]
    offset = (words & np.uint64(entries.L1_OFFSET)).astype(np.int64)
    return tsv_lines(
        decimals(first),
        decimals(count),
        decimals(first * coverage),
        decimals(count * coverage),
        decimals(np.where(offset == 0, NONE, offset)),
        _copied(words),
        hexadecimals(words),
        _findings(found),
    )


def l2_tsv(page: L2Page | ImageError) -> Iterator[bytes]:
    """An L2 table; what is wrong with the L1 entry that leads to it stands above."""
    if isinstance(page, ImageError):
        return tsv(L2_HEADER, [remark(str(page))])
    used = page.words if page.bitmaps is None else page.words | page.bitmaps
    index = np.flatnonzero(used)
    rows = (_l2_lines(page, first, count) for first, count, _ in _rows_of(index, len(used)))
    return tsv(L2_HEADER, chain(_l2_remarks(page), rows))


def _l2_remarks(page: L2Page) -> Iterator[bytes]:
    if not page.offset:
        yield remark(f"L1 entry {page.l1_index} leads to no L2 table")
    for kind in kinds_in(page.l1_findings):
        yield remark(f"L1 entry {page.l1_index}: {kind.label}: {KINDS[kind].meaning}")


def _l2_lines(page: L2Page, first: I64, count: I64) -> bytes:
    geometry, words = page.layout.geometry, page.words[first]
    types = entries.cluster_types(words, geometry)
    bitmaps = same(b"-") if page.bitmaps is None else hexadecimals(page.bitmaps[first])
    guest = first + page.l1_index * geometry.l2_entries
    host, size = entries.host_ranges(words, types, geometry)
    return tsv_lines(
        decimals(first),
        decimals(count),
        decimals(guest << geometry.cluster_bits),
        decimals(count << geometry.cluster_bits),
        labels([TYPE_LABELS[kind] for kind in ClusterType], types),
        decimals(np.where(size == 0, NONE, host)),
        decimals(np.where(size == 0, NONE, size)),
        _copied(words),
        hexadecimals(words),
        bitmaps,
        _findings(page.findings[first]),
    )


# ---- both ----


def _rows_of(index: I64, size: int) -> Iterator[tuple[I64, I64, Mask]]:
    """First index, number of entries, and whether they are in use; of a table of *size* entries.

    *index*: of those in use, which are a row each. What lies between them is a row together.
    """
    position = 0
    for start in range(0, len(index), BATCH_ROWS):
        part = index[start : start + BATCH_ROWS]
        before = np.concatenate(([position], part[:-1] + 1))
        first = np.stack((before, part), axis=1).reshape(-1)
        count = np.stack((part - before, np.ones_like(part)), axis=1).reshape(-1)
        used = np.tile([False, True], len(part))
        yield first[count > 0], count[count > 0], used[count > 0]
        position = int(part[-1]) + 1
    if position < size:
        yield np.array([position]), np.array([size - position]), np.array([False])


def _copied(words: U64) -> U8:
    return labels(["0", "1"], words >= np.uint64(entries.COPIED))


def _findings(found: U64) -> U8:
    kinds, which = np.unique(found, return_inverse=True)
    return labels([findings_label(bits) for bits in kinds.tolist()], which)
