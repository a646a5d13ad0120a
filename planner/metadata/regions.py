"""Metadata structures as byte ranges of the file, and counting them.

A region list knows where every structure lies that is not a guest's cluster; it does not read them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.arrays import I32, I64, U8, Mask, distinct, distinct_columns, expand_ranges
from planner.findings.grouped import FindingsBuilder
from planner.findings.kinds import NONE, NOWHERE, FindingKind, Structure
from planner.metadata.cluster_counters import ClusterCounts, ClusterIndex
from planner.qcow2.layout import Layout


@dataclass(frozen=True, slots=True)
class Regions:
    """Structures in columns. ``offset``, ``size``: bytes. ``weight``: how often each is counted.

    ``snapshot``, ``l1_index``, ``index``: as in `planner.check.report.Findings`.
    """

    structure: U8
    offset: I64
    size: I64
    weight: I64
    snapshot: I32
    l1_index: I64
    index: I64

    def select(self, which: Mask | I64) -> Regions:
        return Regions(*(getattr(self, name)[which] for name in self.__slots__))

    def first(self, cluster_bits: int) -> I64:
        """First cluster of each region."""
        return self.offset >> cluster_bits

    def last(self, cluster_bits: int) -> I64:
        """Last cluster of each region."""
        return (self.offset + self.size - 1) >> cluster_bits


def make_regions(
    structure: Structure | I64,
    offset: I64,
    size: I64 | int,
    *,
    weight: I64 | int = 1,
    snapshot: I32 | int = NOWHERE,
    l1_index: I64 | int = NONE,
    index: I64 | int = NONE,
) -> Regions:
    """Structures at *offset*; the other columns broadcast."""

    def column(value: object, dtype: type[np.generic]) -> np.ndarray:
        return np.broadcast_to(np.asarray(value).astype(dtype), offset.shape)

    return Regions(
        column(structure, np.uint8),
        offset,
        column(size, np.int64),
        column(weight, np.int64),
        column(snapshot, np.int32),
        column(l1_index, np.int64),
        column(index, np.int64),
    )


def join_regions(*parts: Regions) -> Regions:
    """All structures of *parts*, in that order."""
    return Regions(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in Regions.__slots__)
    )


def no_regions() -> Regions:
    """Columns without rows."""
    return make_regions(Structure.HEADER, np.zeros(0, dtype=np.int64), 0)


class RegionsBuilder:
    """Collects structures, and reports those that do not lie in the file."""

    def __init__(self, layout: Layout, findings: FindingsBuilder) -> None:
        self._layout, self._findings = layout, findings
        self._parts: list[Regions] = []
        self._single: list[tuple[int, int, int, int, int]] = []

    def add(
        self,
        structure: Structure,
        offset: int,
        size: int,
        *,
        snapshot: int = NOWHERE,
        index: int = NONE,
    ) -> None:
        """One structure. *offset* and *size* are Python's ints: a header can claim any 64 bits."""
        if size <= 0:
            return
        top = (1 << 63) - 1
        if offset + size > top:
            self._findings.add(
                FindingKind.PAST_END,
                structure=structure,
                host_offset=min(offset, top),
                length=min(size, top),
                snapshot=snapshot,
                index=index,
                found=offset,
            )
            return
        # Of snapshots and bitmaps there may be very many: they become arrays together.
        self._single.append((structure, offset, size, snapshot, index))

    def add_many(
        self,
        structure: Structure,
        offset: I64,
        size: I64 | int,
        *,
        weight: I64 | int = 1,
        snapshot: I32 | int = NOWHERE,
        l1_index: I64 | int = NONE,
        index: I64 | int = NONE,
    ) -> None:
        """Structures of one kind, none further than any file goes; other columns broadcast."""
        self._gather()
        added = make_regions(
            structure,
            offset,
            size,
            weight=weight,
            snapshot=snapshot,
            l1_index=l1_index,
            index=index,
        )
        self._add(added)

    def _gather(self) -> None:
        """Take in what was added one by one."""
        if self._single:
            structure, offset, size, snapshot, index = np.array(self._single, dtype=np.int64).T
            self._single.clear()
            self._add(make_regions(structure, offset, size, snapshot=snapshot, index=index))

    def _add(self, added: Regions) -> None:
        beyond = self._layout.is_past_end(added.offset, added.size)
        if beyond.any():
            self._report(added.select(beyond))
            added = added.select(~beyond)
        self._parts.append(added)

    def _report(self, regions: Regions) -> None:
        coverage = self._layout.geometry.l2_coverage
        for structure in map(Structure, distinct(regions.structure.astype(np.int64)).tolist()):
            lost = regions.select(regions.structure == structure)
            maps = structure is Structure.L2_TABLE
            self._findings.add(
                FindingKind.PAST_END,
                structure=structure,
                count=lost.weight,
                host_offset=lost.offset,
                length=lost.size,
                snapshot=lost.snapshot,
                l1_index=lost.l1_index,
                index=lost.index,
                guest_offset=lost.l1_index * coverage if maps else NONE,
                guest_length=coverage if maps else 0,
                found=lost.offset,
            )

    def build(self) -> Regions:
        """All structures inside the file."""
        self._gather()
        return join_regions(*self._parts)


def count_regions(
    regions: Regions, cluster_bits: int, index: ClusterIndex, counts: ClusterCounts
) -> None:
    """Add each region's weight to the clusters that it touches."""
    first, last = regions.first(cluster_bits), regions.last(cluster_bits)
    single = first == last
    for weight in distinct(regions.weight[single]).tolist():
        counts.add(index.slots_of(first[single & (regions.weight == weight)]), weight)
    # Tables that claim the same place count together: of these there may be thousands.
    spans, weights = np.stack((first[~single], last[~single])), regions.weight[~single]
    (low, high), which = distinct_columns(spans)
    summed = np.zeros(len(low), dtype=np.int64)
    np.add.at(summed, which, weights)
    for slot, length, weight in zip(
        index.slots_of(low).tolist(), (high - low + 1).tolist(), summed.tolist(), strict=True
    ):
        counts.add_run(slot, length, weight)


def overlapping_clusters(regions: Regions, cluster_bits: int) -> I64:
    """Clusters that more than one region touches."""
    order = np.lexsort((regions.last(cluster_bits), regions.first(cluster_bits)))
    first = regions.first(cluster_bits)[order]
    last = regions.last(cluster_bits)[order]
    reach = np.maximum.accumulate(last)
    hit = np.flatnonzero(first[1:] <= reach[:-1]) + 1
    if not len(hit):
        return np.zeros(0, dtype=np.int64)
    low, high = first[hit], np.minimum(last[hit], reach[hit - 1])
    # What the ones before have not covered: every cluster once, however many structures share it.
    low[1:] = np.maximum(low[1:], np.maximum.accumulate(high)[:-1] + 1)
    new = low <= high
    return expand_ranges(low[new], high[new])
