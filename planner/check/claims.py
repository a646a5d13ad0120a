"""Whether a cluster that the refcount structure claims, and something else too, holds refcounts.

Where it does not, the claim is wrong, and new refcounts elsewhere take nothing from the other.
Where it does, or that cannot be told, they would leave the other alone with what is not its own:
its loss would not show any more.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from planner.arrays import (
    I64,
    Mask,
    distinct,
    distinct_columns,
    expand_ranges,
    is_among,
    is_any_of,
    without_repeats,
)
from planner.check.refcount_comparison import Mismatches
from planner.check.report import Report
from planner.errors import ParseFailed
from planner.findings.kinds import ACTIVE, FindingKind, Owners, Structure
from planner.metadata.mapping_tables import TableParts
from planner.metadata.refcounts import Reftable
from planner.qcow2 import entries
from planner.qcow2.layout import Layout
from planner.qcow2.refcounts import count_from, read_refcount_in_block
from planner.source import READABLE_END, Source, present_tables, read_tables

_OWN = {Structure.REFTABLE, Structure.REFBLOCK}

_OWNERS_WEIGHED = 1 << 12
"""Owners of a cluster that are looked at: as many as can be compressed in the largest."""

_ENTRIES_READ = 64
"""Refcount blocks that are looked at to tell whether what leads to them is a refcount table."""

_AGREEING_OF = 8
"""A refcount block says of one cluster in so many, or more, what the census counts."""

_REFCOUNTS_A_BATCH = 1 << 15

_BYTES_WEIGHED = 1 << 30
"""Of refcount blocks, holes among them, that it is asked of together what is there."""

_BLOCKS_READ = 1 << 14
"""Refcount blocks with a wrong refcount that are looked into."""


def refcounts_are_shared(source: Source, report: Report) -> bool:
    """Whether something else lies where refcounts are, or may be: one has overwritten the other.

    An entry that reads as zeros has nothing where it leads, misaligned as it is.
    """
    if report.layout is None or report.mismatches is None:
        return len(report.findings.of(FindingKind.MULTIPLE_OWNERS)) > 0
    return len(_shared(source, report, report.layout, report.mismatches)) > 0


def shared_refcounts(source: Source, report: Report) -> I64:
    """The clusters in which they are, ascending."""
    if report.layout is None or report.mismatches is None:
        return np.zeros(0, dtype=np.int64)
    return _shared(source, report, report.layout, report.mismatches)


def _shared(source: Source, report: Report, layout: Layout, mismatches: Mismatches) -> I64:
    contested = report.findings.of(FindingKind.MULTIPLE_OWNERS)
    claims, bits = _Claims(source, report, layout, mismatches), report.geometry.cluster_bits
    owners = report.owners
    of_refcounts = np.isin(owners.structure, list(_OWN))
    claimed = without_repeats(owners.cluster[of_refcounts])
    claimed = claimed[is_any_of(claimed, contested.host_offset >> bits)]
    # Of each of these clusters the first owners: who of them are refcounts, and who are others.
    low, high = (np.searchsorted(owners.cluster, claimed, side=side) for side in ("left", "right"))
    high = np.minimum(high, low + _OWNERS_WEIGHED)
    rows, number = expand_ranges(low, high - 1), np.repeat(np.arange(len(claimed)), high - low)
    own = of_refcounts[rows]
    held = np.zeros((2, len(claimed)), dtype=np.bool_)
    held[0, number[~own][claims.are_real(rows[~own])]] = True
    asked = own & held[0, number]
    held[1, number[asked][claims.may_hold(rows[asked])]] = True
    return claimed[held.all(axis=0)]


def blocks_that_are_none(source: Source, report: Report) -> I64:
    """Indices of refcount blocks in whose place something else lies: their refcounts are lost."""
    if report.layout is None or report.mismatches is None:
        return np.zeros(0, dtype=np.int64)
    claims = _Claims(source, report, report.layout, report.mismatches)
    return claims.blocks_that_are_none()


def places_of_entries(source: Source, report: Report, owners: Owners) -> I64:
    """Where in the file the L2 entries are by which *owners*, guest clusters, have what they have.

    Several snapshots may have one entry in common.
    """
    if report.layout is None:
        raise ParseFailed(str(report.error))
    header, snapshots = report.layout.header, report.snapshots
    number, which = np.unique(owners.snapshot, return_inverse=True)
    tables = [header if each == ACTIVE else snapshots[each] for each in number.tolist()]
    table = np.array([each.l1_table_offset for each in tables], dtype=np.int64)
    at = table[which] + 8 * owners.l1_index
    asked = distinct(at)
    l2_offset = np.empty(len(asked), dtype=np.int64)
    for part, rows in read_tables(source, asked, 8):
        l2_offset[part] = entries.l1_offsets(entries.decode_words(rows)[:, 0])
    return l2_offset[np.searchsorted(asked, at)] + owners.l2_index * report.geometry.l2_entry_size


class _Claims:
    """What the refcount structure of one image says of where it lies."""

    def __init__(
        self, source: Source, report: Report, layout: Layout, mismatches: Mismatches
    ) -> None:
        self._source, self._report = source, report
        self._layout, self._mismatches = layout, mismatches
        self._geometry = layout.geometry

    def are_real(self, rows: I64) -> Mask:
        """Which of the owners at *rows* of the report's have anything where they lead."""
        owners = self._report.owners
        real: Mask = np.ones(len(rows), dtype=np.bool_)
        if len(self._zeros):
            data = np.flatnonzero(owners.structure[rows] == Structure.DATA)
            place = places_of_entries(self._source, self._report, owners.select(rows[data]))
            real[data] = ~is_among(place, self._zeros)
        return real

    @cached_property
    def _zeros(self) -> I64:
        """Where the entries are that read as zeros, ascending."""
        if self._report.entries is None:
            return np.zeros(0, dtype=np.int64)
        return distinct(self._report.entries.of(FindingKind.ZERO_MISALIGNED).host_offset)

    def may_hold(self, rows: I64) -> Mask:
        """Whose clusters, of the owners at *rows* of the report's, may be the refcount blocks, or
        in the table, that these say they are.
        """
        owners, bits = self._report.owners, self._geometry.cluster_bits
        if not len(rows):
            return np.zeros(0, dtype=np.bool_)
        cluster, index = owners.cluster[rows], owners.index[rows].astype(np.int64)
        may: Mask = cluster < self._end_of_table
        blocks = np.flatnonzero(owners.structure[rows] != Structure.REFTABLE)
        entry = self._layout.header.refcount_table_offset + 8 * index[blocks]
        may[blocks] = entry >> bits < self._end_of_table
        blocks = blocks[may[blocks]]
        may[blocks] = self._may_be_blocks(cluster[blocks] << bits, index[blocks])
        return may

    @cached_property
    def _end_of_table(self) -> int:
        """The cluster at which the table ends: where it is none, nothing behind is either."""
        bits, regions = self._geometry.cluster_bits, self._report.regions
        table = regions.select(regions.structure == Structure.REFTABLE)
        if not len(table.offset):
            return READABLE_END  # It reaches past the end of the file, and was not counted.
        first, end = int(table.first(bits).min()), int(table.last(bits).max()) + 1
        is_empty, is_table = self._look_at_table(np.arange(first, end))
        wrong = np.flatnonzero(~is_empty & ~is_table)
        if not len(wrong):
            return end
        # Its length is wrong: it goes no further than there is something in it.
        return first + int(np.flatnonzero(~is_table)[0])

    def _look_at_table(self, clusters: I64) -> tuple[Mask, Mask]:
        """Which of the *clusters* of the refcount table are empty, and which look like its part.

        The first of them holds a refcount of the header, at least.
        """
        size, base = self._geometry.cluster_size, self._layout.header.refcount_table_offset
        is_empty, is_table = np.zeros((2, len(clusters)), dtype=np.bool_)
        of, block, place = (np.zeros(0, dtype=np.int64) for _ in range(3))
        for part, rows in read_tables(self._source, clusters * size, size):
            words = entries.decode_words(rows)
            offset = words & np.uint64(entries.REFTABLE_OFFSET)
            sound = (words != 0) & ((words & np.uint64(entries.REFTABLE_RESERVED)) == 0)
            sound &= offset % np.uint64(size) == 0
            sound &= offset < np.uint64(self._layout.file_size)
            used = np.count_nonzero(words, axis=1)
            is_empty[part] = (used == 0) & (clusters[part] * size > base)
            sound &= (np.count_nonzero(sound, axis=1) * 2 >= used)[:, None]
            sound &= np.cumsum(sound, axis=1, dtype=np.int32) <= _ENTRIES_READ
            row, entry = np.nonzero(sound)
            of = np.append(of, part.start + row)
            block = np.append(block, (clusters[part.start + row] * size - base) // 8 + entry)
            place = np.append(place, offset[row, entry].astype(np.int64))
        # Of a table that is one mostly the first of its blocks is.
        is_first = np.diff(of, prepend=-1) != 0
        for some in (is_first, ~is_first):
            asked = np.flatnonzero(some & ~is_table[of])
            is_table[of[asked][self._may_be_blocks(place[asked], block[asked])]] = True
        return is_empty, is_table

    def _may_be_blocks(self, offsets: I64, blocks: I64) -> Mask:
        """Whether what lies at each of *offsets* may be the refcount block of that index.

        It goes by the clusters that are in use: others may leak. Behind the end of a file that is
        whole there are none, and no refcounts.
        """
        per_block = self._geometry.refblock_entries
        low, high = self._mismatches.index.count_before(np.stack((blocks, blocks + 1)) * per_block)
        # Of a block none of the clusters of which is in the file it is the same at each index.
        behind = np.maximum(0, self._layout.host_clusters + 1 - blocks * per_block)
        asked = np.stack((offsets, np.where(low < high, blocks, -1), behind * (not self._is_cut)))
        _, first, which = np.unique(asked, axis=1, return_index=True, return_inverse=True)
        result: Mask = self._are_blocks(offsets[first], blocks[first])[which.reshape(-1)]
        return result

    def _are_blocks(self, offsets: I64, blocks: I64) -> Mask:
        """The same of each by itself."""
        size, per_block = self._geometry.cluster_size, self._geometry.refblock_entries
        first = blocks * per_block
        ends = self._mismatches.index.count_before(np.stack((first, first + per_block)))
        in_use, agreeing = self._count_used(*ends), np.zeros(len(blocks), dtype=np.int64)
        in_file = np.argsort(offsets, kind="stable")
        # What is a hole says of no cluster that it is in use.
        in_file = in_file[present_tables(self._source, offsets[in_file], size)]
        step = max(1, _BYTES_WEIGHED // size)
        for start in range(0, len(in_file), step):
            some = in_file[start : start + step]
            agreeing[some], behind = self._weigh(offsets[some], first[some])
            in_use[some] += behind
        result: Mask = agreeing * _AGREEING_OF >= in_use
        return result

    def _weigh(self, offsets: I64, first: I64) -> tuple[I64, I64]:
        """Of blocks at ascending *offsets*, for the clusters from *first* on: of how many that are
        in use they say what the census counts, and how many they count behind a file that is whole.
        """
        index, order = self._mismatches.index, self._geometry.refcount_order
        agreeing, counted_behind = np.zeros((2, len(offsets)), dtype=np.int64)
        parts = TableParts.of(self._source, offsets, self._geometry.cluster_size)
        place, per_part = parts.offsets[parts.table] + parts.inside, parts.size << 3 >> order
        # As many refcounts at a time as fit into a cache.
        batch = _REFCOUNTS_A_BATCH << order >> 3
        for part, rows in read_tables(self._source, place, parts.size, batch):
            which = parts.table[part]
            begin = first[which] + (parts.inside[part] << 3 >> order)
            low, high = index.count_before(np.stack((begin, begin + per_part)))
            slots = expand_ranges(low, high - 1)
            row = np.repeat(np.arange(len(rows)), high - low)
            counted = self._mismatches.counted[slots]
            used = counted != 0
            slots, row, counted = slots[used], row[used], counted[used]
            asked = row * per_part + index.clusters_of(slots) - begin[row]
            agree = read_refcount_in_block(rows.reshape(-1), asked, order) == counted
            np.add.at(agreeing, which, np.bincount(row[agree], minlength=len(rows)))
            if not self._is_cut:
                behind = np.maximum(0, self._layout.host_clusters + 1 - begin)
                for at in np.flatnonzero(behind < per_part).tolist():
                    counted_behind[which[at]] += count_from(rows[at], int(behind[at]), order)
        return agreeing, counted_behind

    def _count_used(self, low: I64, high: I64) -> I64:
        """How many of the slots low[i] to high[i] - 1 have a reference, of many such ranges.

        They are of refcount blocks: two have all slots in common, or none.
        """
        ranges, which = distinct_columns(np.stack((low, high)))
        counted = self._mismatches.counted
        used = [np.count_nonzero(counted[start:end]) for start, end in ranges.T.tolist()]
        return np.array(used, dtype=np.int64)[which]

    @cached_property
    def _is_cut(self) -> bool:
        """Whether the file seems to have been longer."""
        lost = {FindingKind.PAST_END, FindingKind.CUT_OFF}
        return bool(lost & self._report.counts().keys())

    def blocks_that_are_none(self) -> I64:
        """Indices of the refcount blocks in whose place something else lies.

        Only in those with a wrong refcount; of very many, all behind the first are taken for one.
        """
        per_block, table = self._geometry.refblock_entries, Reftable(self._source, self._layout)
        kinds = (FindingKind.LEAK, FindingKind.REFCOUNT_LOW, FindingKind.REFCOUNT_MISSING)
        wrong = self._mismatches.blocks(per_block, *kinds)
        sound = table.blocks()
        known, at, _ = np.intersect1d(table.index[sound], wrong, return_indices=True)
        places = table.offset[sound[at]][:_BLOCKS_READ]
        few = known[:_BLOCKS_READ]
        return np.concatenate((few[~self._may_be_blocks(places, few)], known[_BLOCKS_READ:]))
