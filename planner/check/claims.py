"""Whether a cluster that the refcount structure claims, and something else too, holds refcounts.

Where it does not, the claim is wrong, and new refcounts elsewhere take nothing from the other.
Where it does, or that cannot be told, they would leave the other alone with what is not its own:
its loss would not show any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from planner.arrays import I64, is_any_of, without_repeats
from planner.check.refcount_comparison import Mismatches
from planner.check.report import Report
from planner.errors import ParseFailed
from planner.findings.kinds import ACTIVE, FindingKind, Owner, Structure
from planner.metadata.refcounts import Reftable
from planner.qcow2 import entries
from planner.qcow2.layout import Layout
from planner.qcow2.refcounts import unpack_refcounts
from planner.source import READABLE_END, Source, read_bytes

_OWN = {Structure.REFTABLE, Structure.REFBLOCK}

_OWNERS_WEIGHED = 1 << 12
"""Owners of a cluster that are looked at: as many as can be compressed in the largest."""

_ENTRIES_READ = 64
"""Refcount blocks that are looked at to tell whether what leads to them is a refcount table."""

_AGREEING_OF = 8
"""A refcount block says of one cluster in so many, or more, what the census counts."""

_BLOCKS_READ = 1 << 14
"""Refcount blocks with a wrong refcount that are looked into."""


def refcounts_are_shared(source: Source, report: Report) -> bool:
    """Whether something else lies where refcounts are, or may be: one has overwritten the other.

    An entry that reads as zeros has nothing where it leads, misaligned as it is.
    """
    if report.layout is None or report.mismatches is None:
        return len(report.findings.of(FindingKind.MULTIPLE_OWNERS)) > 0
    return next(_shared(source, report, report.layout, report.mismatches), None) is not None


def shared_refcounts(source: Source, report: Report) -> I64:
    """The clusters in which they are, ascending."""
    if report.layout is None or report.mismatches is None:
        return np.zeros(0, dtype=np.int64)
    return np.array([*_shared(source, report, report.layout, report.mismatches)], dtype=np.int64)


def _shared(
    source: Source, report: Report, layout: Layout, mismatches: Mismatches
) -> Iterator[int]:
    contested = report.findings.of(FindingKind.MULTIPLE_OWNERS)
    claims, bits = _Claims(source, report, layout, mismatches), report.geometry.cluster_bits
    of_refcounts = np.isin(report.owners.structure, list(_OWN))
    claimed = without_repeats(report.owners.cluster[of_refcounts])
    for cluster in claimed[is_any_of(claimed, contested.host_offset >> bits)].tolist():
        owners = report.owners.of(cluster, limit=_OWNERS_WEIGHED)
        own = [owner for owner in owners if owner.structure in _OWN]
        others = (owner for owner in owners if owner.structure not in _OWN)
        is_claimed = bool(own) and any(map(claims.is_real, others))
        if is_claimed and any(claims.may_hold(cluster, owner) for owner in own):
            yield cluster


def blocks_that_are_none(source: Source, report: Report) -> I64:
    """Indices of refcount blocks in whose place something else lies: their refcounts are lost."""
    if report.layout is None or report.mismatches is None:
        return np.zeros(0, dtype=np.int64)
    claims = _Claims(source, report, report.layout, report.mismatches)
    return claims.blocks_that_are_none()


def place_of_entry(source: Source, report: Report, owner: Owner) -> int:
    """Where in the file the L2 entry is by which *owner*, a guest cluster, has what it has.

    Several snapshots may have one entry in common.
    """
    if report.layout is None:
        raise ParseFailed(str(report.error))
    header, of_snapshot = report.layout.header, owner.snapshot != ACTIVE
    table = report.snapshots[owner.snapshot] if of_snapshot else header
    word = read_bytes(source, table.l1_table_offset + 8 * owner.l1_index, 8)
    l2_offset = int.from_bytes(word, "big") & entries.L1_OFFSET
    return l2_offset + owner.l2_index * report.geometry.l2_entry_size


class _Claims:
    """What the refcount structure of one image says of where it lies."""

    def __init__(
        self, source: Source, report: Report, layout: Layout, mismatches: Mismatches
    ) -> None:
        self._source, self._report = source, report
        self._layout, self._mismatches = layout, mismatches
        self._geometry = layout.geometry

    def is_real(self, owner: Owner) -> bool:
        """Whether an owner has anything where it leads."""
        if owner.structure is not Structure.DATA:
            return True
        return place_of_entry(self._source, self._report, owner) not in self._zeros

    @cached_property
    def _zeros(self) -> frozenset[int]:
        """Where the entries are that read as zeros."""
        if self._report.entries is None:
            return frozenset()
        found = self._report.entries.of(FindingKind.ZERO_MISALIGNED)
        return frozenset(found.host_offset.tolist())

    def may_hold(self, cluster: int, owner: Owner) -> bool:
        """Whether *cluster* may be the refcount block, or in the table, that *owner* says it is."""
        if owner.structure is Structure.REFTABLE:
            return cluster < self._end_of_table
        entry = self._layout.header.refcount_table_offset + 8 * owner.index
        if entry >> self._geometry.cluster_bits >= self._end_of_table:
            return False
        return self._may_be_block(cluster << self._geometry.cluster_bits, owner.index)

    @cached_property
    def _end_of_table(self) -> int:
        """The cluster at which the table ends: where it is none, nothing behind is either."""
        bits, regions = self._geometry.cluster_bits, self._report.regions
        table = regions.select(regions.structure == Structure.REFTABLE)
        if not len(table.offset):
            return READABLE_END  # It reaches past the end of the file, and was not counted.
        first, end = int(table.first(bits).min()), int(table.last(bits).max()) + 1
        answers = [self._is_table(cluster) for cluster in range(first, end)]
        if False not in answers:
            return end
        # Its length is wrong: it goes no further than there is something in it.
        return first + next(at for at, answer in enumerate(answers) if not answer)

    def _is_table(self, cluster: int) -> bool | None:
        """Whether *cluster* looks like its part of the refcount table; None where it is empty."""
        size = self._geometry.cluster_size
        within = cluster * size - self._layout.header.refcount_table_offset
        raw = read_bytes(self._source, cluster * size, size)
        words = np.frombuffer(raw, dtype=">u8").astype(np.uint64)
        used = np.flatnonzero(words)
        if not len(used):
            return None if within else False  # The header, at least, has a refcount.
        offset = words[used] & np.uint64(entries.REFTABLE_OFFSET)
        sound = (words[used] & np.uint64(entries.REFTABLE_RESERVED)) == 0
        sound &= offset % np.uint64(size) == 0
        sound &= offset < np.uint64(self._layout.file_size)
        if np.count_nonzero(sound) * 2 < len(used):
            return False
        blocks = used[sound][:_ENTRIES_READ] + within // 8
        places = offset[sound][:_ENTRIES_READ].astype(np.int64)
        pairs = zip(places.tolist(), blocks.tolist(), strict=True)
        return any(self._may_be_block(place, block) for place, block in pairs)

    def _may_be_block(self, offset: int, block: int) -> bool:
        """Whether what lies at *offset* may be the refcount block of that index.

        It goes by the clusters that are in use: others may leak. Behind the end of a file that is
        whole there are none, and no refcounts.
        """
        index, per_block = self._mismatches.index, self._geometry.refblock_entries
        size, first = self._geometry.cluster_size, block * per_block
        raw = np.frombuffer(read_bytes(self._source, offset, size), dtype=np.uint8)
        stored = unpack_refcounts(raw.reshape(1, -1), self._geometry.refcount_order)[0]
        slots = np.arange(index.slots_before(first), index.slots_before(first + per_block))
        counted = self._mismatches.counted[slots]
        inside = index.clusters_of(slots[counted != 0]) - first
        agreeing = int(np.count_nonzero(stored[inside] == counted[counted != 0]))
        used = len(inside)
        if not self._is_cut:
            behind = max(0, self._layout.host_clusters + 1 - first)
            used += int(np.count_nonzero(stored[behind:]))
        return agreeing * _AGREEING_OF >= used

    @cached_property
    def _is_cut(self) -> bool:
        """Whether the file seems to have been longer."""
        lost = {FindingKind.PAST_END, FindingKind.CUT_OFF}
        return bool(lost & self._report.counts().keys())

    def blocks_that_are_none(self) -> I64:
        """Indices of the refcount blocks in whose place something else lies.

        Only in those with a wrong refcount; of very many, all behind the first are taken for one.
        """
        per_block, table = self._geometry.refblock_entries, Reftable(self._source, self._layout)
        kinds = (FindingKind.LEAK, FindingKind.REFCOUNT_LOW, FindingKind.REFCOUNT_MISSING)
        wrong = self._mismatches.blocks(per_block, *kinds)
        sound = table.blocks()
        known, at, _ = np.intersect1d(table.index[sound], wrong, return_indices=True)
        places = table.offset[sound[at]][:_BLOCKS_READ]
        pairs = zip(places.tolist(), known.tolist(), strict=False)
        none = [block for place, block in pairs if not self._may_be_block(place, block)]
        return np.concatenate((np.array(none, dtype=np.int64), known[_BLOCKS_READ:]))
