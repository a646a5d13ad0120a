"""Stored refcounts against counted references, cluster by cluster, told in runs.

The two arrays are kept as they are; runs are made when somebody reads them, a bounded part at a
time, so that sixteen million scattered leaks cost no more than sixteen million clusters without.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planner.arrays import I64, U8, Counts, Mask, without_repeats
from planner.findings.kinds import FindingKind, Findings, Structure, make_findings
from planner.findings.runs import Columns, join_parts, merge_runs
from planner.metadata.cluster_counters import ClusterIndex, NearOne
from planner.qcow2.geometry import Geometry

CHUNK = 1 << 18
NO_KIND = 255


@dataclass(frozen=True, slots=True)
class Mismatches:
    """``stored``, ``counted``: one number a slot of ``index``. ``spans``: (first, end) slots whose
    stored refcount could be looked up, ascending.
    """

    geometry: Geometry
    index: ClusterIndex
    stored: NearOne
    counted: Counts
    spans: tuple[tuple[int, int], ...]

    def totals(self) -> dict[FindingKind, int]:
        """How many clusters there are of each kind."""
        return self._totals(
            FindingKind.LEAK, FindingKind.REFCOUNT_LOW, FindingKind.REFCOUNT_MISSING
        )

    def _totals(self, *kinds: FindingKind) -> dict[FindingKind, int]:
        totals = dict.fromkeys(kinds, 0)
        for _, stored, counted in self._chunks():
            if not np.array_equal(stored, counted):
                for kind in kinds:
                    totals[kind] += int(np.count_nonzero(_is_of(kind, stored, counted)))
        return totals

    def highest(self) -> int:
        """The last cluster that has a refcount or a reference; 0 where none has."""
        for low, high in reversed(self.spans):
            for end in range(high, low, -CHUNK):
                part = slice(max(low, end - CHUNK), end)
                used = np.flatnonzero((self.stored[part] != 0) | (self.counted[part] != 0))
                if len(used):
                    last = np.array([part.start + int(used[-1])])
                    return int(self.index.clusters_of(last)[0])
        return 0

    def first_unused(self) -> int:
        """The first cluster that neither it nor any behind it has a reference or a refcount.

        Unlike `highest` it believes references also where no refcount can be looked up.
        """
        for end in range(len(self.counted), 0, -CHUNK):
            low = max(0, end - CHUNK)
            referenced = np.flatnonzero(self.counted[low:end])[-1:]
            if len(referenced):
                return max(self.highest(), int(self.index.clusters_of(low + referenced)[0])) + 1
        return self.highest() + 1

    def count_references(self, clusters: I64) -> Counts:
        """How many references were counted to each of *clusters*."""
        counted = np.zeros(len(clusters), dtype=self.counted.dtype)
        if self.index.slots:
            for start in range(0, len(clusters), CHUNK):
                part = slice(start, start + CHUNK)
                slots, known = self.index.find(clusters[part])
                counted[part] = np.where(known, self.counted[slots], 0)
        return counted

    def runs(self, *kinds: FindingKind) -> Iterator[Findings]:
        """Findings of these kinds, in file order, a bounded number at a time.

        A run of neighbours with the same two numbers is one finding.
        """
        wanted = np.array(kinds, dtype=np.uint8)
        for columns in join_parts(self._runs(wanted)):
            yield self._findings(*columns)

    def _runs(self, wanted: U8) -> Iterator[Columns]:
        """Cluster, length, kind, stored, counted."""
        for first, stored, counted in self._chunks():
            kind = kinds_of(stored, counted)
            at = np.flatnonzero(np.isin(kind, wanted))
            cluster = self.index.clusters_of(first + at)
            yield merge_runs(cluster, np.ones_like(cluster), kind[at], stored[at], counted[at])

    def clusters(self, kind: FindingKind, limit: int) -> I64:
        """The first clusters of a kind, at most *limit*."""
        found = np.zeros(min(limit, self._totals(kind)[kind]), dtype=np.int64)
        filled = 0
        for first, stored, counted in self._chunks():
            if filled == len(found):
                break
            at = np.flatnonzero(_is_of(kind, stored, counted))[: len(found) - filled]
            found[filled : filled + len(at)] = self.index.clusters_of(first + at)
            filled += len(at)
        return found

    def blocks(self, per_block: int, *kinds: FindingKind) -> I64:
        """Indices of the refcount blocks, of *per_block* clusters, with clusters of these kinds."""
        found = [np.zeros(0, dtype=np.int64)]
        for first, stored, counted in self._chunks():
            if not np.array_equal(stored, counted):
                wrong = np.zeros(len(stored), dtype=np.bool_)
                for kind in kinds:
                    wrong |= _is_of(kind, stored, counted)
                at = np.flatnonzero(wrong)
                found.append(without_repeats(self.index.clusters_of(first + at) // per_block))
        return without_repeats(np.concatenate(found))

    def between(self, first: int, end: int) -> tuple[I64, U8, Counts, Counts]:
        """The wrong clusters in [first, end): cluster, kind, stored, counted."""
        low, high = self.index.slots_before(first), self.index.slots_before(end)
        stored, counted = self.stored[low:high], self.counted[low:high]
        kind = kinds_of(stored, counted)
        wrong = kind != NO_KIND
        wrong &= self.readable(low, high)
        at = np.flatnonzero(wrong)
        return self.index.clusters_of(low + at), kind[at], stored[at], counted[at]

    def agree(self, clusters: I64) -> Mask:
        """Which of *clusters* have the refcount that they should, or none that can be looked up."""
        if not self.index.slots or not self.spans:
            return np.ones(len(clusters), dtype=np.bool_)
        slots, known = self.index.find(clusters)
        wrong: Mask = known & (self.stored[slots] != self.counted[slots])
        starts, ends = np.array(self.spans, dtype=np.int64).reshape(-1, 2).T
        span = np.searchsorted(starts, slots[wrong], side="right") - 1
        wrong[wrong] = (span >= 0) & (slots[wrong] < ends[span])
        return ~wrong

    def readable(self, low: int, high: int) -> Mask:
        """Which of the slots low..high-1 have a stored refcount that can be looked up."""
        readable: Mask = np.zeros(high - low, dtype=np.bool_)
        for start, stop in self.spans:
            readable[max(0, start - low) : max(0, stop - low)] = True
        return readable

    def _chunks(self) -> Iterator[tuple[int, Counts, Counts]]:
        for low, high in self.spans:
            for first in range(low, high, CHUNK):
                end = min(high, first + CHUNK)
                yield first, self.stored[first:end], self.counted[first:end]

    def _findings(
        self, cluster: I64, length: I64, kind: U8, stored: Counts, counted: Counts
    ) -> Findings:
        return make_findings(
            kind=kind,
            structure=Structure.CLUSTER,
            count=length,
            host_offset=cluster << self.geometry.cluster_bits,
            length=length << self.geometry.cluster_bits,
            found=stored,
            expected=counted,
        )


def _is_of(kind: FindingKind, stored: Counts, counted: Counts) -> Mask:
    """Which of the pairs are of a kind, as `kinds_of` says, in less time where others are not
    asked for.
    """
    if kind is FindingKind.LEAK:
        of_kind: Mask = stored > counted
    elif kind is FindingKind.REFCOUNT_MISSING:
        of_kind = (stored == 0) & (counted > 0)
    else:
        of_kind = (stored < counted) & (stored != 0)
    return of_kind


def kinds_of(stored: Counts, counted: Counts) -> U8:
    """`FindingKind` of each pair of a stored refcount and counted references; else `NO_KIND`."""
    kind = np.full(len(stored), NO_KIND, dtype=np.uint8)
    kind[stored > counted] = FindingKind.LEAK
    kind[stored < counted] = FindingKind.REFCOUNT_LOW
    kind[(stored == 0) & (counted > 0)] = FindingKind.REFCOUNT_MISSING
    return kind
