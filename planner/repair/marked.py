"""L2 entries that findings are about, table by table, and what is drafted of them.

Batches of whole tables, so that what a repair of millions of entries holds beside its draft is
bounded. Which entries are wrong the report says; what they become, the caller.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from planner.arrays import I64, U8, Mask
from planner.findings.kinds import FindingKind, Findings, Structure
from planner.repair.plan import StageKind
from planner.repair.scope import Scope
from planner.source import SECTOR, read_tables


@dataclass(frozen=True, slots=True)
class MarkedTables:
    """Some L2 tables. ``offset``: in the file, ascending. ``rows``: their bytes, uint8 (tables,
    bytes). ``marks``: which entries findings of ``kind`` are about, (tables, entries).
    """

    scope: Scope
    kind: FindingKind
    offset: I64
    rows: U8
    marks: Mask

    @property
    def words(self) -> npt.NDArray[np.uint64]:
        """The entries, big-endian, (tables, entries): a view of ``rows``."""
        return self.rows.view(">u8")[:, :: self.scope.geometry.l2_entry_size // 8]

    @property
    def bitmaps(self) -> npt.NDArray[np.uint64]:
        """As ``words``, the subcluster bitmaps of extended entries."""
        return self.rows.view(">u8")[:, 1::2]

    def host_offsets(self) -> I64:
        """Of the marked entries, in the file, (marked entries,)."""
        return self._host_offsets(np.flatnonzero(self.marks))

    def _host_offsets(self, at: I64) -> I64:
        """The same of entries at flat positions in ``marks``."""
        table, inside = np.divmod(at, self.marks.shape[1])
        host: I64 = self.offset[table] + inside * self.scope.geometry.l2_entry_size
        return host

    def without_contested(self) -> MarkedTables:
        """Without the marks in clusters with two owners that are no tables alike."""
        bits, size = self.scope.geometry.cluster_bits, self.scope.geometry.cluster_size
        ends = np.stack((self.offset, self.offset + size - 1)) >> bits
        first, last = ~self.scope.is_writable(ends)
        if not first.any() and not last.any():
            return self
        # A misaligned table goes on in a second cluster.
        inside = np.arange(self.marks.shape[1]) * self.scope.geometry.l2_entry_size
        is_second = (self.offset % size)[:, None] + inside >= size
        return self.select(~np.where(is_second, last[:, None], first[:, None]))

    def select(self, chosen: Mask) -> MarkedTables:
        """Those of the marked entries alone that are *chosen*."""
        return MarkedTables(self.scope, self.kind, self.offset, self.rows, self.marks & chosen)

    def draft(self) -> None:
        """Draft the marked entries as they are by now, and say why: an edit for a run of marks."""
        # Only the sectors in which something changes: there may be one entry in each table.
        sectors = self.rows.reshape(len(self.rows), -1, SECTOR)
        touched = self.marks.reshape(*sectors.shape[:2], -1).any(axis=2)
        if not touched.any():
            return
        table, inside = np.nonzero(touched)
        # A copy: the buffer beneath is used again.
        changed = sectors[table, inside]
        offset = self.offset[table] + inside * SECTOR
        self.scope.draft.write_tables(StageKind.CORRECT, offset, changed)
        width, step = self.marks.shape[1], self.scope.geometry.l2_entry_size
        at = np.flatnonzero(self.marks)
        start = np.flatnonzero((np.diff(at, prepend=-2) != 1) | (at % width == 0))
        count = np.diff(start, append=len(at))
        places = self._host_offsets(at[start]), count * step, count
        self.scope.explain_runs(StageKind.CORRECT, Structure.L2_TABLE, self.kind, places)


def marked_tables(scope: Scope, kind: FindingKind) -> Iterator[MarkedTables]:
    """The L2 tables with findings of a kind, some at a time; valid until the next.

    Their bytes may be changed in place. What was written over a table is somebody's data, and has
    no marks.
    """
    entries, size = scope.entries, scope.geometry.cluster_size
    offsets = entries.tables_with(kind)
    gone = scope.report.findings.of(FindingKind.TABLE_OVERWRITTEN, Structure.L2_TABLE)
    for part, rows in read_tables(scope.drafted, offsets, size):
        marks = entries.marks(kind, offsets[part])
        _drop(marks, offsets[part], gone, scope.geometry.l2_entry_size)
        yield MarkedTables(scope, kind, offsets[part], rows, marks)


def _drop(marks: Mask, offsets: I64, gone: Findings, entry_size: int) -> None:
    """Take away the marks in parts of tables that something else was written over."""
    size = marks.shape[1] * entry_size
    row = np.searchsorted(offsets, gone.host_offset, side="right") - 1
    inside = np.flatnonzero((row >= 0) & (gone.host_offset < offsets[row] + size))
    if not len(inside):
        return
    row, start = row[inside], (gone.host_offset[inside] - offsets[row[inside]]) // entry_size
    change = np.zeros(marks.size + 1, dtype=np.int64)
    first = row * marks.shape[1] + start
    np.add.at(change, first, 1)
    np.add.at(change, first + gone.length[inside] // entry_size, -1)
    marks &= (np.cumsum(change[:-1]) == 0).reshape(marks.shape)
