"""Entries that lead where chance led them, in tables that have no others.

A table that lost its entries may have words all the same: a bit that flipped since, a word that
was written astray. They are none of its own, and so it is lost like one of nothing but zeros; and
what such a word leads to may have lost a reference that it makes up for. Words in, masks out.
"""

from __future__ import annotations

import numpy as np

from planner.arrays import (
    I64,
    U64,
    Mask,
    count_each,
    distinct,
    expand_ranges,
    is_among,
    rows_in_order,
)
from planner.check.report import Report
from planner.findings.kinds import FindingKind, Structure
from planner.metadata.gone_tables import GoneTables
from planner.metadata.refcounts import Reftable, StoredRefcounts
from planner.qcow2 import entries
from planner.source import READABLE_END, SECTOR, Source
from planner.triage.table_entries import TableEntries


class Strays:
    """Tells the stray entries of L2 tables of the image that *report* is about.

    An entry that could never have been one is `wrong`. One whose cluster has another owner as well
    is in doubt: of the two, one is.
    """

    def __init__(self, source: Source, report: Report) -> None:
        self._source, self._report, self._geometry = source, report, report.geometry
        self._gone = GoneTables(report.geometry, report.layout.file_size if report.layout else 0)
        contested = report.findings.of(FindingKind.MULTIPLE_OWNERS).host_offset
        self._contested = distinct(contested >> report.geometry.cluster_bits)
        self._shared_bits: int | None = None
        self._wrong: list[I64] = []

    def wrong(self, words: U64, bitmaps: U64 | None, filled: Mask) -> Mask:
        """Which of the *filled* entries are none, wherever they lead."""
        bad = entries.COMPRESSED | entries.L2_RESERVED | self._unaligned | self._gone.beyond
        copied = np.uint64(entries.COPIED)
        # The disk's own are sound at a glance.
        wrong: Mask = filled & (words & (copied | np.uint64(bad)) != copied)
        wrong[wrong] = self._are_wrong(words[wrong])
        if bitmaps is not None:  # What is allocated is so in a cluster.
            allocated = (bitmaps & np.uint64(entries.SUBCLUSTERS_ALLOCATED)) != 0
            wrong |= allocated & (words == 0)
        return wrong

    def _are_wrong(self, words: U64) -> Mask:
        unusual = np.uint64(entries.L2_RESERVED | self._unaligned)
        is_packed = (words & np.uint64(entries.COMPRESSED)) != 0
        _, size = entries.compressed_ranges(words, self._geometry)
        too_long = is_packed & (size >= self._geometry.cluster_size + SECTOR)
        wrong: Mask = ~is_packed & ((words & unusual) != 0)
        wrong |= self._gone.wild_l2(words) | self._are_single_bits(words) | too_long
        return wrong

    @property
    def _unaligned(self) -> int:
        return entries.L2_OFFSET & (self._geometry.cluster_size - 1)

    def alone(self, found: TableEntries, filled: Mask, wrong: Mask) -> Mask:
        """Which tables have entries, and none that leads to a cluster of its own beyond doubt.

        A bit says that a cluster reads as zeros, too. Where those that are *wrong* lead is
        remembered. Both masks are of the entries *found*; the answer is of their tables.
        """
        own = np.flatnonzero(filled & ~wrong & ((found.words & ~np.uint64(entries.ZERO)) != 0))
        sound: Mask = np.zeros(len(found.offset), dtype=np.bool_)
        # Most tables show it by the first that they have.
        is_first = np.diff(found.row[own], prepend=-1) != 0
        for some in (own[is_first], own[~is_first]):
            left = some[~sound[found.row[some]]]
            sound[found.row[left][~self._are_contested(found.words[left])]] = True
        alone: Mask = ~sound & (found.count(filled) > 0)
        first, last = self._ranges(found.words[wrong & alone[found.row]])
        counts = last << self._geometry.cluster_bits < self._gone.file_size
        self._wrong.append(expand_ranges(first[counts], last[counts]))  # past the end none does
        return alone

    def _are_contested(self, words: U64) -> Mask:
        return is_among(self._ranges(words)[0], self._contested)

    def single_bits(self, found: TableEntries, wrong: Mask) -> I64:
        """Which *wrong* entries of those *found* are one bit that leads into the file, or the flag
        of a cluster that they do not name: QEMU never writes it alone.

        The offset of the table, and the number of the entry in it; (2, n).
        """
        found = found.select(wrong)
        single = (
            found.words & ~np.uint64(entries.L2_OFFSET) | found.words & (found.words - np.uint64(1))
        ) == 0
        single &= (found.words & np.uint64(self._unaligned)) == 0
        single &= found.words < np.uint64(self._gone.file_size)
        single |= found.words == np.uint64(entries.COPIED)
        return np.stack((found.offset[found.row[single]], found.at[single]))

    def hidden_references(self) -> int:
        """How many references clusters have lost that stray entries make up for."""
        mismatches = self._report.mismatches
        contested = self._contested
        values, times = count_each(np.concatenate([*self._wrong, contested[:0]]))
        alone = values.astype(np.int64)
        is_other = ~is_among(alone, contested)
        alone, times = alone[is_other], times[is_other]
        clusters = np.concatenate((contested, alone))
        if mismatches is None or not len(clusters):
            return 0
        # Of several owners one is right.
        strays = np.concatenate((count_owners(self._report, contested) - 1, times))
        slots, known = mismatches.index.find(clusters)
        slots, strays = slots[known], np.maximum(strays[known], 0)
        stored, counted = (
            np.minimum(values[slots].astype(np.uint64), 1 << 62).astype(np.int64)
            for values in (mismatches.stored, mismatches.counted)
        )
        # As many as are counted too many without the strays, but for those that are so with them.
        lost = np.maximum(stored - np.maximum(counted - strays, 0), 0)
        return int((lost - np.maximum(stored - counted, 0)).sum())

    def _are_single_bits(self, words: U64) -> Mask:
        """Which words are one bit that was set, and no more.

        QEMU writes such a word where a cluster reads as zeros; or where a cluster that is shared
        with a snapshot happens to lie there, and has the refcount to show it.
        """
        single: Mask = (words != 0) & ((words & (words - np.uint64(1))) == 0)
        if self._geometry.external_data:  # What lies there has no refcount in this file.
            return np.zeros_like(single)
        single &= (words & np.uint64(self._usual_bits(words[single]))) == 0
        return single

    def _usual_bits(self, words: U64) -> int:
        """The bits that may stand alone in an entry, as far as one of *words* has them."""
        has_flag = self._geometry.version > 2 and not self._geometry.extended_l2
        usual = entries.ZERO if has_flag else 0
        if self._shared_bits is None and ((words & np.uint64(entries.L2_OFFSET)) != 0).any():
            self._shared_bits = self._find_shared()
        return usual | (self._shared_bits or 0)

    def _find_shared(self) -> int:
        """The bits that are the host offset of a cluster that is used, or counted, repeatedly."""
        layout, bits = self._report.layout, self._geometry.cluster_bits
        mismatches = self._report.mismatches
        if layout is None or mismatches is None:
            return 0
        offsets = np.int64(1) << np.arange(bits, READABLE_END.bit_length() - 1, dtype=np.int64)
        stored = StoredRefcounts(self._source, layout, Reftable(self._source, layout))
        shared = stored.look_up(offsets >> bits) > 1
        shared |= mismatches.count_references(offsets >> bits) > 1
        return int(np.bitwise_or.reduce(offsets[shared], initial=0))

    def _ranges(self, words: U64) -> tuple[I64, I64]:
        """The first and the last host cluster that each entry refers to; none before the first
        where it refers to none.
        """
        types = entries.cluster_types(words, self._geometry)
        offset, size = entries.host_ranges(words, types, self._geometry)
        first, last = offset >> self._geometry.cluster_bits, offset + size - 1
        return first, np.where(size > 0, last >> self._geometry.cluster_bits, first - 1)


def count_owners(report: Report, clusters: I64) -> I64:
    """How many things have each of *clusters*, but for refcounts; those of contested ones only.

    Of a snapshot and of the disk it is one guest cluster.
    """
    owners = report.owners
    others = np.flatnonzero(~np.isin(owners.structure, (Structure.REFTABLE, Structure.REFBLOCK)))
    columns = (owners.cluster, owners.structure, owners.l1_index, owners.l2_index)
    order, new = rows_in_order(*(column[others] for column in columns))
    one_each = owners.cluster[others][order][new]
    low, high = (np.searchsorted(one_each, clusters, side=side) for side in ("left", "right"))
    count: I64 = high - low
    return count
