"""Tables that something else was written over: text, a refcount block, whatever it is.

A damaged entry is a finding of its own. A table that is gone, in whole sectors, is another: what it
mapped is lost, and its content is somebody's data, which no repair edits. Only tables are looked at
in which the check found something. Which words could be entries is decided by
`planner.metadata.gone_tables`, what the content looks like by `planner.check.classify`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.arrays import I64, U8, distinct
from planner.check.classify import Looker
from planner.check.entry_findings import EntryFindings
from planner.findings.grouped import FindingsBuilder
from planner.findings.kinds import ACTIVE, NONE, FindingKind, Structure
from planner.metadata.gone_tables import GoneTables, little_is_left
from planner.metadata.locate import Survey
from planner.metadata.mapping_tables import L2Tables, TableParts
from planner.progress import Meter
from planner.qcow2.layout import Layout
from planner.source import SECTOR, Source, read_tables

_SIGNS = (
    FindingKind.L2_ENTRY_RESERVED,
    FindingKind.DATA_MISALIGNED,
    FindingKind.ZERO_MISALIGNED,
    FindingKind.PAST_END,
    FindingKind.COMPRESSED_COPIED,
    FindingKind.COMPRESSED_WITH_DATA_FILE,
    FindingKind.COMPRESSED_SUBCLUSTERS,
    FindingKind.SUBCLUSTER_CONFLICT,
    FindingKind.UNALLOCATED_SUBCLUSTERS,
)


@dataclass(frozen=True, slots=True)
class _Runs:
    """Overwritten parts of tables: which, first sector, how many sectors, and what is there."""

    table: I64
    sector: I64
    count: I64
    content: I64


def find_overwritten(
    source: Source,
    layout: Layout,
    looker: Looker,
    found: EntryFindings,
    findings: FindingsBuilder,
    *,
    meter: Meter,
) -> None:
    """Add a finding for each part of an L2 table that something else was written over."""
    size, tables = layout.geometry.cluster_size, found.tables
    signs = [found.tables_with(kind) for kind in _SIGNS]
    offsets = distinct(np.concatenate([*signs, np.zeros(0, dtype=np.int64)]))
    parts = TableParts.of(source, offsets[offsets % size == 0], size)
    for part, rows in parts.read(source):
        runs = _overwritten_runs(parts, part, rows, layout, looker)
        at = np.searchsorted(tables.offset, parts.offsets[runs.table])
        _report_runs(layout, tables, at, runs, findings)
        meter.advance(0)


def find_overwritten_l1(
    source: Source, layout: Layout, looker: Looker, survey: Survey, findings: FindingsBuilder
) -> None:
    """Add a finding for each L1 table of which little else is left."""
    size, l1 = layout.geometry.cluster_size, survey.l1
    wild = GoneTables(layout.geometry, layout.file_size).wild_l1(l1.word)
    bad, all_ = (np.bincount(numbers - ACTIVE) for numbers in (l1.snapshot[wild], l1.snapshot))
    gone = np.flatnonzero(little_is_left(bad, all_[: len(bad)])) + ACTIVE
    tables = survey.regions.select(survey.regions.structure == Structure.L1_TABLE)
    tables = tables.select(np.isin(tables.snapshot, gone))
    tables = tables.select(np.argsort(tables.offset, kind="stable"))
    for part, rows in read_tables(source, tables.offset, size):
        findings.add(
            FindingKind.TABLE_OVERWRITTEN,
            structure=Structure.L1_TABLE,
            host_offset=tables.offset[part],
            length=tables.size[part],
            snapshot=tables.snapshot[part],
            guest_offset=0,
            guest_length=tables.size[part] // 8 * layout.geometry.l2_coverage,
            found=looker.contents(rows).astype(np.uint64),
        )


def _overwritten_runs(
    parts: TableParts, part: slice, rows: U8, layout: Layout, looker: Looker
) -> _Runs:
    """The overwritten parts of tables: *rows* are the bytes of the parts *part* of these."""
    size, table = layout.geometry.cluster_size, parts.table[part]
    gone, is_whole = GoneTables(layout.geometry, layout.file_size).sectors(rows, table)
    row, inside = np.nonzero(gone & ~is_whole[:, None])
    place = table[row] * (size // SECTOR) + parts.inside[part][row] // SECTOR + inside
    goes_on = (np.diff(place, prepend=-2) == 1) & (place % (size // SECTOR) != 0)
    first = np.flatnonzero(~goes_on)
    content = looker.contents(rows.reshape(len(rows), -1, SECTOR)[row[first], inside[first]])
    count = np.diff(first, append=len(place))
    runs = np.stack((*np.divmod(place[first], size // SECTOR), count, content))
    whole = distinct(table[is_whole])
    looks = [looker.contents(some) for some in parts.whole(part, rows, whole, size)]
    nothing, all_ = np.zeros_like(whole), np.full_like(whole, size // SECTOR)
    wholes = np.stack((whole, nothing, all_, np.concatenate([content[:0], *looks])))
    columns = np.append(runs, wholes, axis=1)
    return _Runs(*columns[:, np.argsort(columns[0], kind="stable")])


def _report_runs(
    layout: Layout, tables: L2Tables, at: I64, runs: _Runs, findings: FindingsBuilder
) -> None:
    geometry = layout.geometry
    per_sector = SECTOR // geometry.l2_entry_size
    first, count = runs.sector * per_sector, runs.count * per_sector
    is_whole = count == geometry.l2_entries
    l1_index = tables.l1_index[at]
    findings.add(
        FindingKind.TABLE_OVERWRITTEN,
        structure=Structure.L2_TABLE,
        host_offset=tables.offset[at] + runs.sector * SECTOR,
        length=runs.count * SECTOR,
        snapshot=tables.snapshot[at],
        l1_index=l1_index,
        l2_index=np.where(is_whole, NONE, first),
        guest_offset=(l1_index * geometry.l2_entries + first) << geometry.cluster_bits,
        guest_length=count << geometry.cluster_bits,
        found=runs.content.astype(np.uint64),
    )
