"""L2 entries that findings are about, table by table, and what is drafted of them.

Batches of parts of tables: what a repair of millions of entries holds beside its draft is bounded,
and a single entry takes no more than the part that it is in. Which entries are wrong the report
says; what they become, the caller.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from planner.arrays import I64, U8, Mask
from planner.check.entry_findings import EntryFindings
from planner.findings.kinds import FindingKind, Structure
from planner.metadata.mapping_tables import TableParts
from planner.repair.plan import StageKind
from planner.repair.scope import Scope
from planner.source import SECTOR


@dataclass(frozen=True, slots=True)
class MarkedTables:
    """The parts *some* of L2 tables. ``rows``: their bytes, uint8 (parts, bytes). ``marks``: which
    entries findings of ``kind`` are about, (parts, entries of a part).
    """

    scope: Scope
    kind: FindingKind
    parts: TableParts
    some: slice
    rows: U8
    marks: Mask

    @property
    def words(self) -> npt.NDArray[np.uint64]:
        """The entries, big-endian, (parts, entries): a view of ``rows``."""
        return self.rows.view(">u8")[:, :: self.scope.geometry.l2_entry_size // 8]

    @property
    def bitmaps(self) -> npt.NDArray[np.uint64]:
        """As ``words``, the subcluster bitmaps of extended entries."""
        return self.rows.view(">u8")[:, 1::2]

    @property
    def _offset(self) -> I64:
        """Of the parts, in the file."""
        offset: I64 = self.parts.offsets[self.parts.table[self.some]] + self.parts.inside[self.some]
        return offset

    def host_offsets(self) -> I64:
        """Of the marked entries, in the file, (marked entries,)."""
        return self._host_offsets(np.flatnonzero(self.marks))

    def _host_offsets(self, at: I64) -> I64:
        """The same of entries at flat positions in ``marks``."""
        row, inside = np.divmod(at, self.marks.shape[1])
        host: I64 = self._offset[row] + inside * self.scope.geometry.l2_entry_size
        return host

    def without_contested(self) -> MarkedTables:
        """Without the marks in clusters with two owners that are no tables alike."""
        bits, size = self.scope.geometry.cluster_bits, self.scope.geometry.cluster_size
        offset = self._offset
        ends = np.stack((offset, offset + self.rows.shape[1] - 1)) >> bits
        first, last = ~self.scope.is_writable(ends)
        if not first.any() and not last.any():
            return self
        # A part of a misaligned table may go on in a second cluster.
        inside = np.arange(self.marks.shape[1]) * self.scope.geometry.l2_entry_size
        is_second = (offset % size)[:, None] + inside >= size
        return self.select(~np.where(is_second, last[:, None], first[:, None]))

    def select(self, chosen: Mask) -> MarkedTables:
        """Those of the marked entries alone that are *chosen*."""
        return replace(self, marks=self.marks & chosen)

    def without(self, found: EntryFindings, kind: FindingKind) -> MarkedTables:
        """Without the marks of entries about which there are findings of *kind* in *found*."""
        return self.select(~found.marks(kind, self.parts, self.some))

    def without_overwritten(self) -> MarkedTables:
        """Without the marks where something else was written over a table."""
        findings = self.scope.report.findings
        gone = findings.of(FindingKind.TABLE_OVERWRITTEN, Structure.L2_TABLE)
        if not len(gone):
            return self
        gone = gone.select(np.argsort(gone.host_offset, kind="stable"))
        host, marks = self.host_offsets(), self.marks.copy()
        at = np.searchsorted(gone.host_offset, host, side="right") - 1
        marks[marks] = (at < 0) | (host >= gone.host_offset[at] + gone.length[at])
        return self.select(marks)

    def draft(self) -> None:
        """Draft the marked entries as they are by now, and say why: an edit for a run of marks."""
        # Only the sectors in which something changes: there may be one entry in each table.
        sectors = self.rows.reshape(len(self.rows), -1, SECTOR)
        touched = self.marks.reshape(*sectors.shape[:2], -1).any(axis=2)
        if not touched.any():
            return
        row, inside = np.nonzero(touched)
        # A copy: the buffer beneath is used again.
        changed = sectors[row, inside]
        offset = self._offset[row] + inside * SECTOR
        self.scope.draft.write_tables(StageKind.CORRECT, offset, changed)
        geometry, at = self.scope.geometry, np.flatnonzero(self.marks)
        place = self.parts.positions(self.some, at, geometry)
        is_first = (np.diff(place, prepend=-2) != 1) | (place % geometry.l2_entries == 0)
        start = np.flatnonzero(is_first)
        count = np.diff(start, append=len(at))
        places = self._host_offsets(at[start]), count * geometry.l2_entry_size, count
        self.scope.explain_runs(StageKind.CORRECT, Structure.L2_TABLE, self.kind, places)


def marked_tables(scope: Scope, kind: FindingKind) -> Iterator[MarkedTables]:
    """The parts of L2 tables with findings of a kind, those of some tables at a time; valid until
    the next.

    Their bytes may be changed in place. What was written over a table is somebody's data, and has
    no marks.
    """
    parts = scope.entries.parts_with(kind)
    for some, rows in parts.read(scope.drafted):
        marks = scope.entries.marks(kind, parts, some)
        yield MarkedTables(scope, kind, parts, some, rows, marks).without_overwritten()
