"""Which clusters of an image are free: those that a clean check proves to be.

Only values here: nothing is read, and nothing is punched.
"""

from __future__ import annotations

import numpy as np

from planner.arrays import I64, distinct
from planner.report import Report


def used_clusters(report: Report, *, stored: bool = True) -> I64:
    """The clusters with references; with *stored*, also those with a refcount. Ascending."""
    mismatches = report.mismatches
    if mismatches is None:
        return np.zeros(0, dtype=np.int64)
    used = mismatches.counted != 0
    if stored:
        used |= mismatches.stored != 0
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
