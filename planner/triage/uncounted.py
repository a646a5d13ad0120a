"""Clusters whose refcounts are lost, that nothing refers to, and that may hold data.

A leak is seen because its refcount was kept. Where refcounts are gone too, a cluster that lost its
last reference looks free, and a rebuild would make it so: these are as much evidence as leaks are.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from planner.arrays import I64, distinct, is_among, join_ranges
from planner.check.claims import blocks_that_are_none
from planner.check.refcount_comparison import CHUNK, Mismatches
from planner.check.report import Report
from planner.findings.kinds import FindingKind
from planner.metadata.refcounts import Reftable
from planner.source import READABLE_END, Source


def uncounted_clusters(source: Source, report: Report) -> I64:
    """Clusters inside the file that are no hole, have no reference, and whose refcount is lost.

    Ascending, int64. Lost is what cannot be looked up, a run of refcounts of a block that are all
    0, though something there is in use, and what something else lies in the place of, or may.
    There, what is not 0 by chance looks like a leak, and is none of these.
    """
    mismatches, layout = report.mismatches, report.layout
    if mismatches is None or layout is None:
        return np.zeros(0, dtype=np.int64)
    bits = report.geometry.cluster_bits
    found = [np.zeros(0, dtype=np.int64)]
    for first, end in _lost_ranges(source, report):
        length = max(0, min(end, layout.host_clusters) - first)
        found += [
            np.arange(low >> bits, min(first + length, -(-high >> bits)))
            for low, high in source.data_extents(first << bits, length << bits)
        ]
    clusters = distinct(np.concatenate(found))
    clusters = clusters[mismatches.count_references(clusters) == 0]
    slots, known = mismatches.index.find(clusters)
    unused: I64 = clusters[~known | (mismatches.stored[slots] == 0)] if len(clusters) else clusters
    return unused


def blocks_of_nothing(source: Source, report: Report) -> I64:
    """Indices of refcount blocks whose numbers may be no refcounts at all: their cluster is
    something else's too, or something else lies there.
    """
    shared = report.findings.of(FindingKind.REFBLOCK_SHARED).index
    return np.concatenate((shared, blocks_that_are_none(source, report)))


def _lost_ranges(source: Source, report: Report) -> Iterator[tuple[int, int]]:
    """Ranges of clusters (first, end) whose refcounts are lost."""
    mismatches, layout = report.mismatches, report.layout
    if mismatches is None or layout is None:
        return
    per_block = report.geometry.refblock_entries
    table = Reftable(source, layout)
    sound = table.blocks()
    sound = sound[table.offset[sound] >> report.geometry.cluster_bits < layout.host_clusters]
    used = -(-mismatches.first_unused() // per_block)
    others = blocks_of_nothing(source, report)
    # A file of holes may have a thousand million clusters, and no block for any: a few ranges.
    there = table.index[sound][table.index[sound] < used]
    low, high = np.append(0, there + 1), np.append(there, used)
    gaps = low < high
    lost = join_ranges(np.append(low[gaps], others), np.append(high[gaps], others + 1))
    first, end = (column * per_block for column in lost)
    yield from zip(first.tolist(), end.tolist(), strict=True)
    if report.totals.get(FindingKind.REFCOUNT_MISSING):
        blocks = mismatches.blocks(per_block, FindingKind.REFCOUNT_MISSING)
        # Those that are lost as a whole are among them already.
        blocks = blocks[
            np.searchsorted(lost[0], blocks, "right") == np.searchsorted(lost[1], blocks, "right")
        ]
        if len(blocks):
            yield from _zero_runs(mismatches, per_block, blocks)
    if layout.header.dirty:  # where the file grew, nothing was counted yet
        yield mismatches.first_unused(), layout.host_clusters


def _zero_runs(mismatches: Mismatches, per_block: int, blocks: I64) -> Iterator[tuple[int, int]]:
    """Runs of clusters of one of *blocks* without a refcount, where one at least should have some.

    A block that is an older copy of itself ends so, in the middle of a sector.
    """
    empty = mismatches.clusters(FindingKind.REFCOUNT_MISSING, len(mismatches.counted))
    empty = empty[is_among(empty // per_block, blocks)]
    filled = [np.zeros(0, dtype=np.int64)]
    for low, high in mismatches.spans:
        for first in range(low, high, CHUNK):
            part = slice(first, min(high, first + CHUNK))
            bounds = mismatches.index.clusters_of(np.array([part.start, part.stop - 1]))
            # Of other blocks than these nothing matters.
            begin, end = np.searchsorted(blocks, bounds // per_block + (0, 1))
            if begin < end:
                has = first + np.flatnonzero(mismatches.stored[part])
                cluster = mismatches.index.clusters_of(has)
                filled.append(cluster[np.isin(cluster // per_block, blocks[begin:end])])
    full = np.concatenate(filled)
    # Between two that have one: the bounds of a block are as good.
    full = np.concatenate((np.full(1, -1), full, np.full(1, READABLE_END)))
    block, after = empty - empty % per_block, np.searchsorted(full, empty)
    low = np.maximum(block, full[after - 1] + 1)
    high = np.minimum(block + per_block, full[after])
    first = np.diff(low, prepend=-1) != 0
    yield from zip(low[first].tolist(), high[first].tolist(), strict=True)
