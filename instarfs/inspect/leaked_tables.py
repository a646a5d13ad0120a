"""The tables among leaked clusters, as places that can be read: L2 tables, and L1 of snapshots.

Never looks into anything: what triage has not found yet is not there. How they are named and where
they appear is up to the tree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from instarfs.guest.guest import Part, Place
from planner.arrays import I64
from planner.check.classify import Look
from planner.check.refcount_comparison import CHUNK
from planner.check.report import Report
from planner.errors import ImageError
from planner.qcow2.snapshots import Snapshot
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
        found = self._peek()
        return [] if found is None else sorted(_l1_tables(found))[:limit]

    def snapshot(self, offset: int) -> Place | None:
        """The disk of the L1 table at that host offset, if one was found there.

        As large as its entry still says, else as the image's.
        """
        found = self._peek()
        table = _l1_tables(found).get(offset) if found is not None else None
        if found is None or table is None:
            return None
        clusters, snapshot = table
        geometry = found.report.geometry
        entries = clusters * geometry.cluster_size // 8
        size = geometry.virtual_size
        if snapshot is not None:
            entries = min(entries, snapshot.l1_size)
            size = snapshot.disk_size or size
        most = entries * geometry.l2_coverage
        return Place(Part.LOST_SNAPSHOT, offset, entries, min(size, most) // 512 * 512)


def _unused(report: Report, clusters: I64) -> I64:
    """Those of *clusters* that nothing refers to."""
    if report.mismatches is None:
        raise report.error or ImageError("header", "unknown", "it was not read")
    unused: I64 = clusters[report.mismatches.count_references(clusters) == 0]
    return unused


def _l1_tables(found: Found) -> dict[int, tuple[int, Snapshot | None]]:
    """By the offset of each L1 table how many clusters it has, and whose it is, if that is told.

    One that the image can do with has so many clusters as its disk needs, if they are there.
    """
    geometry = found.report.geometry
    size = geometry.cluster_size
    most = max(1, -(-geometry.l1_entries_needed * 8 // size))
    tables: dict[int, tuple[int, Snapshot | None]] = {}
    first, end, owner = 0, -1, None
    for each in found.triage.tables:
        if not each.is_l1 or each.in_use:
            continue
        length = tables[first][0] if first in tables else 0
        if each.offset == end and each.snapshot is owner and (owner or length < most):
            tables[first] = (length + 1, owner)
        else:
            first, owner = each.offset, each.snapshot
            tables[first] = (1, owner)
        end = each.offset + size
    return tables
