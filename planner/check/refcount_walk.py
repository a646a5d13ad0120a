"""Counts the references of every host cluster.

Everything that adds to a cluster's reference count is here: the walk over L2 tables, in batches and
in host order, and the regions of all other structures. Comparing the counts with the stored
refcounts is the business of `planner.check.check`. Source: docs/interop/qcow2.txt;
check_refcounts_l2 and qcow2_inc_refcounts_imrt for what counts when an entry is damaged.

The counts do not depend on the order of counting (a full counter stays full, and each reference too
many is one finding), so tables may be read in the order in which they lie in the file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from planner.arrays import I64, U8, U64, Mask, expand_ranges
from planner.check.entry_findings import EntryFindingsBuilder
from planner.check.versions import VersionCounter
from planner.findings.kinds import ACTIVE, NONE, FindingKind, Structure
from planner.metadata.cluster_counters import ClusterCounts, ClusterIndex
from planner.metadata.mapping_tables import Batch, L2Tables
from planner.metadata.refcounts import StoredRefcounts
from planner.qcow2 import entries
from planner.qcow2.entries import ClusterType
from planner.qcow2.geometry import SECTOR, SUBCLUSTERS_PER_CLUSTER
from planner.qcow2.layout import Layout
from planner.source import Source, read_tables

RUN_SHIFT = 9
"""Tables with fewer than one run of adjacent clusters in 2^9 entries are counted run by run."""

LONG_RUN = 64
"""From so many clusters on, a run is added to the counters on its own."""

MAX_SIBLING_LAG = 64
"""With how many tables before it in a batch an L2 table is compared, to find what they share."""


@dataclass(slots=True)
class GuestCounters:
    """QEMU's BlockFragInfo, for the active disk."""

    allocated: int = 0
    fragmented: int = 0
    compressed: int = 0


@dataclass(slots=True)
class Census:
    """The counts, as they grow.

    ``references``: what QEMU counts, one a slot. ``mapped``: how many different guest clusters have
    their data in a cluster; as long as that comes to the same, the same object as ``references``.
    ``compressed``: clusters that hold compressed data; None while there are none.
    """

    layout: Layout
    index: ClusterIndex
    references: ClusterCounts
    mapped: ClusterCounts
    compressed: Mask | None
    findings: EntryFindingsBuilder
    guest: GuestCounters = field(default_factory=GuestCounters)

    def mapped_twice(self, slots: slice) -> Mask:
        """Which of *slots* hold data of two guest clusters, other than compressed data alone."""
        twice: Mask = self.mapped.values[slots] > 1
        if self.compressed is not None:
            twice |= (self.mapped.values[slots] > 0) & self.compressed[slots]
        return twice

    def holds_data(self, slots: slice | I64) -> Mask:
        """Which of *slots* a guest cluster has data in."""
        holds: Mask = self.mapped.values[slots] > 0
        if self.compressed is not None:
            holds |= self.compressed[slots]
        return holds

    def separate_mapped(self) -> None:
        """From here on references and mapped differ."""
        if self.mapped is self.references:
            self.mapped = self.references.copy()


class Walker:
    """Walks L2 tables and counts what their entries refer to."""

    def __init__(
        self, source: Source, census: Census, stored: StoredRefcounts, tables: L2Tables
    ) -> None:
        self._source, self._census, self._stored, self._tables = source, census, stored, tables
        self._geometry = census.layout.geometry
        self._external = self._geometry.external_data
        self.fast = True
        """Off, every entry is judged one by one: to test the fast ways against."""
        cluster_mask = self._geometry.cluster_size - 1
        plain = entries.COPIED | (entries.L2_OFFSET & ~cluster_mask)
        self._unusual = np.uint64(~plain & ((1 << 64) - 1))

    def walk(self, which: I64, tick: Callable[[int], None]) -> None:
        """Count the tables at positions *which* of `L2Tables`. *tick* is told of the bytes read."""
        siblings = which[self._tables.sibling[which]]
        alone = which[~self._tables.sibling[which]]
        if self.fast and not self._external:
            siblings = VersionCounter(
                self._geometry,
                self._tables,
                self,
                index=self._census.index,
                references=self._census.references,
                mapped=self._census.mapped,
            ).count(self._source, siblings, tick)
        self._walk_tables(np.sort(np.concatenate((alone, siblings))), tick)
        if not self._external:
            self._walk_siblings(siblings, tick)

    def _walk_tables(self, which: I64, tick: Callable[[int], None]) -> None:
        """Count tables one by one."""
        size, tables = self._geometry.cluster_size, self._tables
        for group in tables.classes(which):
            for part, rows in read_tables(self._source, tables.offset[group.ids], size):
                self._count_batch(replace(group, ids=group.ids[part]), entries.decode_words(rows))
                tick(rows.size)

    def _walk_siblings(self, which: I64, tick: Callable[[int], None]) -> None:
        """Count into ``mapped`` what tables at the same L1 index map, once for what they share."""
        size, tables = self._geometry.cluster_size, self._tables
        which = which[np.lexsort((tables.offset[which], tables.l1_index[which]))]
        for part, rows in read_tables(self._source, tables.offset[which], size):
            words, _ = entries.split_entries(entries.decode_words(rows), self._geometry.extended_l2)
            types = entries.cluster_types(words, self._geometry)
            clusters = np.where(
                entries.has_host_cluster(types),
                entries.l2_offsets(words) >> self._geometry.cluster_bits,
                NONE,
            )
            _drop_shared(clusters, tables.l1_index[which[part]])
            slots, known = self._census.index.find(clusters[clusters >= 0])
            self._census.mapped.add(slots[known], 1)
            tick(rows.size)

    def _count_batch(self, batch: Batch, words: U64) -> None:
        """Count by the fastest way that holds for these tables; all three count alike."""
        values, bitmaps = entries.split_entries(words, self._geometry.extended_l2)
        regular = bitmaps is None or _regular_bitmaps(values, bitmaps)
        if regular and not self._external and self.fast:
            if self._count_runs(batch, values):
                return
            if not np.bitwise_or.reduce(values, axis=None) & self._unusual:
                clusters = self._clusters(values)
                if int(clusters.max()) < self._census.layout.whole_clusters:
                    self._count_plain(batch, values, clusters)
                    return
        self._count_any(batch, values, bitmaps)

    def are_plain(self, words: U64) -> Mask:
        """Which tables (rows) map nothing but whole aligned data clusters inside the file."""
        joined = np.bitwise_or.reduce(words, axis=1)
        plain: Mask = (joined & self._unusual) == 0
        plain &= self._clusters(words).max(axis=1) < self._census.layout.whole_clusters
        return plain

    def count_plain(self, batch: Batch, words: U64) -> None:
        """Count tables that `are_plain`."""
        if not self._count_runs(batch, words):
            self._count_plain(batch, words, self._clusters(words))

    def count_entries(self, batch: Batch, positions: I64, words: U64) -> None:
        """Count single entries, none of them 0, at flat *positions* in the tables of *batch*."""
        bitmaps = np.zeros(len(words), dtype=np.uint64)
        types = entries.cluster_types(words, self._geometry)
        width = self._geometry.l2_entries
        self._count_chosen(batch, _Entries(positions, width, words, bitmaps, types))

    def _count_runs(self, batch: Batch, values: U64) -> bool:
        """Count tables whose entries are a few runs of adjacent clusters; false: they are not.

        In a run each entry is the one before it plus a cluster, so that its first and last entry
        say everything: one subtraction an entry, where decoding takes several passes.
        """
        flat, width = values.reshape(-1), values.shape[1]
        size, bits = self._geometry.cluster_size, self._geometry.cluster_bits
        jump = np.subtract(flat[1:], flat[:-1]) != size
        total = int(np.count_nonzero(jump))
        if total > flat.size >> RUN_SHIFT:
            return False
        start = np.concatenate((np.zeros(1, dtype=np.int64), np.flatnonzero(jump) + 1))
        length = np.diff(start, append=flat.size)
        head = flat[start]
        tail = head + ((length - 1) << bits).astype(np.uint64)
        offset = entries.l2_offsets(head)
        inside = (offset >> bits) + length <= self._census.layout.whole_clusters
        if ((head | tail) & self._unusual).any() or not (inside & (offset != 0)).all():
            return False
        guest = self._census.guest
        guest.allocated += batch.active * flat.size
        # A run also ends where only the COPIED flag changes: that is no gap.
        gap = (start[1:] % width != 0) & (np.diff(offset) != length[:-1] << bits)
        guest.fragmented += batch.active * int(np.count_nonzero(gap))
        slots = self._census.index.slots_of(offset >> bits)
        runs = _Runs(start, slots, length, head >= np.uint64(entries.COPIED))
        long = runs.select(length >= LONG_RUN)
        for counts, amount in self._targets(batch):
            counts.add_runs(long.slot, long.length, amount)
        if batch.copied:
            self._check_runs(batch, width, long)
        if len(long.slot) < len(slots):
            self._count_slots(batch, width, *runs.select(length < LONG_RUN).entries())
        return True

    def _check_runs(self, batch: Batch, width: int, runs: _Runs) -> None:
        """Judge the COPIED flags of runs: of each as a whole, then of those that do not fit."""
        stored = self._stored.values
        unfit = np.zeros(len(runs.slot), dtype=np.bool_)
        columns = (runs.slot.tolist(), runs.length.tolist(), runs.copied.tolist())
        for number, (slot, length, copied) in enumerate(zip(*columns, strict=True)):
            is_one = stored[slot : slot + length] == 1
            unfit[number] = not is_one.all() if copied else is_one.any()
        if unfit.any():
            self._check_slots(batch, width, *runs.select(unfit).entries())

    def _count_slots(
        self, batch: Batch, width: int, positions: I64, slots: I64, copied: Mask
    ) -> None:
        """Count plain entries one by one, in the order of the tables."""
        distinct = bool((np.diff(slots) > 0).all())
        for counts, amount in self._targets(batch):
            (counts.add_distinct if distinct else counts.add)(slots, amount)
        if batch.copied:
            self._check_slots(batch, width, positions, slots, copied)

    def _check_slots(
        self, batch: Batch, width: int, positions: I64, slots: I64, copied: Mask
    ) -> None:
        """Judge the COPIED flags of plain entries one by one."""
        wrong = (self._stored.values[slots] == 1) != copied
        if wrong.any():
            clusters = self._census.index.clusters_of(slots)
            self._report_wrong(batch, clusters, positions, copied, wrong=wrong, width=width)

    def _targets(self, batch: Batch) -> list[tuple[ClusterCounts, int]]:
        """What an entry of a batch adds to, and how much."""
        census = self._census
        targets = [(census.references, batch.weight)]
        if census.mapped is not census.references and not batch.sibling:
            targets.append((census.mapped, 1))
        return targets

    def _clusters(self, values: U64) -> I64:
        """Cluster numbers of plain entries; 0 where unallocated."""
        clusters = values << np.uint64(1)
        clusters >>= np.uint64(self._geometry.cluster_bits + 1)
        return clusters.view(np.int64)

    def _count_plain(self, batch: Batch, values: U64, clusters: I64) -> None:
        """Every entry is unallocated, or a whole aligned data cluster inside the file."""
        width = values.shape[1]
        flat, positions = clusters.reshape(-1), None
        if np.count_nonzero(flat) != flat.size:
            positions = np.flatnonzero(flat)
            flat = flat[positions]
        if not flat.size:
            return
        steps = np.diff(flat)
        jumps = steps != 1
        total = int(np.count_nonzero(jumps))
        if batch.active:
            if positions is None:
                between = int(np.count_nonzero(jumps[width - 1 :: width]))
            else:
                rows = positions // width
                between = int(np.count_nonzero(jumps & (rows[1:] != rows[:-1])))
            self._census.guest.allocated += batch.active * flat.size
            self._census.guest.fragmented += batch.active * (total - between)
        words = values.reshape(-1)
        copied = (words if positions is None else words[positions]) >= np.uint64(entries.COPIED)
        at = np.arange(flat.size) if positions is None else positions
        self._count_slots(batch, width, at, self._census.index.slots_of(flat), copied)

    def _report_wrong(
        self,
        batch: Batch,
        clusters: I64,
        positions: I64,
        copied: Mask,
        *,
        wrong: Mask,
        width: int,
    ) -> None:
        """Report entries whose COPIED flag is *wrong*, where their refcount can be read."""
        unreadable = self._stored.unreadable(clusters)
        if unreadable is not None:
            wrong = wrong & ~unreadable
        self._report_copied(batch, positions[wrong], copied[wrong], width)

    def _report_copied(self, batch: Batch, positions: I64, copied: Mask, width: int) -> None:
        """One finding for each run of neighbours in a table with the same wrong flag."""
        if not len(positions):
            return
        new = np.ones(len(positions), dtype=np.bool_)
        new[1:] = (np.diff(positions) != 1) | (copied[1:] != copied[:-1])
        new |= positions % width == 0
        starts = np.flatnonzero(new)
        lengths = np.diff(starts, append=len(positions))
        self._census.findings.add_copied(
            _positions(batch, positions[starts], width), lengths, copied[starts]
        )

    def _count_any(self, batch: Batch, values: U64, bitmaps: U64 | None) -> None:
        """Count entries of every type and judge them one by one."""
        width = values.shape[1]
        flat = values.reshape(-1)
        bitmap = np.zeros(1, dtype=np.uint64) if bitmaps is None else bitmaps.reshape(-1)
        positions = np.flatnonzero(flat | bitmap)
        word = flat[positions]
        bitmap = np.broadcast_to(bitmap, flat.shape)[positions]
        types = entries.cluster_types(word, self._geometry)
        self._count_chosen(batch, _Entries(positions, width, word, bitmap, types))

    def _count_chosen(self, batch: Batch, entry: _Entries) -> None:
        self._judge_words(batch, entry)
        self._count_compressed(batch, entry)
        self._count_data(batch, entry)

    def _judge_words(self, batch: Batch, entry: _Entries) -> None:
        """Reserved bits, and subclusters of entries without a host cluster."""
        reserved = np.uint64(entries.L2_RESERVED)
        bad = np.flatnonzero(
            (entry.types != ClusterType.COMPRESSED) & ((entry.word & reserved) != 0)
        )
        self._report(
            FindingKind.L2_ENTRY_RESERVED,
            batch,
            entry.positions[bad],
            entry.width,
            found=entry.word[bad],
        )
        if self._geometry.version < 3:
            bad = np.flatnonzero(entries.reads_as_zeros(entry.types))
            self._report(
                FindingKind.ZERO_IN_VERSION_2,
                batch,
                entry.positions[bad],
                entry.width,
                found=entry.word[bad],
            )
        allocated = (entry.bitmap & np.uint64(entries.SUBCLUSTERS_ALLOCATED)) != 0
        bad = np.flatnonzero((entry.types == ClusterType.UNALLOCATED) & allocated)
        self._report(
            FindingKind.UNALLOCATED_SUBCLUSTERS,
            batch,
            entry.positions[bad],
            entry.width,
            found=entry.bitmap[bad],
        )

    def _count_compressed(self, batch: Batch, entry: _Entries) -> None:
        chosen = np.flatnonzero(entry.types == ClusterType.COMPRESSED)
        if not len(chosen):
            return
        word, positions, width = entry.word[chosen], entry.positions[chosen], entry.width
        copied = np.flatnonzero(word >= np.uint64(entries.COPIED))
        self._report(
            FindingKind.COMPRESSED_COPIED,
            batch,
            positions[copied],
            width,
            found=word[copied],
        )
        if self._external:
            self._report(FindingKind.COMPRESSED_WITH_DATA_FILE, batch, positions, width, found=word)
            return
        bitmap = entry.bitmap[chosen]
        broken = bitmap != 0
        self._report(
            FindingKind.COMPRESSED_SUBCLUSTERS,
            batch,
            positions[broken],
            width,
            found=bitmap[broken],
        )
        word, positions = word[~broken], positions[~broken]
        guest = self._census.guest
        guest.allocated += batch.active * len(word)
        guest.compressed += batch.active * len(word)
        guest.fragmented += batch.active * len(word)
        self._census.separate_mapped()
        offset, size = entries.compressed_ranges(word, self._geometry)
        self._judge_cut_compressed(batch, offset, size, positions=positions, width=width)
        slots = self._count_ranges(
            batch, Structure.COMPRESSED, offset, size, positions=positions, width=width
        )
        self._mark_compressed(slots)

    def _mark_compressed(self, slots: I64) -> None:
        census = self._census
        if census.compressed is None:
            census.compressed = np.zeros(census.index.slots, dtype=np.bool_)
        census.compressed[slots] = True

    def _count_data(self, batch: Batch, entry: _Entries) -> None:
        chosen = np.flatnonzero(entries.has_host_cluster(entry.types))
        if not len(chosen):
            return
        word, positions, width = entry.word[chosen], entry.positions[chosen], entry.width
        offset = entries.l2_offsets(word)
        self._judge_data(batch, entry, chosen, offset)
        size = self._geometry.cluster_size
        rows = positions // width
        jumps = (np.diff(offset) != size) & (rows[1:] == rows[:-1])
        self._census.guest.allocated += batch.active * len(chosen)
        self._census.guest.fragmented += batch.active * int(np.count_nonzero(jumps))
        if not self._external:
            self._judge_cut(batch, entry, chosen, offset)
            sizes = np.full(len(offset), size)
            slots = self._count_ranges(
                batch, Structure.DATA, offset, sizes, positions=positions, width=width
            )
            census = self._census
            if census.mapped is not census.references and not batch.sibling:
                census.mapped.add(slots, 1)
        if batch.copied:
            self._check_copied(batch, word, offset, positions, width)

    def _judge_data(self, batch: Batch, entry: _Entries, chosen: I64, offset: I64) -> None:
        bitmap, positions = entry.bitmap[chosen], entry.positions[chosen]
        both = np.flatnonzero((bitmap >> np.uint64(32)) & bitmap)
        self._report(
            FindingKind.SUBCLUSTER_CONFLICT, batch, positions[both], entry.width, found=bitmap[both]
        )
        misaligned = (offset & (self._geometry.cluster_size - 1)) != 0
        if self._geometry.extended_l2:
            holds_data = (bitmap & np.uint64(entries.SUBCLUSTERS_ALLOCATED)) != 0
        else:
            holds_data = entry.types[chosen] == ClusterType.NORMAL
        for kind, mask in (
            (FindingKind.DATA_MISALIGNED, misaligned & holds_data),
            (FindingKind.ZERO_MISALIGNED, misaligned & ~holds_data),
        ):
            self._report(kind, batch, positions[mask], entry.width, found=offset[mask])

    def _judge_cut(self, batch: Batch, entry: _Entries, chosen: I64, offset: I64) -> None:
        """Data clusters that the file ends in. QEMU counts them, and reads zeros past the end."""
        geometry, end = self._geometry, self._census.layout.file_size
        inside = end - offset
        at = np.flatnonzero(
            (inside > 0)
            & (inside < geometry.cluster_size)
            & (offset & (geometry.cluster_size - 1) == 0)
        )
        if not len(at):
            return
        positions = entry.positions[chosen[at]]
        needed = self._bytes_needed(batch, entry, chosen[at])
        cut = needed > inside[at]
        lost = (needed - inside[at])[cut]
        kind, structure = FindingKind.CUT_OFF, Structure.DATA
        self._report(kind, batch, positions[cut], entry.width, found=lost, structure=structure)

    def _bytes_needed(self, batch: Batch, entry: _Entries, which: I64) -> I64:
        """How much of their clusters entries need: up to the last byte that the guest can read.

        QEMU writes data clusters whole, but of one with subclusters only those in use.
        """
        geometry, size = self._geometry, self._geometry.cluster_size
        if geometry.extended_l2:
            allocated = entry.bitmap[which] & np.uint64(entries.SUBCLUSTERS_ALLOCATED)
            _, highest = np.frexp(allocated.astype(np.float64))
            needed = highest.astype(np.int64) * (size // SUBCLUSTERS_PER_CLUSTER)
        else:
            needed = np.where(entry.types[which] == ClusterType.NORMAL, size, 0)
        tables, table = self._tables, batch.ids[entry.positions[which] // entry.width]
        number = tables.l1_index[table] * geometry.l2_entries + entry.positions[which] % entry.width
        left = geometry.virtual_size - (number << geometry.cluster_bits)
        return np.where(tables.snapshot[table] == ACTIVE, np.minimum(needed, left), needed)

    def _judge_cut_compressed(
        self, batch: Batch, offset: I64, size: I64, *, positions: I64, width: int
    ) -> None:
        """Compressed clusters that the file ends in, but for the last sector that they claim.

        Their data ends somewhere in that one: QEMU's files end with the data.
        """
        past = offset + size - self._census.layout.file_size
        cut = (past >= SECTOR) & ~self._census.layout.is_past_end(offset, size)
        kind, structure = FindingKind.CUT_OFF, Structure.COMPRESSED
        self._report(kind, batch, positions[cut], width, found=past[cut], structure=structure)

    def _check_copied(
        self, batch: Batch, word: U64, offset: I64, positions: I64, width: int
    ) -> None:
        copied = word >= np.uint64(entries.COPIED)
        if self._external:
            wrong = ~copied
        else:
            clusters = offset >> self._geometry.cluster_bits
            wrong = self._stored.is_one(clusters) != copied
            self._report_wrong(batch, clusters, positions, copied, wrong=wrong, width=width)
            return
        self._report_copied(batch, positions[wrong], copied[wrong], width)

    def _count_ranges(
        self,
        batch: Batch,
        structure: Structure,
        offset: I64,
        size: I64,
        *,
        positions: I64,
        width: int,
    ) -> I64:
        """Count byte ranges that may straddle clusters; the slots that they touch, with repeats."""
        census, bits = self._census, self._geometry.cluster_bits
        beyond = census.layout.is_past_end(offset, size)
        if beyond.any():
            self._report(
                FindingKind.PAST_END,
                batch,
                positions[beyond],
                width,
                structure=structure,
                found=offset[beyond],
            )
            offset, size = offset[~beyond], size[~beyond]
        clusters = expand_ranges(offset >> bits, (offset + size - 1) >> bits)
        slots = census.index.slots_of(clusters)
        census.references.add(slots, batch.weight)
        return slots

    def _report(
        self,
        kind: FindingKind,
        batch: Batch,
        positions: I64,
        width: int,
        *,
        found: U64 | I64,
        structure: Structure = Structure.L2_TABLE,
    ) -> None:
        """Report entries at flat *positions* in a batch of tables of *width* entries."""
        self._census.findings.add(kind, _positions(batch, positions, width), found, structure)


@dataclass(frozen=True, slots=True)
class _Entries:
    """The entries of a batch that are not zero, by flat position in tables of *width* entries."""

    positions: I64
    width: int
    word: U64
    bitmap: U64
    types: U8


@dataclass(frozen=True, slots=True)
class _Runs:
    """Runs of plain entries that map adjacent clusters with the same COPIED flag.

    ``start``, ``slot``: flat position of the first entry, slot of its cluster.
    """

    start: I64
    slot: I64
    length: I64
    copied: Mask

    def select(self, which: Mask) -> _Runs:
        return _Runs(*(getattr(self, name)[which] for name in self.__slots__))

    def entries(self) -> tuple[I64, I64, Mask]:
        """Position, slot and COPIED flag of every single entry."""
        return (
            expand_ranges(self.start, self.start + self.length - 1),
            expand_ranges(self.slot, self.slot + self.length - 1),
            np.repeat(self.copied, self.length),
        )


def _positions(batch: Batch, positions: I64, width: int) -> I64:
    """Flat positions in a batch, as positions in all tables."""
    return batch.ids[positions // width] * width + positions % width


def _regular_bitmaps(values: U64, bitmaps: U64) -> bool:
    """Whether no subcluster bitmap of entries that are not compressed contradicts anything."""
    if ((bitmaps >> np.uint64(32)) & bitmaps).any():
        return False
    allocated = (bitmaps & np.uint64(entries.SUBCLUSTERS_ALLOCATED)) != 0
    return not ((values & np.uint64(entries.L2_OFFSET) == 0) & allocated).any()


def _drop_shared(clusters: I64, l1_index: I64) -> None:
    """Set to NONE what a table shares, entry by entry, with one before it at the same L1 index."""
    for lag in range(1, min(len(l1_index), MAX_SIBLING_LAG + 1)):
        same = np.flatnonzero(l1_index[lag:] == l1_index[:-lag])
        if not len(same):
            return
        later = clusters[same + lag]
        later[later == clusters[same]] = NONE
        clusters[same + lag] = later
