"""L1 entries that lead to no L2 table: where a table that lost its entry may have stood.

What was never written has no L2 table either: a gap is a place where a loss is possible, no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from planner.arrays import I64, GuestOffset, Mask, is_any_of
from planner.check.report import Report
from planner.findings.kinds import ACTIVE, FindingKind
from planner.metadata.mapping_tables import L1Entries, L1Tables, read_l1_tables
from planner.metadata.work_limits import followed_tables
from planner.qcow2.layout import MAX_L1_BYTES
from planner.source import Source


class PlaceKind(StrEnum):
    """What is to be seen where a lost table may have stood."""

    EMPTY = "empty"
    DAMAGED = "damaged"
    SHARED = "in-use"
    LOST = "in-lost-snapshot"


@dataclass(frozen=True, slots=True)
class Place:
    """*count* neighbouring L1 entries from ``l1_index`` on.

    ``snapshot``: whose L1 table it is; `ACTIVE`, an index, or `UNLISTED` where that is a lost
    snapshot's. ``coverage``: guest bytes that one of the entries maps.
    """

    kind: PlaceKind
    snapshot: int
    l1_index: int
    count: int
    coverage: int

    @property
    def guest_offset(self) -> GuestOffset:
        """Of the first guest byte that the entries map."""
        return GuestOffset(self.l1_index * self.coverage)

    @property
    def phrase(self) -> str:
        """What a table there mapped, and why it may have been there."""
        of = "" if self.snapshot == ACTIVE else f" of snapshot {self.snapshot}"
        end = self.guest_offset + self.count * self.coverage
        entry = f"L1 entry {self.l1_index}{of}"
        span = f"{self.coverage} bytes at guest offset {self.guest_offset}"
        if self.count > 1:
            entry = f"L1 entries {self.l1_index} to {self.l1_index + self.count - 1}{of}"
            span = f"{self.coverage} bytes between guest offsets {self.guest_offset} and {end}"
        verb = "is" if self.count == 1 else "are"
        match self.kind:
            case PlaceKind.SHARED:
                return f"it maps {span} ({entry}), and something else that it mapped is lost"
            case PlaceKind.LOST:
                return f"it mapped {span} in the lost snapshot"
            case _:
                return f"it could have mapped {span} ({entry} {verb} {self.kind})"


@dataclass(frozen=True, slots=True)
class Gaps:
    """Runs of L1 entries in columns, those of the active disk first; see `Place`.

    ``damaged``: not empty, but what the entry holds is no L2 table's offset, or that of a cluster
    that something else uses too, or of a table that is another's by its refcount. ``coverage``:
    guest bytes that one entry maps.
    """

    snapshot: I64
    l1_index: I64
    count: I64
    damaged: Mask
    coverage: int

    def first(self, limit: int, *, only_active: bool) -> tuple[Place, ...]:
        """At most *limit* of them, of the active disk alone or of the snapshots too.

        The damaged ones come first: what was in them is certainly missing.
        """
        end = self._active if only_active else len(self.snapshot)
        order = np.argsort(~self.damaged[:end], kind="stable")[:limit]
        columns = (self.damaged, self.snapshot, self.l1_index, self.count)
        rows = zip(*(column[order].tolist() for column in columns), strict=True)
        kinds = (PlaceKind.EMPTY, PlaceKind.DAMAGED)
        return tuple(
            Place(kinds[damaged], snapshot, l1_index, count, self.coverage)
            for damaged, snapshot, l1_index, count in rows
        )

    def entries(self, *, only_active: bool) -> int:
        """How many L1 entries that are."""
        return int(self.count[: self._active if only_active else None].sum())

    def cover(self, l1_index: I64) -> Mask:
        """Whether an entry of that index leads to no L2 table, of any disk."""
        order = np.argsort(self.l1_index, kind="stable")
        start = self.l1_index[order]
        end = np.maximum.accumulate((self.l1_index + self.count)[order])
        before = np.searchsorted(start, l1_index, side="right")
        return l1_index < np.append(0, end)[before]

    @property
    def _active(self) -> int:
        return int(np.count_nonzero(self.snapshot == ACTIVE))


def read_gaps(source: Source, report: Report, astray: I64) -> Gaps:
    """All L1 entries without an L2 table, within what each disk needs.

    *astray*: clusters of tables that have more users than their refcount says.
    """
    header, geometry = report.layout.header if report.layout else None, report.geometry
    fields = report.snapshots.fields()
    offset, size = fields["l1_table_offset"].astype(np.uint64), fields["l1_size"].astype(np.int64)
    is_there = (size > 0) & (size <= MAX_L1_BYTES // 8) & (offset < source.size)
    is_there &= (offset & np.uint64(geometry.cluster_size - 1)) == 0
    tables = L1Tables.of_snapshots(report.snapshots, is_there)
    if header is not None:
        needed = min(header.l1_size, geometry.l1_entries_needed)
        tables = L1Tables.of_disk(header.l1_table_offset, needed).joined(tables)
    tables = tables.select(followed_tables(tables.offset, tables.size, source.size))
    l1 = read_l1_tables(source, tables)
    damaged = _damaged(l1, report, astray)
    number, index, count = _between(l1, tables)
    snapshot = np.concatenate((number, l1.snapshot[damaged].astype(np.int64)))
    l1_index = np.concatenate((index, l1.l1_index[damaged]))
    order = np.lexsort((l1_index, snapshot))
    single = np.ones(len(order) - len(number), dtype=np.int64)
    return Gaps(
        snapshot[order],
        l1_index[order],
        np.concatenate((count, single))[order],
        np.arange(len(order))[order] >= len(number),
        geometry.l2_coverage,
    )


def _damaged(l1: L1Entries, report: Report, astray: I64) -> Mask:
    """Which entries that are not zero lead to no table of their own."""
    geometry, offset = report.geometry, l1.offset
    end = report.layout.file_size if report.layout else 0
    contested = report.findings.of(FindingKind.MULTIPLE_OWNERS).host_offset
    damaged: Mask = (offset & (geometry.cluster_size - 1)) != 0
    damaged |= (offset == 0) | (offset >= end)
    damaged |= is_any_of(offset, contested)
    damaged |= is_any_of(offset >> geometry.cluster_bits, astray)
    return damaged


def _between(l1: L1Entries, tables: L1Tables) -> tuple[I64, I64, I64]:
    """The runs of zero entries: (snapshot, first L1 index, how many)."""
    numbers = tables.snapshot.astype(np.int64)
    snapshot = np.concatenate((l1.snapshot.astype(np.int64), numbers, numbers))
    index = np.concatenate((l1.l1_index, np.full(len(numbers), -1), tables.size))
    order = np.lexsort((index, snapshot))
    snapshot, index = snapshot[order], index[order]
    count = np.diff(index) - 1
    within = (np.diff(snapshot) == 0) & (count > 0)
    return snapshot[:-1][within], index[:-1][within] + 1, count[within]
