"""Which clusters of an image are free: those that a clean check proves to be.

Only values here: nothing is read, and nothing is punched.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np

from planner.arrays import I64, distinct
from planner.check.report import Report


def used_clusters(report: Report, *, stored: bool = True) -> I64:
    """The clusters with references; with *stored*, also those with a refcount. Ascending."""
    mismatches = report.mismatches
    if mismatches is None:
        return np.zeros(0, dtype=np.int64)
    used = mismatches.counted != 0
    if stored:
        used |= mismatches.stored[:] != 0
    return mismatches.index.clusters_of(np.flatnonzero(used))


def free_runs(report: Report, size: int, kept: I64) -> tuple[I64, I64]:
    """(offset, length) in bytes of the runs of clusters that nothing uses, in a file of *size*.

    Clusters in *kept* are left out. The check must have been clean: then a cluster that is not in
    its comparison has neither a refcount nor a reference.
    """
    bits = report.geometry.cluster_bits
    clusters = -(-size >> bits) if size else 0
    used = distinct(np.concatenate((used_clusters(report), kept)))
    used = used[used < clusters]
    first = np.concatenate(([0], used + 1))
    end = np.append(used, clusters)
    free = end > first
    offset = first[free] << bits
    return offset, np.minimum(end[free] << bits, size) - offset


def table_of(extents: Iterable[tuple[int, int]]) -> I64:
    """Extents (start, end) as an array, int64 (n, 2)."""
    flat = itertools.chain.from_iterable(extents)
    return np.fromiter(flat, dtype=np.int64).reshape(-1, 2)


def held_within(extents: I64, offset: I64, length: I64) -> int:
    """How many bytes of the runs (offset, length) lie in *extents*, int64 (n, 2), ascending."""
    if not len(extents):
        return 0
    starts, ends = extents[:, 0], extents[:, 1]
    total = np.concatenate(([0], np.cumsum(ends - starts)))

    def below(place: I64) -> I64:
        """How many bytes of all extents lie before each place."""
        index = np.searchsorted(starts, place, side="right")
        overhang = np.maximum(ends[index - 1] - place, 0) * (index > 0)
        before: I64 = total[index] - overhang
        return before

    return int((below(offset + length) - below(offset)).sum())
