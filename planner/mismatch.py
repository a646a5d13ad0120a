"""Stored refcounts against counted references, cluster by cluster, told in runs.

The two arrays are kept as they are; runs are made when somebody reads them, a bounded part at a
time, so that sixteen million scattered leaks cost no more than sixteen million clusters without.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planner.arrays import I64, U8, Counts
from planner.counts import ClusterIndex
from planner.findings import FindingKind, Findings, Structure, make_findings
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
    stored: Counts
    counted: Counts
    spans: tuple[tuple[int, int], ...]

    def totals(self) -> dict[FindingKind, int]:
        """How many clusters there are of each kind."""
        leaks = low = missing = 0
        for _, stored, counted in self._chunks():
            if np.array_equal(stored, counted):
                continue
            leaks += int(np.count_nonzero(stored > counted))
            low += int(np.count_nonzero(stored < counted))
            missing += int(np.count_nonzero((stored == 0) & (counted > 0)))
        return {
            FindingKind.LEAK: leaks,
            FindingKind.REFCOUNT_LOW: low - missing,
            FindingKind.REFCOUNT_MISSING: missing,
        }

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
        slots, known = self.index.find(clusters)
        counted = self.counted[slots] if self.index.slots else np.zeros(len(slots), dtype=np.uint8)
        counted[~known] = 0
        return counted

    def runs(self, *kinds: FindingKind) -> Iterator[Findings]:
        """Findings of these kinds, in file order, a bounded number at a time.

        A run of neighbours with the same two numbers is one finding.
        """
        wanted = np.array(kinds, dtype=np.uint8)
        held: list[np.ndarray] = []
        for first, stored, counted in self._chunks():
            kind = _kinds_of(stored, counted)
            at = np.flatnonzero(np.isin(kind, wanted))
            if not len(at):
                continue
            cluster = self.index.clusters_of(first + at)
            columns = _runs_of(cluster, kind[at], stored[at], counted[at])
            if held:
                columns = _append_runs(held, columns)
            # The next chunk may go on with the last run.
            held = [column[-1:] for column in columns]
            yield self._findings(*(column[:-1] for column in columns))
        if held:
            yield self._findings(*held)

    def clusters(self, kind: FindingKind, limit: int) -> I64:
        """The first clusters of a kind, at most *limit*."""
        found: list[I64] = []
        for first, stored, counted in self._chunks():
            at = np.flatnonzero(_kinds_of(stored, counted) == kind)
            found.append(self.index.clusters_of(first + at))
            limit -= len(at)
            if limit <= 0:
                break
        return np.concatenate(found)[: limit or None] if found else np.zeros(0, dtype=np.int64)

    def blocks(self, per_block: int, *kinds: FindingKind) -> I64:
        """Indices of the refcount blocks, of *per_block* clusters, with clusters of these kinds."""
        wanted = np.array(kinds, dtype=np.uint8)
        found = [np.zeros(0, dtype=np.int64)]
        for first, stored, counted in self._chunks():
            if not np.array_equal(stored, counted):
                at = np.flatnonzero(np.isin(_kinds_of(stored, counted), wanted))
                found.append(np.unique(self.index.clusters_of(first + at) // per_block))
        return np.unique(np.concatenate(found))

    def between(self, first: int, end: int) -> tuple[I64, U8, Counts, Counts]:
        """The wrong clusters in [first, end): cluster, kind, stored, counted."""
        low, high = self.index.slots_before(first), self.index.slots_before(end)
        stored, counted = self.stored[low:high], self.counted[low:high]
        kind = _kinds_of(stored, counted)
        wrong = kind != NO_KIND
        if self.spans != ((0, self.index.slots),):
            readable = np.zeros(high - low, dtype=np.bool_)
            for start, stop in self.spans:
                readable[max(0, start - low) : max(0, stop - low)] = True
            wrong &= readable
        at = np.flatnonzero(wrong)
        return self.index.clusters_of(low + at), kind[at], stored[at], counted[at]

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


def _runs_of(cluster: I64, *alike: np.ndarray) -> list[np.ndarray]:
    """Runs of adjacent clusters that are alike: first cluster, length, and what they have alike."""
    new = np.ones(len(cluster), dtype=np.bool_)
    new[1:] = np.diff(cluster) != 1
    for column in alike:
        new[1:] |= column[1:] != column[:-1]
    start = np.flatnonzero(new)
    length = np.diff(start, append=len(cluster))
    return [cluster[start], length, *(column[start] for column in alike)]


def _append_runs(before: list[np.ndarray], runs: list[np.ndarray]) -> list[np.ndarray]:
    """One run, and those behind it, of which the first may be its continuation."""
    cluster, length, *alike = before
    goes_on = cluster[0] + length[0] == runs[0][0]
    if goes_on and all(old[0] == new[0] for old, new in zip(alike, runs[2:], strict=True)):
        runs[0][0], runs[1][0] = cluster[0], length[0] + runs[1][0]
        return runs
    return [np.concatenate(pair) for pair in zip(before, runs, strict=True)]


def _kinds_of(stored: Counts, counted: Counts) -> U8:
    """The finding kind of each pair of numbers; `NO_KIND` where they agree."""
    kind = np.full(len(stored), NO_KIND, dtype=np.uint8)
    kind[stored > counted] = FindingKind.LEAK
    kind[stored < counted] = FindingKind.REFCOUNT_LOW
    kind[(stored == 0) & (counted > 0)] = FindingKind.REFCOUNT_MISSING
    return kind
