"""Traces that lost entries leave in the tables and clusters around them.

QEMU hands clusters out in the order of the file, and writes every table that it holds before it
makes another. So what lies between two neighbours, and before a table that is newer, had its entry:
a machine that died leaves clusters without one only where the file was growing. Numpy over batches
of tables; nothing here knows where in an image they stand.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from planner.arrays import I64, Mask
from planner.qcow2 import entries
from planner.qcow2.geometry import Geometry
from planner.source import SECTOR
from planner.triage.table_entries import TableEntries


@dataclass(slots=True)
class Traces:
    """What tables tell of *homeless* clusters, ascending: those with data that no table leads to.

    ``is_discarded``: which of them lie beside what a discard has left, so that one took them, too.
    """

    geometry: Geometry
    homeless: I64
    is_discarded: Mask = field(init=False)
    _tables: list[I64] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.is_discarded = np.zeros(len(self.homeless), dtype=np.bool_)

    def lacking(self, filled: TableEntries) -> Mask:
        """Which of the tables lack entries that must have been there.

        *filled*: all of theirs that are not empty. What they say of clusters elsewhere is
        remembered.
        """
        count = len(filled.offset)
        if not len(self.homeless):
            return np.zeros(count, dtype=np.bool_)
        bits, words = self.geometry.cluster_bits, filled.words
        is_packed = (words & np.uint64(entries.COMPRESSED)) != 0
        packed, _ = entries.compressed_ranges(words, self.geometry)
        hosts = np.where(is_packed, packed, entries.l2_offsets(words)) >> bits
        own = filled.offset >> bits
        newest = np.zeros(count, dtype=np.int64)
        np.maximum.at(newest, filled.row, hosts)
        self._tables.append(own[newest > own])
        says_zeros = filled.count(hosts == 0) > 0
        lacking = self._are_parted(filled, hosts)
        # With entries, and not the first: that one led to the cluster behind the table.
        lacking |= (newest > own + 1) & np.isin(own + 1, self.homeless) & ~says_zeros
        if self.geometry.version > 2:  # An older one discards without a trace.
            lacking |= self._are_holed(filled, hosts)
        self._mark_discarded(filled, hosts, own[says_zeros])
        return lacking

    def older(self, used: I64) -> I64:
        """The homeless clusters that a table was made after, which holds what came after it.

        Not where one of the clusters between the two is free, none of *used*, ascending: what is
        free is handed out first, and the file may have been growing there.
        """
        tables = np.sort(np.concatenate([*self._tables, self.homeless[:0]]))
        at = np.searchsorted(tables, self.homeless)
        newer = np.append(tables, -1)[at]
        is_older = newer >= 0
        first, last = (
            np.searchsorted(used, place) for place in (self.homeless[is_older], newer[is_older])
        )
        is_older[is_older] = last - first == newer[is_older] - self.homeless[is_older]
        older: I64 = self.homeless[is_older & ~self.is_discarded]
        return older

    def _are_parted(self, filled: TableEntries, hosts: I64) -> Mask:
        """In which tables entries end at the border of a sector, and what would go on is homeless.

        Storage loses sectors and pages, a machine that dies does not stop at their borders.
        """
        per_sector = SECTOR // self.geometry.l2_entry_size
        before, behind = _have_neighbours(filled)
        parted: Mask = np.zeros(len(filled.offset), dtype=np.bool_)
        ends = (filled.at + 1) % per_sector == 0
        ends &= (filled.at + 1 < self.geometry.l2_entries) & ~behind
        begins = (filled.at % per_sector == 0) & (filled.at > 0) & ~before
        for is_end, step in ((ends, 1), (begins, -1)):
            at = np.flatnonzero(is_end & (hosts != 0))
            parted[filled.row[at[np.isin(hosts[at] + step, self.homeless)]]] = True
        return parted

    def _are_holed(self, filled: TableEntries, hosts: I64) -> Mask:
        """In which tables homeless clusters fit exactly between two entries."""
        gap, step = np.diff(filled.at) - 1, np.diff(hosts) - 1
        fits = (np.diff(filled.row) == 0) & (gap > 0) & (gap == step) & (hosts[:-1] != 0)
        low = np.searchsorted(self.homeless, hosts[:-1][fits] + 1)
        high = np.searchsorted(self.homeless, hosts[1:][fits])
        fits[fits] = high - low == gap[fits]
        holed: Mask = np.zeros(len(filled.offset), dtype=np.bool_)
        holed[filled.row[:-1][fits]] = True
        return holed

    def _mark_discarded(self, filled: TableEntries, hosts: I64, own: I64) -> None:
        """Runs of homeless clusters beside an entry whose neighbour says zeros, and has none.

        *own*: the clusters of the tables that have such.
        """
        starts = np.flatnonzero(np.diff(self.homeless, prepend=-2) != 1)
        ends = np.append(starts[1:], len(self.homeless)) - 1
        is_zero, (has_before, has_behind) = hosts == 0, _have_neighbours(filled)
        before = np.where(has_before, np.roll(hosts, 1), 0)[is_zero & (filled.at > 0)]
        after = np.roll(hosts, -1)[is_zero & has_behind]
        known = np.isin(self.homeless[starts] - 1, np.concatenate((own, before)))
        known |= np.isin(self.homeless[ends] + 1, after[after != 0])
        if known.any():
            self.is_discarded |= np.repeat(known, ends - starts + 1)


def _have_neighbours(found: TableEntries) -> tuple[Mask, Mask]:
    """Which entries follow the one before in its table, and which are followed by the next."""
    follows = np.zeros(len(found.at) + 1, dtype=np.bool_)
    follows[1:-1] = (np.diff(found.at) == 1) & (np.diff(found.row) == 0)
    return follows[:-1], follows[1:]
