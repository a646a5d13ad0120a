"""The check: reads an image's metadata, counts, compares, and returns a `Report`.

The order of questions is here; where everything lies is `planner.metadata.locate`, counting is
`planner.check.refcount_walk`, stored refcounts are `planner.metadata.refcounts`. Which finding each
damage gives follows qcow2_check_refcounts in QEMU's block/qcow2-refcount.c; where QEMU stops, this
goes on with what can still be known and says that it is incomplete.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from planner.arrays import I64, U64, Mask, distinct, distinct_columns, expand_ranges, join_ranges
from planner.check.census import Census
from planner.check.classify import Looker
from planner.check.ending import Found, find_cut, judge_cut_regions
from planner.check.entry_findings import EntryFindings
from planner.check.entry_rules import L1_RULES, L1Columns, expected
from planner.check.overwritten import find_overwritten, find_overwritten_l1
from planner.check.owners import OwnersFinder, contested_clusters, first_guest_owners
from planner.check.past_end import lost_past_end
from planner.check.refcount_comparison import CHUNK, Mismatches
from planner.check.refcount_walk import count_references
from planner.check.report import CheckCounters, Report
from planner.errors import ImageError, as_value
from planner.findings.grouped import FindingsBuilder
from planner.findings.kinds import (
    KINDS,
    NONE,
    FindingKind,
    Owners,
    Severity,
    Structure,
    no_owners,
)
from planner.guest.allocation import allocation
from planner.metadata.cluster_counters import PAGE_BITS, ClusterIndex, PagedIndex
from planner.metadata.locate import Survey, take_survey
from planner.metadata.mapping_tables import TableParts, referenced_clusters
from planner.metadata.refcounts import StoredRefcounts
from planner.metadata.regions import count_regions, overlapping_clusters
from planner.metadata.work_limits import LIMITS, Limits
from planner.progress import Meter, Progress, tell_nobody
from planner.qcow2.layout import Layout
from planner.source import HOLE, Source, present_pieces

SIZE_AT = 24
"""Where the header says how large the disk is."""


def check_image(
    source: Source,
    *,
    progress: Progress = tell_nobody,
    only: I64 | None = None,
    limits: Limits = LIMITS,
) -> Report:
    """Check all metadata of a qcow2 image. Never writes.

    *progress*: bytes of tables read. A header that cannot be interpreted gives a report whose
    ``error`` says why. *only*: host offsets of the L2 tables to walk, and no others: what is wrong
    with them, and which clusters have more references than their refcounts say, is found all the
    same, and leaks that are none.
    """
    try:
        layout = Layout.read(source)
    except ImageError as error:
        return Report(layout=None, error=as_value(error))
    return _Check(source, layout, Meter(progress, "census", 1), limits, only=only).run()


class _Check:
    """One check. Each method is one question; `run` is their order."""

    def __init__(
        self,
        source: Source,
        layout: Layout,
        meter: Meter,
        limits: Limits,
        *,
        only: I64 | None = None,
    ) -> None:
        self._source, self._layout, self._meter = source, layout, meter
        self._limits = limits
        self._geometry = layout.geometry
        self._findings = FindingsBuilder()
        self._meter.advance(0)
        self._survey = survey = take_survey(source, layout, self._findings)
        self._is_partial = only is not None
        if only is not None:
            walked = np.isin(survey.tables.offset[survey.present], only)
            self._survey = replace(survey, present=survey.present[walked])
        self._regions = self._survey.every_region
        self._stored = StoredRefcounts(source, layout, self._survey.reftable)

    def run(self) -> Report:
        index = self._load_refcounts()
        census = self._take_census(index)
        contested = self._contested(census)
        bits = self._geometry.cluster_bits
        count_regions(self._survey.regions, bits, index, census.references)
        clusters = self._clusters_to_compare(census)
        self._count_refblocks(census, clusters)
        self._clip(census)
        mismatches = self._compare(census, clusters)
        judge_l1_tables(self._survey, self._stored, self._findings)
        if self._limits.beyond_disk:
            self._look_beyond_disk()
        judge_cut_regions(self._regions, self._layout, self._findings)
        totals = mismatches.totals()
        for kind in (FindingKind.REFCOUNT_LOW, FindingKind.REFCOUNT_MISSING):
            if totals[kind]:
                some = mismatches.clusters(kind, self._limits.owned_low_clusters)
                contested[index.slots_of(some)] = True
        owners = self._find_owners(contested, index)
        found_entries = census.findings.build()
        if self._limits.overwritten:
            self._find_overwritten(found_entries)
        return self._report(census, found_entries, mismatches, totals, owners)

    # -- counting ------------------------------------------------------------------------------

    def _load_refcounts(self) -> ClusterIndex:
        """Read all stored refcounts; one counter a cluster, or only for those near what matters."""
        survey, stored, regions = self._survey, self._stored, self._regions
        size = self._geometry.cluster_size
        slots = self._layout.host_clusters + 1  # A last cluster may begin right at the file's end.
        blocks = distinct(stored.reftable.offset[stored.reftable.blocks()])
        self._meter.begin("refcounts", len(blocks) * size)
        if slots <= self._limits.dense_clusters or slots <= 2 * self._metadata_present():
            stored.load_dense(slots, self._meter)
            return stored.index
        page, refcount = stored.read_pages(slots, self._meter)
        bits = self._geometry.cluster_bits + PAGE_BITS
        spans, _ = distinct_columns(np.stack((regions.first(bits), regions.last(bits))))
        known = [page, expand_ranges(*spans)]
        parts = TableParts.of(self._source, survey.tables.offset[survey.present], size)
        for _, rows in parts.read(self._source):
            known.append(distinct(referenced_clusters(rows, self._layout) >> PAGE_BITS))
            self._meter.advance(0)
        pages = distinct(np.concatenate(known))
        index = PagedIndex(slots, pages[pages << PAGE_BITS < slots])
        stored.set_pages(index, page, refcount)
        return index

    def _metadata_present(self) -> int:
        """How many entries of L2 tables and refcount blocks there are, holes not counted."""
        survey, size = self._survey, self._geometry.cluster_size
        offset = survey.tables.offset[survey.present]
        piece = min(size, HOLE)
        pieces = present_pieces(self._source, offset, size, piece)
        return len(pieces) * (piece // 8) + self._stored.metadata_present()

    def _take_census(self, index: ClusterIndex) -> Census:
        tables, present = self._survey.tables, self._survey.present
        census = Census.begin(
            self._layout, tables, index, keeps_findings=self._limits.entry_findings
        )
        if tables.sibling[present].any() or (tables.weight[present] != 1).any():
            census.separate_mapped()
        size = self._geometry.cluster_size
        self._meter.begin("census", len(present) * size)
        count_references(
            self._source, census, self._stored, present, self._meter, limits=self._limits
        )
        return census

    def _contested(self, census: Census) -> Mask:
        """Slots of clusters that may have two owners: a superset, before metadata is counted."""
        bits, index, regions = self._geometry.cluster_bits, census.index, self._regions
        # Marked one by one: the zeros of a whole file take no memory before something is written.
        contested: Mask = np.zeros(index.slots, dtype=np.bool_)
        for start in range(0, index.slots, CHUNK):
            part = slice(start, min(start + CHUNK, index.slots))
            contested[start + np.flatnonzero(census.mapped_twice(part))] = True
        first, last = regions.first(bits), regions.last(bits)
        single = first == last
        slots = index.slots_of(first[single])
        contested[slots[census.holds_data(slots)]] = True
        # Each slot once, however many structures lie over each other.
        slots, lengths = index.slots_of(first[~single]), (last - first)[~single] + 1
        joined = join_ranges(slots, slots + lengths)
        for slot, end in zip(*(column.tolist() for column in joined), strict=True):
            contested[slot + np.flatnonzero(census.holds_data(slice(slot, end)))] = True
        contested[index.slots_of(overlapping_clusters(regions, bits))] = True
        shared = self._survey.tables.offset[self._survey.repeats] >> bits
        slots, known = index.find(shared)
        contested[slots[known]] = True
        return contested

    def _clusters_to_compare(self, census: Census) -> int:
        """Those of the file, and the one right behind it where something reaches into that."""
        clusters = self._layout.host_clusters
        slot, known = census.index.find(np.array([clusters]))
        return clusters + bool(known[0] and census.references.values[slot[0]])

    def _count_refblocks(self, census: Census, clusters: int) -> None:
        """Count refcount blocks, last of all, and judge them; *clusters*: that there are."""
        counts, reftable = census.references, self._survey.reftable
        sound = np.flatnonzero(~reftable.reserved & ~reftable.misaligned & (reftable.offset != 0))
        cluster = reftable.offset[sound] >> self._geometry.cluster_bits
        beyond = (cluster >= clusters) | reftable.too_far[sound]
        past_end = sound[beyond]
        self._report_refblocks(FindingKind.REFBLOCK_PAST_END, past_end, reftable.word[past_end])
        sound, cluster = sound[~beyond], cluster[~beyond]
        slots = census.index.slots_of(cluster)
        limit = self._geometry.refcount_max
        rank = _rank_among_equals(slots)
        seen = np.minimum(counts.values[slots].astype(np.uint64) + rank + 1, np.uint64(limit))
        shared = seen != 1
        self._report_refblocks(FindingKind.REFBLOCK_SHARED, sound[shared], seen[shared], expected=1)
        counts.add(slots, 1)

    def _report_refblocks(self, kind: FindingKind, at: I64, found: U64, expected: int = 0) -> None:
        reftable = self._survey.reftable
        base = self._layout.header.refcount_table_offset
        self._findings.add(
            kind,
            structure=Structure.REFTABLE,
            host_offset=base + reftable.index[at] * 8,
            index=reftable.index[at],
            found=found,
            expected=expected,
        )

    def _clip(self, census: Census) -> None:
        """No counter goes past the refcount width; each reference too many is a finding."""
        counts, limit = census.references, self._geometry.refcount_max
        if limit >= int(np.iinfo(counts.values.dtype).max):
            return
        over = np.flatnonzero(counts.values > limit)
        if not len(over):
            return
        bits = self._geometry.cluster_bits
        self._findings.add(
            FindingKind.REFCOUNT_OVERFLOW,
            count=counts.values[over].astype(np.int64) - limit,
            host_offset=census.index.clusters_of(over) << bits,
            length=1 << bits,
            found=counts.values[over],
            expected=limit,
        )
        counts.clip(over, limit)

    # -- comparing -----------------------------------------------------------------------------

    def _compare(self, census: Census, clusters: int) -> Mismatches:
        """Pair stored and counted, leaving out what could not be looked up."""
        stored = self._stored
        index, per_block, block = census.index, stored.entries_per_block, stored.unreadable_blocks
        low, high = (
            np.minimum(block + more, -(-clusters // per_block)) * per_block for more in (0, 1)
        )
        low, high = np.minimum(low, clusters), np.minimum(high, clusters)
        lost = high > low
        self._findings.add(
            FindingKind.REFCOUNT_UNREADABLE,
            structure=Structure.REFTABLE,
            count=(high - low)[lost],
            host_offset=self._layout.header.refcount_table_offset + block[lost] * 8,
            index=block[lost],
            found=stored.reftable.word[np.searchsorted(stored.reftable.index, block[lost])],
        )
        start = index.count_before(np.append(0, high[lost]))
        end = index.count_before(np.append(low[lost], clusters))
        # Of the clusters of most blocks that are lost none may have a slot: no span ends there.
        start, end = join_ranges(start[start < end], end[start < end])
        return Mismatches(
            self._geometry,
            index,
            stored.values,
            census.references.values,
            tuple(zip(start.tolist(), end.tolist(), strict=True)),
        )

    def _look_beyond_disk(self) -> None:
        """What the active L1 table maps where the disk has ended, other than a machine's state.

        `qcow2_snapshot_goto` leaves the state that a snapshot saved there: it belongs to that one.
        """
        geometry, l1 = self._geometry, self._survey.l1
        end = geometry.guest_clusters << geometry.cluster_bits
        at = np.flatnonzero(l1.active & (l1.l1_index >= end // geometry.l2_coverage))
        if not len(at):
            return
        snapshots = enumerate(self._survey.snapshots.snapshots)
        keepers = [number for number, snapshot in snapshots if snapshot.vm_state_size]
        if keepers:
            saved = l1.offset[np.isin(l1.snapshot, keepers)]
            at = at[~np.isin(l1.offset[at], saved)]
        last = self._layout.header.l1_size * geometry.l2_coverage
        found = allocation(
            self._source, geometry, (l1.l1_index[at], l1.word[at]), end, max(end, last)
        )
        if found.mapped:
            self._findings.add(
                FindingKind.BEYOND_DISK_END,
                structure=Structure.HEADER,
                host_offset=SIZE_AT,
                found=found.mapped,
            )

    def _find_owners(self, wanted: Mask, index: ClusterIndex) -> Owners | None:
        """Owners of the clusters in *wanted*; reports those that cannot all be right."""
        if not wanted.any() or not self._limits.owners:
            return None
        survey = self._survey
        finder = OwnersFinder(
            self._geometry, index, wanted, survey.l1, survey.tables, most=self._limits.owners
        )
        finder.add_regions(self._regions)
        self._meter.begin("owners", len(survey.present) * self._geometry.cluster_size)
        finder.add_entries(self._source, survey.present, self._meter)
        owners = finder.result()
        cluster, number = contested_clusters(owners, self._geometry.l2_entries)
        position = first_guest_owners(owners, cluster, self._geometry.l2_entries)
        bits = self._geometry.cluster_bits
        self._findings.add(
            FindingKind.MULTIPLE_OWNERS,
            host_offset=cluster << bits,
            length=1 << bits,
            guest_offset=np.where(position == NONE, NONE, position << bits),
            guest_length=np.where(position == NONE, 0, 1 << bits),
            found=number,
            expected=1,
        )
        return owners

    def _find_overwritten(self, found: EntryFindings) -> None:
        """Report tables that hold something else."""
        survey = self._survey
        looker = Looker(self._layout, len(survey.snapshots.snapshots))
        find_overwritten(
            self._source, self._layout, looker, found, self._findings, meter=self._meter
        )
        find_overwritten_l1(self._source, self._layout, looker, survey, self._findings)

    # -- the answer ----------------------------------------------------------------------------

    def _report(
        self,
        census: Census,
        found_entries: EntryFindings,
        mismatches: Mismatches,
        totals: dict[FindingKind, int],
        owners: Owners | None,
    ) -> Report:
        survey, findings = self._survey, self._findings.build()
        found = Found(findings, found_entries, self._stored)
        guest = census.guest
        counters = CheckCounters(
            image_end_offset=(mismatches.highest() + 1) * self._geometry.cluster_size,
            total_clusters=self._geometry.guest_clusters,
            allocated_clusters=guest.allocated,
            fragmented_clusters=guest.fragmented,
            compressed_clusters=guest.compressed,
        )
        report = Report(
            layout=self._layout,
            counters=counters,
            findings=findings,
            entries=found_entries,
            mismatches=mismatches,
            totals=totals,
            owners=owners or no_owners(),
            regions=self._regions,
            snapshots=survey.snapshots.snapshots,
            stopped=survey.stopped,
            luks_error=survey.luks_error,
            holds_compressed=census.compressed is not None,
        )
        if self._limits.past_end:
            counted_end = self._stored.counted_end(self._layout.host_clusters)
            cut_off = find_cut(self._source, self._layout, found, counted_end)
            report = self._with_lost_past_end(replace(report, cut_off=cut_off), counted_end)
        return concluded(report)

    def _with_lost_past_end(self, report: Report, end: int) -> Report:
        """With what refcounts alone show of a file that was cut off; *end*: behind the last cluster
        that they count past its end, 0 where there is none."""
        first, bits = self._layout.host_clusters, self._geometry.cluster_bits
        lost = lost_past_end(self._source, report) if end and not self._is_partial else 0
        if not lost:
            return report
        more = FindingsBuilder()
        more.add(
            FindingKind.LEAK_PAST_END,
            host_offset=first << bits,
            length=(end - first) << bits,
            found=lost,
        )
        return replace(report, findings=report.findings.joined(more.build()))


def judge_l1_tables(
    survey: Survey, stored: StoredRefcounts, findings: FindingsBuilder, *kinds: FindingKind
) -> None:
    """Add what is wrong with L1 entries in themselves to *findings*; of these *kinds*, or of any.

    *stored*: what COPIED flags are compared with.
    """
    l1, coverage = survey.l1, survey.layout.geometry.l2_coverage
    columns = L1Columns(survey.layout, stored, l1.word)
    for rule in L1_RULES:
        if rule.structure is not Structure.L1_TABLE or (kinds and rule.kind not in kinds):
            continue  # Where tables lie has been told with the regions.
        wrong = rule.breaks(columns)
        at = np.flatnonzero(wrong & l1.active if rule.kind is FindingKind.L1_COPIED else wrong)
        found = rule.found(columns)[at]
        findings.add(
            rule.kind,
            structure=rule.structure,
            host_offset=l1.host_offset[at],
            snapshot=l1.snapshot[at],
            l1_index=l1.l1_index[at],
            guest_offset=l1.l1_index[at] * coverage,
            guest_length=coverage,
            found=found,
            expected=expected(rule.kind, found),
        )


def concluded(report: Report) -> Report:
    """*report* with all that follows from its findings, whatever it has said of that before."""
    counts = report.counts()
    by_severity = dict.fromkeys(Severity, 0)
    for kind, number in counts.items():
        by_severity[KINDS[kind].severity] += number if KINDS[kind].counted else 0
    counters = replace(
        report.counters,
        check_errors=by_severity[Severity.CHECK_ERROR],
        corruptions=by_severity[Severity.CORRUPTION],
        leaks=by_severity[Severity.LEAK],
    )
    return replace(
        report,
        counters=counters,
        needs_rebuild=any(counts.get(kind) for kind in _NEEDS_REBUILD),
        hidden=_hide_references(report),
    )


_NEEDS_REBUILD = (
    FindingKind.REFTABLE_ENTRY_RESERVED,
    FindingKind.REFBLOCK_MISALIGNED,
    FindingKind.REFBLOCK_SHARED,
    FindingKind.REFCOUNT_UNREADABLE,
    FindingKind.REFCOUNT_MISSING,
)


_BITMAP_TABLES = (Structure.BITMAP_DIRECTORY, Structure.BITMAP_TABLE)


def _hide_references(report: Report) -> tuple[FindingKind, ...]:
    """Kinds of findings because of which a table that could hold references was not walked."""
    findings, found_entries = report.findings, report.entries
    if report.layout is None or found_entries is None:
        return ()
    file_size = report.layout.file_size
    kinds = findings.counts()
    hiding: list[FindingKind] = [
        kind
        for kind in (
            FindingKind.CHECK_STOPPED,
            FindingKind.L2_TABLE_MISALIGNED,
            FindingKind.SNAPSHOT_L1_MISALIGNED,
            FindingKind.SNAPSHOT_L1_TOO_LARGE,
            FindingKind.LUKS_HEADER_LENGTH,
        )
        if kind in kinds
    ]
    # A single cluster past the end hides nothing. Of anything larger a part may lie in the file: it
    # was not counted, looks leaked, and is not.
    lost = {
        each for held in (findings, found_entries) for each in held.structures(FindingKind.PAST_END)
    }
    lost -= {Structure.DATA, Structure.BITMAP_DATA}
    if lost == {Structure.COMPRESSED}:  # what begins past the end has no part in the file
        rows = found_entries.batches(FindingKind.PAST_END)
        packed = (row.found[row.structure == Structure.COMPRESSED] for row in rows)
        lost = {Structure.COMPRESSED} if any((at < file_size).any() for at in packed) else set()
    if lost:
        hiding.append(FindingKind.PAST_END)
    # Of a table that the file ends in, the entries past the end were not seen.
    cut = set(findings.structures(FindingKind.CUT_OFF))
    if cut & {Structure.L1_TABLE, Structure.L2_TABLE, Structure.SNAPSHOT_TABLE, *_BITMAP_TABLES}:
        hiding.append(FindingKind.CUT_OFF)
    return tuple(hiding)


def _rank_among_equals(values: I64) -> np.ndarray:
    """For each value how many equal ones stand before it."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.searchsorted(ordered, ordered)
    rank = np.empty(len(values), dtype=np.uint64)
    rank[order] = np.arange(len(values)) - first
    return rank
