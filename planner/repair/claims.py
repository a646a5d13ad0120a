"""Whether a cluster that the refcount structure claims, and something else too, holds refcounts.

Where it does not, the claim is wrong, and new refcounts elsewhere take nothing from the other.
Where it does, or that cannot be told, they would leave the other alone with what is not its own:
its loss would not show any more.
"""

from __future__ import annotations

import numpy as np

from planner.arrays import U64
from planner.findings import FindingKind, Owner, Structure
from planner.mismatch import Mismatches
from planner.qcow2 import entries
from planner.qcow2.refcounts import unpack_refcounts
from planner.report import Report
from planner.source import Source, read_bytes

_OWN = {Structure.REFTABLE, Structure.REFBLOCK}

_OWNERS_WEIGHED = 1 << 12
"""Owners of a cluster that are looked at: as many as can be compressed in the largest."""

_ENTRIES_READ = 64
"""Refcount blocks that are looked at to tell whether what leads to them is a refcount table."""

_AGREEING_OF = 8
"""A refcount block says of one cluster in so many, or more, what the census counts."""


def refcounts_are_shared(source: Source, report: Report) -> bool:
    """Whether something else lies where refcounts are, or may be: one has overwritten the other.

    An entry that reads as zeros has nothing where it leads, misaligned as it is.
    """
    contested = report.findings.of(FindingKind.MULTIPLE_OWNERS)
    bits, zeros = report.geometry.cluster_bits, frozenset[tuple[int, int, int]]()
    table_end: int | None = None
    for cluster in (contested.host_offset >> bits).tolist():
        owners = report.owners.of(cluster, limit=_OWNERS_WEIGHED)
        if Structure.DATA in {owner.structure for owner in owners}:
            zeros = zeros or _entries_of_zeros(report)
            owners = [owner for owner in owners if _entry_of(owner) not in zeros]
        structures = {owner.structure for owner in owners}
        if not (structures & _OWN and structures - _OWN):
            continue
        blocks = [owner.index for owner in owners if owner.structure is Structure.REFBLOCK]
        if Structure.REFTABLE in structures:
            table_end = table_end or _end_of_table(source, report)
            if cluster < table_end:
                return True
        if any(_may_be_block(source, report, cluster << bits, block) for block in blocks):
            return True
    return False


_Entry = tuple[int, int, int]


def _entry_of(owner: Owner) -> _Entry:
    return owner.snapshot, owner.l1_index, owner.l2_index


def _entries_of_zeros(report: Report) -> frozenset[_Entry]:
    if report.entries is None:
        return frozenset()
    found = report.entries.of(FindingKind.ZERO_MISALIGNED)
    columns = (found.snapshot.tolist(), found.l1_index.tolist(), found.l2_index.tolist())
    return frozenset(zip(*columns, strict=True))


def _may_be_block(source: Source, report: Report, offset: int, block: int) -> bool:
    """Whether what lies at *offset* may be the refcount block of that index."""
    mismatches, geometry = report.mismatches, report.geometry
    if mismatches is None:
        return True
    raw = np.frombuffer(read_bytes(source, offset, geometry.cluster_size), dtype=np.uint8)
    stored = unpack_refcounts(raw.reshape(1, -1), geometry.refcount_order)[0]
    counted = _counted_in_block(mismatches, block)
    used = (stored != 0) | (counted != 0)
    agreeing = int(np.count_nonzero((stored == counted) & used))
    return agreeing * _AGREEING_OF >= int(np.count_nonzero(used))


def _counted_in_block(mismatches: Mismatches, block: int) -> U64:
    """What the census counts for the clusters of a refcount block, uint64."""
    index, per_block = mismatches.index, mismatches.geometry.refblock_entries
    first = block * per_block
    slots = np.arange(index.slots_before(first), index.slots_before(first + per_block))
    counted = np.zeros(per_block, dtype=np.uint64)
    counted[index.clusters_of(slots) - first] = mismatches.counted[slots]
    return counted


def _end_of_table(source: Source, report: Report) -> int:
    """The cluster at which the refcount table ends: where it is none, nothing behind is either."""
    bits, regions = report.geometry.cluster_bits, report.regions
    table = regions.select(regions.structure == Structure.REFTABLE)
    first, end = int(table.first(bits).min()), int(table.last(bits).max()) + 1
    clusters = range(first, end)
    return next((at for at in clusters if not _may_be_table(source, report, at)), end)


def _may_be_table(source: Source, report: Report, cluster: int) -> bool:
    """Whether what lies in *cluster* may be that part of the refcount table."""
    layout, size = report.layout, report.geometry.cluster_size
    if layout is None:
        return True
    within = cluster * size - layout.header.refcount_table_offset
    if within < 0:
        return True
    words = np.frombuffer(read_bytes(source, cluster * size, size), dtype=">u8").astype(np.uint64)
    used = np.flatnonzero(words)
    if not len(used):
        return within > 0  # The header, at least, has a refcount.
    offset = words[used] & np.uint64(entries.REFTABLE_OFFSET)
    sound = (words[used] & np.uint64(entries.REFTABLE_RESERVED)) == 0
    sound &= (offset % np.uint64(size) == 0) & (offset < np.uint64(layout.file_size))
    blocks = used[sound][:_ENTRIES_READ] + within // 8
    places = offset[sound][:_ENTRIES_READ].astype(np.int64)
    if np.count_nonzero(sound) * 2 < len(used):
        return False
    pairs = zip(places.tolist(), blocks.tolist(), strict=True)
    return any(_may_be_block(source, report, place, block) for place, block in pairs)
