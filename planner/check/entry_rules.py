"""What is wrong with L1 and L2 words in themselves: for showing a table, entry by entry.

A check judges the same while it counts, and reports in columns; this gives each word the kinds of
its findings, without a check, from the table and the stored refcounts alone. What only shows when
all references are counted is not here. A set of kinds is a number with their bits, uint64.
"""

from __future__ import annotations

import numpy as np

from planner.arrays import U64, Mask
from planner.findings.kinds import FindingKind
from planner.metadata.refcounts import StoredRefcounts
from planner.qcow2 import entries
from planner.qcow2.entries import ClusterType
from planner.qcow2.layout import Layout


def judge_l1(words: U64, layout: Layout, stored: StoredRefcounts) -> U64:
    """The kinds of findings about words of the active L1 table."""
    geometry = layout.geometry
    offset = entries.l1_offsets(words)
    beyond = layout.is_past_end(offset, geometry.cluster_size)
    leads = words != 0
    wrong = _copied_is_wrong(words, offset >> geometry.cluster_bits, stored)
    return _gather(
        len(words),
        (FindingKind.L1_ENTRY_RESERVED, (words & np.uint64(entries.L1_RESERVED)) != 0),
        (FindingKind.L2_TABLE_MISALIGNED, offset % geometry.cluster_size != 0),
        (FindingKind.PAST_END, leads & beyond),
        (FindingKind.L1_COPIED, (offset != 0) & wrong),
    )


def judge_l2(words: U64, bitmaps: U64 | None, layout: Layout, stored: StoredRefcounts) -> U64:
    """The kinds of findings about L2 entries of the active disk, and their subcluster *bitmaps*."""
    geometry = layout.geometry
    types = entries.cluster_types(words, geometry)
    subclusters = np.zeros(len(words), dtype=np.uint64) if bitmaps is None else bitmaps
    packed, nowhere = types == ClusterType.COMPRESSED, types == ClusterType.UNALLOCATED
    data, is_zero = entries.has_host_cluster(types), entries.reads_as_zeros(types)
    allocated = (subclusters & np.uint64(entries.SUBCLUSTERS_ALLOCATED)) != 0
    both = ((subclusters >> np.uint64(32)) & subclusters) != 0
    offset = entries.l2_offsets(words)
    misaligned = data & (offset % geometry.cluster_size != 0)
    holds_data = types == ClusterType.NORMAL if bitmaps is None else allocated
    counted = packed & (subclusters == 0)
    beyond = layout.is_past_end(*entries.host_ranges(words, types, geometry))
    if geometry.external_data:
        beyond[:] = False
        wrong = words < np.uint64(entries.COPIED)
    else:
        wrong = _copied_is_wrong(words, offset >> geometry.cluster_bits, stored)
    found = _gather(
        len(words),
        (FindingKind.L2_ENTRY_RESERVED, ~packed & ((words & np.uint64(entries.L2_RESERVED)) != 0)),
        (FindingKind.UNALLOCATED_SUBCLUSTERS, nowhere & allocated),
        (FindingKind.ZERO_IN_VERSION_2, is_zero & (geometry.version < 3)),
        (FindingKind.COMPRESSED_COPIED, packed & (words >= np.uint64(entries.COPIED))),
        (FindingKind.SUBCLUSTER_CONFLICT, data & both),
        (FindingKind.DATA_MISALIGNED, misaligned & holds_data),
        (FindingKind.ZERO_MISALIGNED, misaligned & ~holds_data),
        (FindingKind.PAST_END, (counted | data) & beyond),
        (FindingKind.L2_COPIED, data & wrong),
    )
    if geometry.external_data:
        return found | _gather(len(words), (FindingKind.COMPRESSED_WITH_DATA_FILE, packed))
    broken = packed & (subclusters != 0)
    return found | _gather(len(words), (FindingKind.COMPRESSED_SUBCLUSTERS, broken))


def _copied_is_wrong(words: U64, clusters: np.ndarray, stored: StoredRefcounts) -> Mask:
    """Where the COPIED flag contradicts a stored refcount that can be looked up."""
    wrong: Mask = stored.is_one(clusters) != (words >= np.uint64(entries.COPIED))
    unreadable = stored.unreadable(clusters)
    return wrong if unreadable is None else wrong & ~unreadable


def _gather(count: int, *marks: tuple[FindingKind, Mask]) -> U64:
    found = np.zeros(count, dtype=np.uint64)
    for kind, mask in marks:
        found[mask] |= np.uint64(1 << kind)
    return found
