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
    """Overwritten parts of tables: row, first sector, how many sectors, and what is there."""

    row: I64
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
    offsets = _with_gone_sectors(source, layout, offsets[offsets % size == 0])
    for part, rows in read_tables(source, offsets, size):
        runs = _overwritten_runs(rows, layout, looker)
        at = np.searchsorted(tables.offset, offsets[part][runs.row])
        _report_runs(layout, tables, at, runs, findings)
        meter.advance(0)


def _with_gone_sectors(source: Source, layout: Layout, offsets: I64) -> I64:
    """Which of *offsets* are to be read whole: not those of which parts show that none is gone."""
    parts = TableParts.of(source, offsets, layout.geometry.cluster_size)
    if parts.size == layout.geometry.cluster_size:
        return offsets
    tables = GoneTables(layout.geometry, layout.file_size)
    some = [parts.table[part][tables.counts(rows)[0] > 0] for part, rows in parts.read(source)]
    return offsets[distinct(np.concatenate([*some, np.zeros(0, dtype=np.int64)]))]


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


def _overwritten_runs(rows: U8, layout: Layout, looker: Looker) -> _Runs:
    """The overwritten parts of tables, uint8 (tables, cluster size)."""
    gone, whole = GoneTables(layout.geometry, layout.file_size).sectors(rows)
    edge = np.diff(gone, axis=1, prepend=False, append=False)
    row, bounds = np.nonzero(edge)
    row, first, end = row[::2], bounds[::2], bounds[1::2]
    content = np.zeros(len(row), dtype=np.int64)
    is_whole = whole[row]
    content[is_whole] = looker.contents(rows[row[is_whole]])
    parts = np.flatnonzero(~is_whole)
    sectors = rows.reshape(len(rows), -1, SECTOR)
    content[parts] = looker.contents(sectors[row[parts], first[parts]])
    return _Runs(row, first, end - first, content)


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
