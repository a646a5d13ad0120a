"""Traces that lost entries leave in the tables and clusters around them.

QEMU hands clusters out in the order of the file, and writes every table that it holds before it
makes another. So what lies between two neighbours, and before a table that is newer, had its entry:
a machine that died leaves clusters without one only where the file was growing. Numpy over batches
of tables; nothing here knows where in an image they stand.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from planner.arrays import I64, U64, Mask
from planner.qcow2 import entries
from planner.qcow2.geometry import Geometry
from planner.source import SECTOR


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

    def lacking(self, offsets: I64, words: U64, filled: Mask) -> Mask:
        """Which of the tables at *offsets* lack entries that must have been there.

        *words*: uint64 (tables, entries), *filled*: which entries are not empty. What they say of
        clusters elsewhere is remembered.
        """
        if not len(self.homeless):
            return np.zeros(len(offsets), dtype=np.bool_)
        bits = self.geometry.cluster_bits
        is_packed = (words & np.uint64(entries.COMPRESSED)) != 0
        packed, _ = entries.compressed_ranges(words, self.geometry)
        hosts = np.where(is_packed, packed, entries.l2_offsets(words)) >> bits
        own = offsets >> bits
        newest = hosts.max(axis=1, initial=0)
        self._tables.append(own[newest > own])
        is_zero = filled & (hosts == 0)
        lacking = self._are_parted(hosts, filled)
        lacking |= self._are_bare(own, hosts) & ~is_zero.any(axis=1)
        if self.geometry.version > 2:  # An older one discards without a trace.
            lacking |= self._are_holed(hosts, filled)
        self._mark_discarded(own, hosts, is_zero)
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

    def _are_parted(self, hosts: I64, filled: Mask) -> Mask:
        """In which tables entries end at the border of a sector, and what would go on is homeless.

        Storage loses sectors and pages, a machine that dies does not stop at their borders.
        """
        per_sector = SECTOR // self.geometry.l2_entry_size
        border = np.arange(per_sector, hosts.shape[1], per_sector)
        parted: Mask = np.zeros(len(hosts), dtype=np.bool_)
        for near, far, step in ((border - 1, border, 1), (border, border - 1, -1)):
            is_end = (hosts[:, near] != 0) & ~filled[:, far]
            parted |= (is_end & np.isin(hosts[:, near] + step, self.homeless)).any(axis=1)
        return parted

    def _are_bare(self, own: I64, hosts: I64) -> Mask:
        """Which tables have entries, and not their first: it led to the cluster behind them."""
        has_some = (hosts > own[:, None] + 1).any(axis=1)
        bare: Mask = has_some & np.isin(own + 1, self.homeless)
        return bare

    def _are_holed(self, hosts: I64, filled: Mask) -> Mask:
        """In which tables homeless clusters fit exactly between two entries."""
        row, at = np.nonzero(filled)
        host = hosts[row, at]
        gap, step = np.diff(at) - 1, np.diff(host) - 1
        fits = (np.diff(row) == 0) & (gap > 0) & (gap == step) & (host[:-1] != 0)
        low = np.searchsorted(self.homeless, host[:-1][fits] + 1)
        high = np.searchsorted(self.homeless, host[1:][fits])
        fits[fits] = high - low == gap[fits]
        holed: Mask = np.zeros(len(hosts), dtype=np.bool_)
        holed[row[:-1][fits]] = True
        return holed

    def _mark_discarded(self, own: I64, hosts: I64, is_zero: Mask) -> None:
        """Runs of homeless clusters beside an entry whose neighbour says zeros, and has none."""
        starts = np.flatnonzero(np.diff(self.homeless, prepend=-2) != 1)
        ends = np.append(starts[1:], len(self.homeless)) - 1
        before = [own[is_zero.any(axis=1)], hosts[:, :-1][is_zero[:, 1:]]]
        after = hosts[:, 1:][is_zero[:, :-1]]
        known = np.isin(self.homeless[starts] - 1, np.concatenate(before))
        known |= np.isin(self.homeless[ends] + 1, after[after != 0])
        if known.any():
            self.is_discarded |= np.repeat(known, ends - starts + 1)
