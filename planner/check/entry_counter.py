"""Counts L2 entries of every type, and reports those that break a rule.

Each entry is decoded and judged by `planner.check.entry_rules`. Most tables need not be: see
`planner.check.plain_counter`. Source: check_refcounts_l2 and qcow2_inc_refcounts_imrt for what
counts when an entry is damaged.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from planner.arrays import I64, U64, Mask, expand_ranges
from planner.check.census import Census
from planner.check.entry_rules import L2_RULES, L2Columns, contradicts_refcount
from planner.check.plain_counter import plain_clusters, unusual_bits
from planner.findings.kinds import ACTIVE, FindingKind, Structure
from planner.metadata.mapping_tables import Batch
from planner.metadata.refcounts import StoredRefcounts
from planner.qcow2 import entries


class EntryCounter:
    """Counts into a census. *stored*: what COPIED flags are compared with."""

    def __init__(self, census: Census, stored: StoredRefcounts) -> None:
        self._census, self._stored = census, stored
        self._geometry, self._width = census.layout.geometry, census.layout.geometry.l2_entries
        self._unusual = unusual_bits(self._geometry)

    def count_tables(
        self,
        batch: Batch,
        words: U64,
        bitmaps: U64 | None,
        to_positions: Callable[[I64], I64] = lambda flat: flat,
    ) -> None:
        """Count the entries of whole tables, uint64 (tables, entries).

        Or of parts of tables, where *to_positions* gives, of flat positions in these, those in the
        tables of *batch*; of a table all parts together, for what its neighbours are is judged.
        """
        flat = words.reshape(-1)
        if bitmaps is None and np.count_nonzero(flat) == flat.size:
            self.count_entries(batch, to_positions(np.arange(flat.size)), flat)
        elif bitmaps is None:
            at = np.flatnonzero(flat)
            self.count_entries(batch, to_positions(at), flat[at])
        else:
            bitmap = bitmaps.reshape(-1)
            at = np.flatnonzero(flat | bitmap)
            self.count_entries(batch, to_positions(at), flat[at], bitmap[at])

    def count_entries(
        self, batch: Batch, positions: I64, words: U64, bitmaps: U64 | None = None
    ) -> None:
        """Count single entries, none of them 0, at flat *positions* in the tables of *batch*.

        Even in a table that is badly damaged most are plain: only the others are decoded.
        """
        plain, clusters = self._plain(words, bitmaps)
        odd = np.flatnonzero(~plain)
        bitmap = None if bitmaps is None else bitmaps[odd]
        entry = L2Columns.of(words[odd], bitmap, self._census.layout, self._stored)
        self._judge(batch, positions[odd], entry)
        clusters[odd] = 0  # which has a slot, so that all can be looked up together
        slots = self._census.index.slots_of(clusters)
        if batch.copied:
            self._judge_copied(batch, positions, words, slots, (odd, entry))
        if batch.active:
            offset, has_data = clusters << self._geometry.cluster_bits, plain.copy()
            offset[odd], has_data[odd] = entry.offset, entry.has_cluster
            self._count_guest(batch, positions[has_data], offset[has_data], entry)
        self._count_references(batch, entry)
        self._census.count(batch, slots[plain])

    def _plain(self, words: U64, bitmaps: U64 | None) -> tuple[Mask, I64]:
        """Which map a whole aligned cluster inside this file, and the clusters of those."""
        clusters = plain_clusters(words, self._geometry.cluster_bits)
        if bitmaps is not None or self._geometry.external_data:
            return np.zeros(len(words), dtype=np.bool_), clusters
        plain: Mask = (words & self._unusual) == 0
        plain &= (clusters < self._census.layout.whole_clusters) & (clusters != 0)
        return plain, clusters

    def _judge(self, batch: Batch, positions: I64, entry: L2Columns) -> None:
        """Report what breaks a rule, but for COPIED flags."""
        census = self._census
        for rule in L2_RULES:
            if rule.kind is FindingKind.L2_COPIED:
                continue
            at = np.flatnonzero(rule.breaks(entry))
            if len(at):
                where = batch.positions(positions[at], self._width)
                census.findings.add(rule.kind, where, rule.found(entry)[at], rule.structure)
        if (entry.bytes_past_end > 0).any():
            self._report_cut_data(batch, positions, entry)
            self._report_cut_compressed(batch, positions, entry)

    def _judge_copied(
        self,
        batch: Batch,
        positions: I64,
        words: U64,
        slots: I64,
        odd: tuple[I64, L2Columns],
    ) -> None:
        """Report wrong COPIED flags of all entries together: neighbours are one finding.

        *slots*: of the clusters of plain ones; *odd*: which the others are, and these.
        """
        copied = words >= np.uint64(entries.COPIED)
        is_one, unreadable = (
            self._stored.values.are_one(slots),
            self._stored.unreadable_slots(slots),
        )
        wrong = contradicts_refcount(copied, is_one, unreadable)
        at, others = odd
        wrong[at] = others.copied_is_wrong
        at = np.flatnonzero(wrong)
        if len(at):
            where = batch.positions(positions[at], self._width)
            self._census.findings.add(FindingKind.L2_COPIED, where, copied[at])

    def _count_guest(self, batch: Batch, positions: I64, offset: I64, odd: L2Columns) -> None:
        """Add to the guest's counters; in each table fragmentation begins anew.

        *positions*, *offset*: of all entries that have a cluster; *odd*: those that are not plain.
        """
        guest, packed = self._census.guest, odd.is_counted & odd.is_compressed
        compressed = batch.active * int(np.count_nonzero(packed))
        jumps = np.diff(offset) != self._geometry.cluster_size
        # Positions in two tables differ above the width, which is a power of two.
        jumps &= (positions[1:] ^ positions[:-1]) < self._width
        guest.compressed += compressed
        guest.allocated += compressed + batch.active * len(offset)
        guest.fragmented += compressed + batch.active * int(np.count_nonzero(jumps))

    def _count_references(self, batch: Batch, entry: L2Columns) -> None:
        """Add to the counters of all clusters that entries touch, which may be several."""
        census, inside = self._census, entry.is_counted & ~entry.is_past_end
        if (entry.is_compressed & ~entry.is_compressed_elsewhere).any():
            census.separate_mapped()
            slots = self._slots(entry, np.flatnonzero(inside & entry.is_compressed))
            census.references.add(slots, batch.weight)
            census.mark_compressed(slots)
        census.count(batch, self._slots(entry, np.flatnonzero(inside & entry.has_cluster)))

    def _slots(self, entry: L2Columns, which: I64) -> I64:
        """Slots of the clusters that entries touch, with repeats."""
        bits, offset, size = self._geometry.cluster_bits, entry.offset[which], entry.size[which]
        clusters = expand_ranges(offset >> bits, (offset + size - 1) >> bits)
        return self._census.index.slots_of(clusters)

    # ---- where the file ends ----

    def _report_cut_data(self, batch: Batch, positions: I64, entry: L2Columns) -> None:
        """Data clusters that the file ends in. QEMU counts them, and reads zeros past the end."""
        at = np.flatnonzero(entry.is_cut_data)
        if not len(at):
            return
        where = batch.positions(positions[at], self._width)
        table, inside = np.divmod(where, self._width)
        tables, geometry = self._census.tables, self._geometry
        guest = (tables.l1_index[table] * self._width + inside) << geometry.cluster_bits
        needed = entry.bytes_needed(at)
        # Past the end of the disk nobody reads; where a snapshot's disk ends is not looked at.
        left = np.minimum(needed, geometry.virtual_size - guest)
        needed = np.where(tables.snapshot[table] == ACTIVE, left, needed)
        lost = needed - (geometry.cluster_size - entry.bytes_past_end[at])
        cut = lost > 0
        self._census.findings.add(FindingKind.CUT_OFF, where[cut], lost[cut], Structure.DATA)

    def _report_cut_compressed(self, batch: Batch, positions: I64, entry: L2Columns) -> None:
        """Compressed clusters that the file ends in."""
        at = np.flatnonzero(entry.is_cut_compressed)
        where, lost = batch.positions(positions[at], self._width), entry.bytes_past_end[at]
        self._census.findings.add(FindingKind.CUT_OFF, where, lost, Structure.COMPRESSED)
