"""Counts L2 tables that map nothing but whole aligned data clusters inside the file.

Most tables do, and nothing but the COPIED flag can be wrong with them. So their entries are not
decoded one by one: runs of adjacent clusters are counted by their ends, all else by cluster numbers
alone. Everything else is counted by `planner.check.entry_counter`, which counts these alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from planner.arrays import I64, U64, Mask, expand_ranges
from planner.check.census import Census
from planner.check.entry_rules import contradicts_refcount
from planner.findings.kinds import FindingKind
from planner.metadata.mapping_tables import Batch
from planner.metadata.refcounts import StoredRefcounts
from planner.qcow2 import entries
from planner.qcow2.geometry import Geometry

RUN_SHIFT = 9
"""Tables with fewer than one run of adjacent clusters in 2^9 entries are counted run by run."""

LONG_RUN = 64
"""From so many clusters on, a run is added to the counters on its own."""


@dataclass(frozen=True, slots=True)
class Runs:
    """Runs of plain entries that map adjacent clusters with the same COPIED flag.

    ``start``: flat position of the first entry. ``first``: its cluster, or the slot of that.
    """

    start: I64
    first: I64
    length: I64
    copied: Mask

    def select(self, which: Mask) -> Runs:
        return Runs(*(getattr(self, name)[which] for name in self.__slots__))

    def gaps(self, width: int) -> int:
        """At how many entries, but the first of a table of *width*, the clusters do not go on.

        A run also ends where only the COPIED flag changes: that is no gap.
        """
        gap = (self.start[1:] % width != 0) & (np.diff(self.first) != self.length[:-1])
        return int(np.count_nonzero(gap))

    def entries(self) -> tuple[I64, I64, Mask]:
        """Position, cluster (or slot) and COPIED flag of every single entry."""
        return (
            expand_ranges(self.start, self.start + self.length - 1),
            expand_ranges(self.first, self.first + self.length - 1),
            np.repeat(self.copied, self.length),
        )


def unusual_bits(geometry: Geometry) -> np.uint64:
    """The bits of which a plain entry has none."""
    plain = entries.COPIED | (entries.L2_OFFSET & ~(geometry.cluster_size - 1))
    return np.uint64(~plain & ((1 << 64) - 1))


def plain_clusters(words: U64, cluster_bits: int) -> I64:
    """The cluster numbers of plain entries; of others some number."""
    clusters = words << np.uint64(1)
    clusters >>= np.uint64(cluster_bits + 1)
    return clusters.view(np.int64)


class PlainCounter:
    """Counts into a census. *stored*: what COPIED flags are compared with."""

    def __init__(self, census: Census, stored: StoredRefcounts) -> None:
        self._census, self._stored = census, stored
        geometry = census.layout.geometry
        self._size, self._bits, self._width = (
            geometry.cluster_size, geometry.cluster_bits, geometry.l2_entries,
        )  # fmt: skip
        self._unusual = unusual_bits(geometry)

    def are_plain(self, words: U64) -> Mask:
        """Which tables (rows) are; an entry of 0 is, too."""
        joined = np.bitwise_or.reduce(words, axis=1)
        plain: Mask = (joined & self._unusual) == 0
        plain &= self._clusters(words).max(axis=1) < self._census.layout.whole_clusters
        return plain

    def count(self, batch: Batch, words: U64) -> None:
        """Count tables that `are_plain`."""
        runs = self.find_runs(words)
        if runs is None:
            self.count_clusters(batch, words, self._clusters(words))
        else:
            self.count_runs(batch, runs)

    # ---- run by run ----

    def find_runs(self, words: U64) -> Runs | None:
        """The runs of plain tables that are full; None where they are not, or the runs are many.

        In a run each entry is the one before it plus a cluster, so that its first and last entry
        say everything: one subtraction an entry, where decoding takes several passes.
        """
        flat = words.reshape(-1)
        jump = np.subtract(flat[1:], flat[:-1]) != self._size
        if np.count_nonzero(jump) > flat.size >> RUN_SHIFT:
            return None
        start = np.concatenate((np.zeros(1, dtype=np.int64), np.flatnonzero(jump) + 1))
        length = np.diff(start, append=flat.size)
        head = flat[start]
        tail = head + ((length - 1) << self._bits).astype(np.uint64)
        first = entries.l2_offsets(head) >> self._bits
        is_sound = ((head | tail) & self._unusual) == 0
        is_sound &= (first != 0) & (first + length <= self._census.layout.whole_clusters)
        if not is_sound.all():
            return None
        return Runs(start, first, length, head >= np.uint64(entries.COPIED))

    def count_runs(self, batch: Batch, runs: Runs) -> None:
        """Count tables with these runs."""
        guest = self._census.guest
        guest.allocated += batch.active * int(runs.length.sum())
        guest.fragmented += batch.active * runs.gaps(self._width)
        runs = replace(runs, first=self._census.index.slots_of(runs.first))
        long = runs.select(runs.length >= LONG_RUN)
        for counts, amount in self._census.targets(batch):
            counts.add_runs(long.first, long.length, amount)
        if batch.copied:
            self._check_runs(batch, long)
        if len(long.first) < len(runs.first):
            self._count_slots(batch, *runs.select(runs.length < LONG_RUN).entries())

    def _check_runs(self, batch: Batch, runs: Runs) -> None:
        """Judge the COPIED flags of runs: of each as a whole, then of those that do not fit."""
        stored = self._stored.values
        unfit = np.zeros(len(runs.first), dtype=np.bool_)
        columns = (runs.first.tolist(), runs.length.tolist(), runs.copied.tolist())
        for number, (slot, length, copied) in enumerate(zip(*columns, strict=True)):
            is_one = stored.are_one(slice(slot, slot + length))
            unfit[number] = not is_one.all() if copied else is_one.any()
        if unfit.any():
            self._check_slots(batch, *runs.select(unfit).entries())

    # ---- entry by entry ----

    def find_clusters(self, words: U64) -> I64 | None:
        """The cluster numbers of plain tables, 0 where unallocated; None where they are not."""
        if np.bitwise_or.reduce(words, axis=None) & self._unusual:
            return None
        clusters = self._clusters(words)
        return clusters if int(clusters.max()) < self._census.layout.whole_clusters else None

    def _clusters(self, words: U64) -> I64:
        return plain_clusters(words, self._bits)

    def count_clusters(self, batch: Batch, words: U64, clusters: I64) -> None:
        """Count the entries of tables with these cluster numbers one by one."""
        flat, word = clusters.reshape(-1), words.reshape(-1)
        is_full = np.count_nonzero(flat) == flat.size
        positions = np.arange(flat.size) if is_full else np.flatnonzero(flat)
        if not is_full:
            flat, word = flat[positions], word[positions]
        if not flat.size:
            return
        if batch.active:
            jumps = np.diff(flat) != 1
            # Numbers of two tables differ above the width, which is a power of two.
            jumps &= (positions[1:] ^ positions[:-1]) < self._width
            guest = self._census.guest
            guest.allocated += batch.active * flat.size
            guest.fragmented += batch.active * int(np.count_nonzero(jumps))
        slots = self._census.index.slots_of(flat)
        self._count_slots(batch, positions, slots, word >= np.uint64(entries.COPIED))

    def _count_slots(self, batch: Batch, positions: I64, slots: I64, copied: Mask) -> None:
        """Count plain entries one by one, in the order of the tables."""
        distinct = bool((np.diff(slots) > 0).all())
        for counts, amount in self._census.targets(batch):
            (counts.add_distinct if distinct else counts.add)(slots, amount)
        if batch.copied:
            self._check_slots(batch, positions, slots, copied)

    def _check_slots(self, batch: Batch, positions: I64, slots: I64, copied: Mask) -> None:
        """Judge the COPIED flags of plain entries one by one."""
        is_one, unreadable = (
            self._stored.values.are_one(slots),
            self._stored.unreadable_slots(slots),
        )
        wrong = contradicts_refcount(copied, is_one, unreadable)
        if wrong.any():
            where = batch.positions(positions[wrong], self._width)
            self._census.findings.add(FindingKind.L2_COPIED, where, copied[wrong])


def has_plain_bitmaps(words: U64, bitmaps: U64 | None) -> bool:
    """Whether no subcluster bitmap of entries that are not compressed contradicts anything."""
    if bitmaps is None:
        return True
    if ((bitmaps >> np.uint64(32)) & bitmaps).any():
        return False
    allocated = (bitmaps & np.uint64(entries.SUBCLUSTERS_ALLOCATED)) != 0
    return not ((words & np.uint64(entries.L2_OFFSET) == 0) & allocated).any()
