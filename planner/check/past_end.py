"""What the refcounts count behind the end of a file, and nothing that is left leads to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planner.arrays import I64, Counts, Mask, distinct
from planner.check.refcount_comparison import CHUNK
from planner.check.report import Report
from planner.findings.kinds import FindingKind, join_findings
from planner.metadata.mapping_tables import L1Tables, read_l1_tables
from planner.metadata.refcounts import Reftable, StoredRefcounts
from planner.qcow2 import entries
from planner.qcow2.layout import Layout
from planner.source import Source, present_tables, read_tables


def lost_past_end(source: Source, report: Report) -> int:
    """How many of these a table of the disk may have had that has no entry left; 0 without one."""
    layout = report.layout
    if layout is None:
        return 0
    geometry, header = layout.geometry, layout.header
    needed = min(header.l1_size, geometry.l1_entries_needed)
    tables = L1Tables.of_disk(header.l1_table_offset, needed)
    offset = distinct(read_l1_tables(source, tables).offset)
    offset = offset[(offset % geometry.cluster_size == 0) & (offset < layout.file_size)]
    present = present_tables(source, offset, geometry.cluster_size)
    if present.all() and not any(_are_empty(source, offset, layout)):
        return 0
    return references_past_end(source, report)


def _are_empty(source: Source, offsets: I64, layout: Layout) -> Iterator[bool]:
    """Whether one of the L2 tables at *offsets* leads nowhere, in batches."""
    flags = entries.ZERO | (0 if layout.geometry.external_data else entries.COPIED)
    for _, rows in read_tables(source, offsets, layout.geometry.cluster_size):
        words, _ = entries.split_entries(entries.decode_words(rows), layout.geometry.extended_l2)
        yield bool((~((words & ~np.uint64(flags)) != 0).any(axis=1)).any())


def references_past_end(source: Source, report: Report) -> int:
    """How many references the file counts behind its end that nothing is left of.

    A table that is lost may have had them, and what they led to was cut off.
    """
    layout = report.layout
    if layout is None or report.entries is None:
        return 0
    stored = StoredRefcounts(source, layout, Reftable(source, layout))
    end, most = layout.host_clusters, layout.geometry.guest_clusters
    known, count = _Known.of(report), 0
    for first, rows in stored.pieces_past(end, _blocks_of_the_file(report, stored.reftable)):
        step = max(1, CHUNK // rows.shape[1])
        for at in range(0, len(rows), step):
            part = slice(at, at + step)
            first_of, refcounts = first[part], rows[part]
            alike = (first_of >= end) & known.are_steady(first_of, rows.shape[1])
            count += _lost_of_pieces(refcounts[alike], known.times(first_of[alike]), most)
            row, inside = np.nonzero(refcounts[~alike])
            cluster = first_of[~alike][row] + inside
            behind = cluster >= end
            some = refcounts[~alike][row[behind], inside[behind]]
            count += _lost_of_pieces(some[:, None], known.times(cluster[behind]), most)
    return count


def _lost_of_pieces(refcounts: Counts, times: I64, most: int) -> int:
    """How many references *refcounts*, (pieces, clusters), count more than are known: *times* to
    each cluster of a piece. No cluster has more than *most*.
    """
    dtype = refcounts.dtype.type
    top = min(most, int(np.iinfo(dtype).max))
    lost = np.minimum(refcounts, dtype(top))
    lost -= np.minimum(lost, np.minimum(times, top).astype(dtype)[:, None])
    return int(lost.sum(dtype=np.int64))


def _blocks_of_the_file(report: Report, table: Reftable) -> I64:
    """Host offsets of the blocks that hold the refcounts of clusters that the file has.

    If the table leads to one of them a second time, it is none of clusters behind the end.
    """
    mismatches, per_block = report.mismatches, table.entries_per_block
    found = [np.zeros(0, dtype=np.int64)]
    if mismatches is None or report.layout is None:
        return found[0]
    which = table.blocks()
    which = which[table.index[which] <= report.layout.host_clusters // per_block]
    again = np.isin(table.offset, _repeated(table.offset[table.blocks()]))
    which = which[again[which]]
    first = table.index[which] * per_block
    slots = np.stack([mismatches.index.count_before(first + more) for more in (0, per_block)], 1)
    some = slots[:, 0] < slots[:, 1]  # nothing agrees where no cluster has a slot
    for at, (low, high) in zip(which[some].tolist(), slots[some].tolist(), strict=True):
        counted = mismatches.counted[low:high]
        used = counted != 0
        agreeing = np.count_nonzero(used & (counted == mismatches.stored[low:high]))
        if agreeing and agreeing * 2 >= np.count_nonzero(used):
            found.append(table.offset[at : at + 1])
    return np.concatenate(found)


def _repeated(values: I64) -> I64:
    once, times = np.unique(values, return_counts=True)
    repeated: I64 = once[times > 1]
    return repeated


@dataclass(frozen=True, slots=True)
class _Known:
    """What is known to lead behind the end, as ranges of clusters: how many begin at or before
    each of ``start``, ascending, is the running total beside it in ``begun``; and so on.
    """

    start: I64
    begun: I64
    end: I64
    ended: I64

    @classmethod
    def of(cls, report: Report) -> _Known:
        """The structures and entries that *report* says lie past the end."""
        bits = report.geometry.cluster_bits
        kinds = FindingKind.PAST_END, FindingKind.CUT_OFF
        findings = join_findings(*(report.findings.of(kind) for kind in kinds))
        first, last = findings.host_offset, findings.host_offset + (findings.length - 1)
        times = findings.count
        if report.entries is not None:
            found = report.entries.of(FindingKind.PAST_END)
            offset = np.minimum(found.found, np.uint64((1 << 63) - 1)).astype(np.int64)
            first, last = np.append(first, offset), np.append(last, offset)
            times = np.append(times, found.count)
        start, end = first >> bits, (last >> bits) + 1
        # Of table after table, which ascend each mostly.
        by_start, by_end = (np.argsort(at, kind="stable") for at in (start, end))
        return cls(
            start[by_start],
            np.append(0, np.cumsum(times[by_start])),
            end[by_end],
            np.append(0, np.cumsum(times[by_end])),
        )

    def are_steady(self, first: I64, count: int) -> Mask:
        """Whether as much leads to each of the *count* clusters from *first* on, of many such."""
        steady: Mask = np.ones(len(first), dtype=np.bool_)
        for at in (self.start, self.end):
            low, high = np.searchsorted(at, (first, first + (count - 1)), side="right")
            steady &= low == high
        return steady

    def times(self, clusters: I64) -> I64:
        """How often something leads to each of *clusters*.

        Of a hundred thousand ranges hardly one begins or ends between most that are looked at.
        """
        if not len(clusters):
            return clusters
        ends = clusters.min(), clusters.max()
        begun, ended = (
            total[low + np.searchsorted(at[low:high], clusters, side="right")]
            for at, total in ((self.start, self.begun), (self.end, self.ended))
            for low, high in [np.searchsorted(at, ends, side="right")]
        )
        result: I64 = begun - ended
        return result
