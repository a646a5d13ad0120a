"""The tables among leaked clusters, as places that can be read: L2 tables, and L1 of snapshots.

Never looks into anything: what triage has not found yet is not there. How they are named and where
they appear is up to the tree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from instarfs.guest.place import Part, Place
from planner.arrays import I64
from planner.check.classify import Look
from planner.check.refcount_comparison import CHUNK
from planner.check.report import Report
from planner.errors import ImageError
from planner.qcow2.geometry import SECTOR
from planner.rescue.snapshots import LostL1, lost_l1_tables
from planner.triage.triage import Triage


class Found(Protocol):
    """Leaked clusters, and what they look like; see `instarfs.inspect.inspector.Leaks`."""

    @property
    def report(self) -> Report: ...

    @property
    def triage(self) -> Triage: ...


class LostTables:
    """Looks tables up in what *peek* returns: what was found last of the image, if that holds."""

    def __init__(self, peek: Callable[[], Found | None]) -> None:
        self._peek = peek

    def l2_tables(self, limit: int) -> list[int]:
        """Host offsets of the first L2 tables that nothing leads to, at most *limit*, ascending."""
        found, listed = self._peek(), np.zeros(0, dtype=np.int64)
        if found is None:
            return []
        looks, clusters = found.triage.look, found.triage.clusters
        for start in range(0, len(looks), CHUNK):
            at = start + np.flatnonzero(looks[start : start + CHUNK] == Look.L2_TABLE)
            listed = np.concatenate((listed, _unused(found.report, clusters[at])))[:limit]
            if len(listed) == limit:
                break
        return [int(cluster) << found.report.geometry.cluster_bits for cluster in listed]

    def l2_table(self, offset: int) -> Place | None:
        """The L2 table at that host offset, if one was found there."""
        found = self._peek()
        if found is None or offset >= 1 << 63:
            return None
        bits, triage = found.report.geometry.cluster_bits, found.triage
        at = int(np.searchsorted(triage.clusters, offset >> bits))
        is_there = at < len(triage.clusters) and int(triage.clusters[at]) << bits == offset
        if not is_there or triage.look[at] != Look.L2_TABLE:
            return None
        is_unused = len(_unused(found.report, triage.clusters[at : at + 1])) > 0
        geometry = found.report.geometry
        size = min(geometry.l2_coverage, geometry.virtual_size)
        return Place(Part.LOST_TABLE, offset, size=size) if is_unused else None

    def snapshots(self, limit: int) -> list[int]:
        """Host offsets of the first L1 tables that nothing leads to, at most *limit*."""
        return [each.offset for each in self._l1_tables()][:limit]

    def snapshot(self, offset: int) -> Place | None:
        """The disk of the L1 table at that host offset, if one was found there.

        As large as its entry still says, else as the image's.
        """
        found = self._peek()
        table = next((each for each in self._l1_tables() if each.offset == offset), None)
        if found is None or table is None:
            return None
        geometry = found.report.geometry
        entries, size = table.clusters * geometry.cluster_size // 8, geometry.virtual_size
        if table.snapshot is not None:
            entries = min(entries, table.snapshot.l1_size)
            size = table.snapshot.disk_size or size
        size = min(size, entries * geometry.l2_coverage) // SECTOR * SECTOR
        return Place(Part.LOST_SNAPSHOT, offset, entries, size)

    def _l1_tables(self) -> Iterator[LostL1]:
        found = self._peek()
        if found is not None:
            yield from lost_l1_tables(found.report.geometry, found.triage)


def _unused(report: Report, clusters: I64) -> I64:
    """Those of *clusters* that nothing refers to."""
    if report.mismatches is None:
        raise report.error or ImageError("header", "unknown", "it was not read")
    unused: I64 = clusters[report.mismatches.count_references(clusters) == 0]
    return unused
