"""Whether leaked clusters that hold data may have been lost, where from, and how much that can be.

A leak is waste unless there is a place that it could have come from: a table that is gone, an entry
that leads elsewhere, a header bit under whose other reading everything is in its place. What could
have been lost is bounded twice: by the references that the leaked clusters have lost, and by the
guest's clusters that read as nothing. Nothing is decided here but that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np

from planner.arrays import I64, U32, U64, Mask, distinct, expand_ranges, is_among, merged
from planner.check.claims import refcounts_are_shared
from planner.check.past_end import references_past_end
from planner.check.report import Report
from planner.findings.kinds import ACTIVE, NONE, FindingKind, Structure
from planner.findings.wording import plural
from planner.metadata.mapping_tables import L1Tables, clusters_of_entries, read_l1_tables
from planner.metadata.regions import Regions
from planner.qcow2 import entries
from planner.source import Source, present_tables
from planner.triage.astray import astray_data
from planner.triage.l1_holes import Gaps
from planner.triage.strays import Strays, count_owners
from planner.triage.table_entries import TableEntries, read_entries
from planner.triage.traces import Traces


class CauseKind(StrEnum):
    """What leaked data could have come from."""

    EMPTY_TABLE = "table-of-zeros"
    EMPTY_PART = "part-of-a-table"
    OLDER = "older-than-a-table"
    SHARED = "shared-with-a-snapshot"
    EXCHANGED = "exchanged-table"
    SNAPSHOT_TABLE = "table-of-zeros-of-a-snapshot"
    OVERWRITTEN_TABLE = "table-overwritten"
    EMPTY_ENTRY = "empty-l1-entry"
    DAMAGED_ENTRY = "damaged-entry"
    FEATURE_BIT = "feature-bit"
    LUKS_HEADER = "luks-header"


_TABLES = {
    CauseKind.EMPTY_TABLE: "a table without any entry left",
    CauseKind.EMPTY_PART: (
        "a table of which a part is empty: it lies beside them, or what its other entries lead to"
    ),
    CauseKind.OVERWRITTEN_TABLE: "a table that was overwritten",
    CauseKind.EXCHANGED: (
        "a table that is counted for others alone, where a table that another disk has is counted"
        " once more than it is used: that one may have been there"
    ),
}

_IN_USE = (CauseKind.SHARED, CauseKind.EXCHANGED, CauseKind.SNAPSHOT_TABLE)
"""What is lost is in use elsewhere: no cluster shows it that is free otherwise."""


_ELSE = {
    CauseKind.OLDER: (
        "{what} of them lie before a table that was made later: by then all had an entry, which"
        " is gone"
    ),
    CauseKind.DAMAGED_ENTRY: "entries that lead elsewhere may have led to them: {what}",
    CauseKind.FEATURE_BIT: (
        "without the header's bit `{what}` the tables refer to exactly them: that bit is wrong,"
        " more likely than not"
    ),
    CauseKind.LUKS_HEADER: (
        "they may be a part of the LUKS header, without which nothing can be read"
    ),
}


@dataclass(frozen=True, slots=True)
class Cause:
    """A place that leaked data may have come from.

    ``snapshot``: `ACTIVE`, or whose tables they are. ``l1_index``, ``count``: the first run of L1
    entries, of ``entries`` in all; ``coverage``: guest bytes that one of them maps. ``what``: the
    bit, or the findings.
    """

    kind: CauseKind
    snapshot: int = ACTIVE
    l1_index: int = NONE
    count: int = 0
    entries: int = 0
    coverage: int = 0
    what: str = ""

    @property
    def phrase(self) -> str:
        """In words; what is lost has been said."""
        if self.kind in _ELSE:
            return _ELSE[self.kind].format(what=self.what)
        if self.kind is CauseKind.EMPTY_ENTRY:
            entries_are = self._entries("is", "are")
            return f"{entries_are} empty, and the table may be among what leaks"
        if self.kind is CauseKind.SHARED:
            lacks = self._entries("has", "have")
            return (
                f"a snapshot has what the disk may have lost: {lacks} nothing in the place of"
                f" {self.what}"
            )
        if self.kind is CauseKind.SNAPSHOT_TABLE:
            return (
                "a snapshot may have lost what others still have, counted once more than they use"
                f" it: {self._entries('leads', 'lead')} to {_TABLES[CauseKind.EMPTY_TABLE]}"
            )
        return f"{self._entries('leads', 'lead')} to {_TABLES[self.kind]}"

    def _entries(self, one: str, more: str) -> str:
        of = "" if self.snapshot == ACTIVE else f" of snapshot {self.snapshot}"
        start = self.l1_index * self.coverage
        size = f"{self.count * self.coverage} bytes at guest offset {start}"
        if self.count == 1:
            named = f"L1 entry {self.l1_index}{of} ({size})"
        else:
            last = self.l1_index + self.count - 1
            named = f"L1 entries {self.l1_index} to {last}{of} ({size})"
        rest = self.entries - self.count
        named += f" and {rest} more" if rest else ""
        return f"{named} {one if self.entries == 1 else more}"


@dataclass(frozen=True, slots=True)
class Losses:
    """What leaked clusters may have been.

    ``data``: leaked clusters that hold data, or may, and to which no table leads, lost or not.
    ``causes``: where they could have come from. ``missing``: bytes of the active disk that read as
    if never written, and were; at most. ``snapshots``: those that have tables of their own which
    are gone, ascending; what they share with the disk is told of that. ``astray``: clusters that an
    entry leads to which may have led to what leaks; whoever has one may read what is not its own.
    ``behind``: clusters that the refcounts count behind the end of the file, where a table is lost
    that may have led to them. ``strays``: guest ranges of the disk's clusters whose entry is one
    bit that leads into the file, starts and ends (exclusive), (2, n); they may overlap.
    """

    data: int = 0
    causes: tuple[Cause, ...] = ()
    missing: int = 0
    snapshots: tuple[int, ...] = ()
    astray: I64 = field(default_factory=lambda: np.zeros(0, dtype=np.int64), compare=False)
    behind: int = 0
    strays: I64 = field(default_factory=lambda: np.zeros((2, 0), dtype=np.int64), compare=False)

    @property
    def misread(self) -> bool:
        """Whether a bit of the header is wrong, and all tables are read as what they are not."""
        return any(cause.kind is CauseKind.FEATURE_BIT for cause in self.causes)

    @property
    def sentences(self) -> list[str]:
        """What a person who is about to free them has to know, a line each."""
        clusters = f"{plural(self.data, 'leaked cluster')} {'holds' if self.data == 1 else 'hold'}"
        return [
            cause.phrase if cause.kind in _IN_USE else f"{clusters} data, and {cause.phrase}"
            for cause in self.causes
        ]


@dataclass(frozen=True, slots=True)
class Leaked:
    """Leaked clusters in columns: ``cluster``, ascending; ``lost``: references that each has lost;
    ``uncounted``: whether there is no refcount to tell; ``unused``: whether no reference is left;
    ``holds_data``; ``has_table``: a lost table that leaks too leads to it; ``is_refcounts``: it
    looks like an old refcount block; ``is_empty``: nothing but zeros. ``lost_tables``: how many
    tables look lost; ``lowered``: how many of their entries lead to what no refcount counts any
    more, so that it does not leak. ``gaps``: the L1 entries that lead to no table of their own.
    ``astray``: the clusters of tables that are another's by their refcount. ``exchanged``: the L1
    indices of those where a table in use has lost a reference.
    """

    cluster: I64
    lost: U32
    uncounted: Mask
    unused: Mask
    holds_data: Mask
    has_table: Mask
    is_refcounts: Mask
    is_empty: Mask
    lost_tables: int
    lowered: int
    gaps: Gaps
    astray: I64
    exchanged: I64


@dataclass(frozen=True, slots=True)
class _Shared:
    """What snapshots have, and is counted for the disk too, which has nothing in its place.

    ``cluster``, ascending; ``l1_index``: all L1 entries of the disk that it is missing from.
    ``uncounted``: L1 entries of the disk that are empty, where snapshots have a table whose
    refcount is lost; ``entries``: how many entries these tables have, the fullest of each index.
    """

    cluster: I64
    l1_index: I64
    uncounted: I64
    entries: int


@dataclass(frozen=True, slots=True)
class _Windows:
    """What L1 entries lead to, by `snapshot`: each (snapshot, L1 index) in two columns."""

    zeros: tuple[I64, I64]
    parts: tuple[I64, I64]
    overwritten: tuple[I64, I64]


_ELSEWHERE = (
    FindingKind.PAST_END,
    FindingKind.L2_TABLE_MISALIGNED,
    FindingKind.DATA_MISALIGNED,
    FindingKind.MULTIPLE_OWNERS,
    FindingKind.COMPRESSED_SUBCLUSTERS,
    FindingKind.UNALLOCATED_SUBCLUSTERS,
    FindingKind.SNAPSHOT_L1_MISALIGNED,
    FindingKind.SNAPSHOT_L1_TOO_LARGE,
)
"""What is found where an entry does not lead where it did."""

_WHOSE = (
    Structure.L1_TABLE,
    Structure.L2_TABLE,
    Structure.SNAPSHOT_TABLE,
    Structure.BITMAP_TABLE,
    Structure.BITMAP_DATA,
)


def find_losses(
    source: Source, report: Report, leaked: Leaked, other_reading: Callable[[I64], str]
) -> Losses:
    """What the *leaked* clusters of the image that *report* is about may have been.

    *other_reading*: of clusters with data, the name of a header bit without which they are in use;
    empty where there is none.
    """
    is_data = leaked.holds_data & leaked.unused
    # More than the file can have had were never refcount blocks, whatever they look like.
    blocks = 1 + (report.layout.host_clusters if report.layout else 0) // (
        report.geometry.refblock_entries
    )
    is_refcounts = leaked.is_refcounts & (np.count_nonzero(leaked.is_refcounts) <= blocks)
    homeless = leaked.cluster[is_data & ~leaked.has_table & ~is_refcounts]
    has_backing = bool(report.layout and report.layout.header.backing_file_offset)
    # Zeros hide what the backing file has there: without them that comes to light.
    hidden = leaked.is_empty & has_backing
    candidates = leaked.holds_data | hidden
    is_lost = leaked.lost_tables or len(leaked.exchanged)
    tables = leaked.astray if is_lost else leaked.astray[:0]
    exchanged = tuple(_of_exchanged(report, leaked))
    if not candidates.any():
        found = find_shared(source, report)
        return replace(found, causes=(*exchanged, *found.causes), astray=tables)
    disk = _Disk(source, report, leaked.cluster[~leaked.unused], homeless, tables)
    # What is in use has lost an entry's reference as well as what is not.
    number = len(homeless) + int(np.count_nonzero(leaked.holds_data & ~leaked.unused))
    astray = astray_data(source, report, leaked.astray, number)
    causes = exchanged + tuple(
        _causes(source, report, disk, leaked, homeless, astray=astray, other_reading=other_reading)
    )
    lost_tables = leaked.lost_tables + sum(
        cause.kind is CauseKind.EMPTY_ENTRY and cause.snapshot == ACTIVE for cause in causes
    )
    behind = _lost_behind(source, report, disk, lost_tables)
    references = _references_lost(disk, report, leaked, candidates) + behind
    references += disk.shared.entries + disk.hidden_references()
    room = disk.unmapped_bytes(all_empty=len(leaked.cluster) + behind > 1)
    lost = references * report.geometry.cluster_size
    if _are_beyond_count(report, leaked) and (report.holds_compressed or disk.lost_windows):
        lost = disk.size  # in one cluster as many compressed ones as nobody has counted any more
    if has_backing:  # entries that said zeros had no cluster, and hid what the backing file has
        lost += (leaked.lost_tables + disk.lost_windows) * report.geometry.l2_coverage
    missing = min(lost, room, disk.size)
    snapshots = disk.snapshots_with_losses()
    doubtful = np.concatenate((tables, astray))
    return Losses(len(homeless), causes, missing, snapshots, doubtful, behind, disk.strays())


def find_shared(source: Source, report: Report) -> Losses:
    """What an image may have lost of which nothing leaks: its refcounts do not show it any more, or
    show it behind the end of the file.
    """
    kinds = {FindingKind.REFCOUNT_MISSING, FindingKind.REFCOUNT_LOW} & report.counts().keys()
    if not kinds and not references_past_end(source, report):
        return Losses()
    nothing = np.zeros(0, dtype=np.int64)
    disk = _Disk(source, report, nothing, nothing, nothing)
    causes = tuple(_of_shared(disk.shared, report.geometry.l2_coverage))
    behind = _lost_behind(source, report, disk, 0)
    lost = (disk.shared.entries + behind) * report.geometry.cluster_size
    room = disk.unmapped_bytes(all_empty=behind > 1)
    return Losses(causes=causes, missing=min(lost, room), behind=behind, strays=disk.strays())


def _are_beyond_count(report: Report, leaked: Leaked) -> bool:
    """Whether refcounts are lost, rather than were not written yet where the file grew."""
    uncounted = leaked.cluster[leaked.uncounted]
    if report.layout and report.layout.header.dirty and report.mismatches:
        uncounted = uncounted[uncounted < report.mismatches.first_unused()]
    return len(uncounted) > 0


def _lost_behind(source: Source, report: Report, disk: _Disk, lost_tables: int) -> int:
    """How many clusters are counted behind the end of the file that the disk may have had.

    A table that is lost may have led to them; or, where the file is cut off and no other disk's
    table explains them, entries of the tables that are there. *lost_tables*: those that leak.
    """
    past = report.findings.structures(FindingKind.PAST_END)
    cut = report.findings.structures(FindingKind.CUT_OFF)
    explained = disk.has_lost_windows or not all(each.is_guest for each in (*past, *cut))
    if not (lost_tables or disk.lost_windows or (report.cut_off and not explained)):
        return 0
    return references_past_end(source, report)


def _causes(
    source: Source,
    report: Report,
    disk: _Disk,
    leaked: Leaked,
    homeless: I64,
    *,
    astray: I64,
    other_reading: Callable[[I64], str],
) -> Iterator[Cause]:
    """Where clusters with data that no table leads to may have come from.

    And what shows that the disk has lost what a snapshot still has.
    """
    coverage, counts = report.geometry.l2_coverage, report.counts()
    yield from _of_shared(disk.shared, coverage)
    if not len(homeless):
        yield from _of_windows(CauseKind.SNAPSHOT_TABLE, *disk.emptied_beside_others(), coverage)
        return
    elsewhere = _leading_elsewhere(source, report)
    more = max(0, len(homeless) - sum(elsewhere.values()))
    tables = [
        *_of_windows(CauseKind.EMPTY_TABLE, *disk.windows.zeros, coverage),
        *_of_windows(CauseKind.EMPTY_PART, *disk.windows.parts, coverage),
        *_of_windows(CauseKind.OVERWRITTEN_TABLE, *disk.windows.overwritten, coverage),
        *(_of_empty_entries(report, disk, leaked) if more else ()),
    ]
    if not tables and more:
        older = disk.traces.older(_used_clusters(report, homeless))
        if len(older) > len(homeless) - more and disk.has_room(leaked.gaps):
            tables = [Cause(CauseKind.OLDER, what=str(len(older)))]
    yield from tables
    if len(astray):  # What explains the leaks otherwise explains them still.
        elsewhere[FindingKind.REFCOUNT_LOW] = len(astray)
    if elsewhere:
        kinds = ", ".join(kind.label for kind in elsewhere)
        yield Cause(CauseKind.DAMAGED_ENTRY, what=kinds)
    bit = other_reading(homeless)
    if bit:
        yield Cause(CauseKind.FEATURE_BIT, what=bit)
    if FindingKind.LUKS_HEADER_INVALID in counts:
        yield Cause(CauseKind.LUKS_HEADER)


def _of_empty_entries(report: Report, disk: _Disk, leaked: Leaked) -> Iterator[Cause]:
    """A table that is nothing but zeros by now leaks with what it mapped; and where nothing is
    mapped any more all tables do, whatever lies there now.
    """
    is_table_left = bool((leaked.is_empty & leaked.unused).any())
    is_table_left |= not report.counters.allocated_clusters and not leaked.uncounted.all()
    if not is_table_left:
        return
    first, count = disk.empty
    if not len(first):
        yield from _of_gaps_in_snapshots(leaked.gaps)
        return
    yield Cause(
        CauseKind.EMPTY_ENTRY,
        ACTIVE,
        int(first[0]),
        int(count[0]),
        int(count.sum()),
        report.geometry.l2_coverage,
    )


def _of_exchanged(report: Report, leaked: Leaked) -> Iterator[Cause]:
    """One cause for the L1 entries that may have led to another table, which is in use."""
    regions, bits = report.regions, report.geometry.cluster_bits
    tables = regions.select(regions.structure == Structure.L2_TABLE)
    mine = np.isin(tables.first(bits), leaked.astray) & np.isin(tables.l1_index, leaked.exchanged)
    snapshot, index = tables.snapshot[mine].astype(np.int64), tables.l1_index[mine]
    yield from _of_windows(CauseKind.EXCHANGED, snapshot, index, report.geometry.l2_coverage)


def _of_shared(shared: _Shared, coverage: int) -> Iterator[Cause]:
    """One cause for what only snapshots have any more."""
    many = "1 cluster" if len(shared.cluster) == 1 else f"{len(shared.cluster)} clusters"
    for index, what in (
        (shared.l1_index, f"{many}, counted once more than snapshots use it"),
        (shared.uncounted, "tables, of which no refcount says whether they were the disk's too"),
    ):
        active = np.full(len(index), ACTIVE, dtype=np.int64)
        for cause in _of_windows(CauseKind.SHARED, active, index, coverage):
            yield replace(cause, what=what)


def _used_clusters(report: Report, homeless: I64) -> I64:
    """The clusters that have a reference or a refcount, and the homeless ones; ascending."""
    mismatches = report.mismatches
    if mismatches is None:
        return homeless
    is_used = (mismatches.stored[:] != 0) | (mismatches.counted != 0)
    slots, known = mismatches.index.find(homeless)
    is_used[slots[known]] = True
    del slots  # there may be millions
    used = mismatches.index.clusters_of(np.flatnonzero(is_used))
    return used if known.all() else merged(used, homeless[~known])


def _of_gaps_in_snapshots(gaps: Gaps) -> Iterator[Cause]:
    """One cause for the first snapshot with L1 entries that are zero."""
    is_gap = (gaps.snapshot != ACTIVE) & ~gaps.damaged
    for number in distinct(gaps.snapshot[is_gap])[:1].tolist():
        mine = np.flatnonzero(is_gap & (gaps.snapshot == number))
        index, count = int(gaps.l1_index[mine[0]]), gaps.count[mine]
        kind, every = CauseKind.EMPTY_ENTRY, int(count.sum())
        yield Cause(kind, number, index, int(count[0]), every, gaps.coverage)


def _leading_elsewhere(source: Source, report: Report) -> dict[FindingKind, int]:
    """How many entries of tables and bitmaps lead elsewhere, by what was found."""
    of_entries = report.entries.counts() if report.entries else {}
    found = {}
    for kind in _ELSEWHERE:
        number = of_entries.get(kind, 0) + len(report.findings.of(kind, *_WHOSE))
        if kind is FindingKind.MULTIPLE_OWNERS:
            number = _contested_by_guest(source, report)
        if number:
            found[kind] = number
    return found


def _contested_by_guest(source: Source, report: Report) -> int:
    """How many clusters of the guest's something else has too, but for refcounts that are none."""
    found = report.findings.of(FindingKind.MULTIPLE_OWNERS)
    found = found.select(found.guest_offset != NONE)
    if not len(found) or refcounts_are_shared(source, report):
        return len(found)
    clusters = found.host_offset >> report.geometry.cluster_bits
    return int(np.count_nonzero(count_owners(report, clusters) > 1))


def _of_windows(kind: CauseKind, snapshot: I64, index: I64, coverage: int) -> Iterator[Cause]:
    """One cause for the active disk, or, if its tables are sound, for the first snapshot."""
    for number in distinct(snapshot)[:1].tolist():
        mine = np.sort(index[snapshot == number])
        run = int(np.flatnonzero(np.append(np.diff(mine) != 1, True))[0]) + 1
        yield Cause(kind, number, int(mine[0]), run, len(mine), coverage)


def _references_lost(disk: _Disk, report: Report, leaked: Leaked, candidates: Mask) -> int:
    """How many guest clusters of the active disk can have had data in the leaked clusters.

    Each had a reference to its own, which a refcount still counts. What the active disk has whole
    in a cluster it has there once; what a table of the image lies in was never the guest's.
    """
    chosen = candidates & leaked.unused
    chosen[~leaked.unused] = disk.may_have_had_more()
    lowered = leaked.lowered
    if not leaked.gaps.entries(only_active=True) and not disk.lost_windows:
        # Then a table without a place is what is left of a snapshot that was deleted.
        chosen &= ~leaked.has_table | (leaked.lost > 1)
        lowered = 0
    lost = leaked.lost[chosen]
    if not report.holds_compressed:
        # The disk has a cluster that is still in use once, or not at all.
        lost = np.where(leaked.unused[chosen], lost, np.minimum(lost, 1))
    return int(lost.sum()) + lowered


class _Disk:
    """The active disk's tables as they are: what they leave out, and which of the clusters *in_use*
    they map. *homeless*: clusters with data that no table leads to. *astray*: clusters of tables
    that are another's, more likely than not: what they leave out is no place of the disk's.
    """

    def __init__(
        self, source: Source, report: Report, in_use: I64, homeless: I64, astray: I64
    ) -> None:
        self._source, self._report, self._in_use = source, report, in_use
        self._geometry = report.geometry
        self.traces = Traces(report.geometry, homeless)
        self.size = self._geometry.virtual_size
        header = report.layout.header if report.layout else None
        needed = self._geometry.l1_entries_needed
        self._needed = min(header.l1_size, needed) if header else 0
        start = header.l1_table_offset if header else 0
        # Also behind the end of the disk: it may have been larger.
        size = header.l1_size if header else 0
        self._l1 = read_l1_tables(source, L1Tables.of_disk(start, size))
        self._astray = astray
        self._free = 0
        self._is_mapped: Mask = np.zeros(len(in_use), dtype=np.bool_)
        self._shared: list[I64] = []
        self.windows = self._walk()
        self.shared = self._shared_and_lost()

    def _walk(self) -> _Windows:
        """Go through all L2 tables once: those without an entry, and what the active ones map."""
        geometry, regions = self._geometry, self._report.regions
        tables = regions.select(regions.structure == Structure.L2_TABLE)
        tables = tables.select(tables.offset % geometry.cluster_size == 0)
        order = np.argsort(tables.offset, kind="stable")
        tables = tables.select(order)
        gone = self._report.findings.of(FindingKind.TABLE_OVERWRITTEN, Structure.L2_TABLE)
        gone = gone.select(gone.l2_index == NONE)
        self._gone = gone.host_offset
        is_gone = np.isin(tables.offset, self._gone)
        wanted = np.flatnonzero(~is_gone)
        offsets = tables.offset[wanted]
        present = present_tables(self._source, offsets, geometry.cluster_size)
        empty, parted, unsound = [wanted[~present]], [wanted[:0]], [offsets[:0]]
        bits = [np.zeros((2, 0), dtype=np.int64)]
        doubtful, strays = [offsets[:0]], Strays(self._source, self._report)
        wanted, offsets = wanted[present], offsets[present]
        is_active = np.isin(offsets, self._l1.offset)
        is_named = np.zeros(len(offsets), dtype=np.bool_)
        for part, found in read_entries(self._source, offsets, geometry):
            is_named[part] = True
            filled = self._are_filled(found.words, found.bitmaps)
            wrong = strays.wrong(found.words, found.bitmaps, filled)
            is_empty = found.count(filled & ~wrong) == 0
            empty.append(wanted[part][is_empty])
            unsound.append(offsets[part][is_empty & (found.count(filled) > 0)])
            parted.append(wanted[part][self.traces.lacking(found.select(filled))])
            is_mine = is_active[part][found.row]
            mine, filled, wrong = found.select(is_mine), filled[is_mine], wrong[is_mine]
            doubtful.append(offsets[part][strays.alone(mine, filled, wrong)])
            bits.append(strays.single_bits(mine, wrong | ~filled))
            self._look_at(mine, filled)
            self._look_for_shared(tables.select(wanted[part]), found.select(~is_mine))
        empty.append(wanted[~is_named])
        self._unsound, self._doubtful = np.concatenate(unsound), np.concatenate(doubtful)
        self._strays, self._bits = strays, np.concatenate(bits, axis=1)
        zeros = distinct(np.concatenate(empty))
        parts = distinct(np.concatenate(parted))
        places = (tables.offset[zeros], tables.offset[parts], gone.host_offset)
        return _Windows(*map(self._entries_of, places))

    def _are_filled(self, words: U64, bitmaps: U64 | None) -> Mask:
        """Which entries of L2 tables say anything.

        A flag without an offset leads nowhere, but to the beginning of a data file.
        """
        flag = 0 if self._geometry.external_data else entries.COPIED
        filled: Mask = (words & ~np.uint64(flag)) != 0
        return filled if bitmaps is None else filled | (bitmaps != 0)

    def _look_at(self, found: TableEntries, filled: Mask) -> None:
        """Count the entries of active tables that map nothing, and mark what the others map."""
        used = found.count(filled) > 0
        used &= ~np.isin(found.offset >> self._geometry.cluster_bits, self._astray)
        offsets, all_entries = found.offset[used], self._geometry.l2_entries
        # The last table goes on behind the end of the disk, and the L1 table may.
        whole, rest = divmod(self._geometry.guest_clusters, all_entries)
        for among, width in ((slice(0, whole), all_entries), (slice(whole, whole + 1), rest)):
            free_entries = width - found.count(filled & (found.at < width))[used]
            self._free += int((free_entries * self._led_to(offsets, among)).sum())
        if self._report.layout is not None and self._can_share:
            words = found.words[found.words != 0]
            data, _ = clusters_of_entries(words, self._report.layout)
            self._is_mapped |= np.isin(self._in_use, data)

    def _led_to(self, offsets: I64, among: slice) -> I64:
        """How many of those L1 entries of the active disk lead to each of the tables."""
        is_among = (self._l1.l1_index >= among.start) & (self._l1.l1_index < among.stop)
        tables = np.sort(self._l1.offset[is_among])
        low, high = (np.searchsorted(tables, offsets, side=side) for side in ("left", "right"))
        return high - low

    def _look_for_shared(self, tables: Regions, found: TableEntries) -> None:
        """Note which clusters in use entries of snapshots' *tables* lead to, and for which guest
        cluster.
        """
        if not len(self._in_use):
            return
        hosts = entries.l2_offsets(found.words) >> self._geometry.cluster_bits
        hosts[(found.words & np.uint64(entries.COMPRESSED)) != 0] = 0
        # An entry without an offset has nothing in the header's cluster.
        at = np.flatnonzero(np.isin(hosts, self._in_use) & (hosts > 0))
        guest = tables.l1_index[found.row[at]] * self._geometry.l2_entries + found.at[at]
        self._shared.append(np.stack((hosts[at], guest)))

    def _shared_and_lost(self) -> _Shared:
        """What the disk has nothing in the place of: it may have lost an entry there."""
        cluster, guest = np.concatenate([*self._shared, np.zeros((2, 0), np.int64)], axis=1)
        self._shared.clear()
        is_lost = guest < self._geometry.guest_clusters
        is_lost[is_lost] = self._are_empty(guest[is_lost])
        l1_index = guest[is_lost] // self._geometry.l2_entries
        windows, count = self._uncounted_windows()
        return _Shared(distinct(cluster[is_lost]), distinct(l1_index), windows, count)

    def _uncounted_windows(self) -> tuple[I64, int]:
        """Empty L1 entries of the disk, where snapshots have tables whose refcounts are lost; and
        how many entries these have.
        """
        mismatches, regions = self._report.mismatches, self._report.regions
        tables = regions.select(regions.structure == Structure.L2_TABLE)
        is_aligned = tables.offset % self._geometry.cluster_size == 0
        tables = tables.select(is_aligned & self._are_in_empty(tables.l1_index))
        if mismatches is None or not len(tables.offset):
            return np.zeros(0, dtype=np.int64), 0
        slots, known = mismatches.index.find(tables.first(self._geometry.cluster_bits))
        tables = tables.select(known & (mismatches.stored[slots] == 0))
        index, at = np.unique(tables.l1_index, return_inverse=True)
        most = np.zeros(len(index), dtype=np.int64)
        np.maximum.at(most, at, self._filled_entries(tables.offset))
        return index, int(most.sum())

    def _filled_entries(self, offsets: I64) -> I64:
        """How many entries the tables at *offsets* have."""
        places, at = np.unique(offsets, return_inverse=True)
        count, size = np.zeros(len(places), dtype=np.int64), self._geometry.cluster_size
        there = np.flatnonzero(present_tables(self._source, places, size, anyway=0))
        for part, found in read_entries(self._source, places[there], self._geometry):
            filled = self._are_filled(found.words, found.bitmaps)
            count[there[part]] = found.count(filled)
        return count[at]

    def _are_empty(self, guest: I64) -> Mask:
        """Which guest clusters the active disk has no entry for."""
        geometry = self._geometry
        empty = np.ones(len(guest), dtype=np.bool_)
        # A table of millions may be a hole: what is there is in order.
        index = self._l1.l1_index[self._l1.l1_index < self._needed]
        if not len(index):
            return empty
        window = guest // geometry.l2_entries
        at = np.minimum(np.searchsorted(index, window), len(index) - 1)
        mine = self._l1.offset[at]
        is_there = (index[at] == window) & (mine % geometry.cluster_size == 0)
        order = np.flatnonzero(is_there & ~np.isin(mine, self._gone))
        order = order[np.argsort(mine[order], kind="stable")]
        places = distinct(mine[order])
        present = present_tables(self._source, places, geometry.cluster_size, anyway=0)
        order = order[present[np.searchsorted(places, mine[order])]]
        offsets, first = np.unique(mine[order], return_index=True)
        ends = np.append(first[1:], len(order))
        for part, found in read_entries(self._source, offsets, geometry):
            filled = found.select(self._are_filled(found.words, found.bitmaps))
            chosen = order[expand_ranges(first[part], ends[part] - 1)]
            row = np.searchsorted(filled.offset, mine[chosen])
            place = row * geometry.l2_entries + guest[chosen] % geometry.l2_entries
            empty[chosen] = ~is_among(place, filled.row * geometry.l2_entries + filled.at)
        return empty

    def has_room(self, gaps: Gaps) -> bool:
        """Whether there is a place on the disk, or in a snapshot, that has no entry."""
        return self._free > 0 or gaps.entries(only_active=False) > 0

    @property
    def _can_share(self) -> bool:
        """Whether a cluster in use can have lost a reference of the guest's."""
        is_packed = self._report.counters.compressed_clusters > 0
        return len(self._in_use) > 0 and (len(self._report.snapshots) > 0 or is_packed)

    def _entries_of(self, offsets: I64) -> tuple[I64, I64]:
        """(snapshot, L1 index) of the entries that lead to those tables; the active ones first.

        For a table that only snapshots have, the first of them.
        """
        mine = np.isin(self._l1.offset, offsets)
        regions = self._report.regions
        tables = regions.select(regions.structure == Structure.L2_TABLE)
        # Behind the end of the disk is the state of a machine, which a snapshot may share.
        behind = (tables.snapshot != ACTIVE) | (tables.l1_index >= self._needed)
        others = tables.select(np.isin(tables.offset, offsets) & behind)
        active = np.full(int(mine.sum()), ACTIVE, dtype=np.int64)
        return (
            np.concatenate((active, others.snapshot.astype(np.int64))),
            np.concatenate((self._l1.l1_index[mine], others.l1_index)),
        )

    def hidden_references(self) -> int:
        """How many references clusters have lost that others which are wrong make up for."""
        return self._strays.hidden_references() if self.lost_windows else 0

    def strays(self) -> I64:
        """Guest ranges of the clusters whose entry is one bit that leads into the file: starts and
        ends, (2, n).

        Of a table that several L1 entries lead to all that it maps, at each: whose it is is in
        doubt, and there may be millions of such clusters.
        """
        geometry, l1 = self._geometry, self._l1
        table, entry = self._bits
        order = np.argsort(l1.offset, kind="stable")
        low, high = (
            np.searchsorted(l1.offset, table, side=side, sorter=order) for side in ("left", "right")
        )
        once = high - low == 1
        start = l1.l1_index[order[low[once]]] * geometry.l2_coverage
        start += entry[once] << geometry.cluster_bits
        shared = is_among(l1.offset, distinct(table[high - low > 1]))
        whole = l1.l1_index[shared] * geometry.l2_coverage
        return np.concatenate(
            (
                np.stack((start, start + geometry.cluster_size)),
                np.stack((whole, whole + geometry.l2_coverage)),
            ),
            axis=1,
        )

    @property
    def empty(self) -> tuple[I64, I64]:
        """Runs of the active disk's L1 entries that are zero, ascending: the first, how many.

        A table of millions may be a hole: of what is not there is no row.
        """
        index = self._l1.l1_index
        before = np.concatenate((np.array([-1]), index[index < self._needed]))
        count = np.diff(before, append=self._needed) - 1
        return before[count > 0] + 1, count[count > 0]

    def _are_in_empty(self, l1_index: I64) -> Mask:
        """Which indices are of L1 entries that are zero."""
        first, count = self.empty
        at = np.searchsorted(first, l1_index, side="right")
        inside: Mask = l1_index < np.append(0, first + count)[at]
        return inside

    @property
    def lost_windows(self) -> int:
        """How many L1 entries of the active disk lead to a table that is gone, or has nothing but
        entries that may not be its own. Behind its end none is the disk's.
        """
        of = (self.windows.zeros, self.windows.overwritten, self._entries_of(self._doubtful))
        number, index = (np.concatenate(columns) for columns in zip(*of, strict=True))
        return len(distinct(index[(number == ACTIVE) & (index < self._needed)]))

    @property
    def has_lost_windows(self) -> bool:
        """Whether any disk has an L1 entry that leads to a table that is gone."""
        return any(len(index) > 0 for _, index in (self.windows.zeros, self.windows.overwritten))

    def snapshots_with_losses(self) -> tuple[int, ...]:
        """The snapshots with tables of their own that are gone, in whole or in part."""
        numbers = distinct(np.concatenate([number for number, _ in self._all_windows()]))
        return tuple(numbers[numbers != ACTIVE].tolist())

    def emptied_beside_others(self) -> tuple[I64, I64]:
        """(snapshot, L1 index) of tables of snapshots without any entry, where another disk has
        clusters that have lost a reference.
        """
        number, index = self.windows.zeros
        number, index = number[number != ACTIVE], index[number != ACTIVE]
        regions = self._report.regions
        tables = regions.select(regions.structure == Structure.L2_TABLE)
        tables = tables.select(
            np.isin(tables.l1_index, index) & ~np.isin(tables.offset, self._gone)
        )
        tables = tables.select(tables.offset % self._geometry.cluster_size == 0)
        size = self._geometry.cluster_size
        tables = tables.select(present_tables(self._source, tables.offset, size, anyway=0))
        has_lost = np.zeros(len(tables.offset), dtype=np.bool_)
        if len(self._in_use):
            for part, found in read_entries(self._source, tables.offset, self._geometry):
                hosts = self._hosts(found.words)
                has_lost[part] = found.count(np.isin(hosts, self._in_use) & (hosts > 0)) > 0
        beside = np.isin(index, tables.l1_index[has_lost])
        return number[beside], index[beside]

    def _hosts(self, words: U64) -> I64:
        """The clusters that L2 entries lead to, of compressed ones the first of each."""
        offsets, is_packed = entries.l2_offsets(words), (words & np.uint64(entries.COMPRESSED)) != 0
        offsets[is_packed], _ = entries.compressed_ranges(words[is_packed], self._geometry)
        return offsets >> self._geometry.cluster_bits

    def _all_windows(self) -> tuple[tuple[I64, I64], ...]:
        return self.windows.zeros, self.windows.parts, self.windows.overwritten

    def unmapped_bytes(self, *, all_empty: bool) -> int:
        """Guest bytes of the active disk that no entry says anything about, rounded up.

        Behind an L1 entry that is empty nothing was, unless its table was a cluster too: those that
        count are *all_empty* ones, or what snapshots have a table in the place of.
        """
        coverage, (number, index) = self._geometry.l2_coverage, self.windows.zeros
        index = index[number == ACTIVE]
        # What a table of none but damaged entries leaves out is counted entry by entry.
        number, counted = self._entries_of(self._unsound)
        index = np.setdiff1d(index, counted[number == ACTIVE])
        first, count = self.empty if all_empty else (self.shared.uncounted, np.int64(1))
        start = np.concatenate((index, first)) * coverage
        end = np.concatenate((index + 1, first + count)) * coverage
        windows = int((np.minimum(end, self.size) - np.minimum(start, self.size)).sum())
        return self._free * self._geometry.cluster_size + windows

    def may_have_had_more(self) -> Mask:
        """Which clusters in use may have had one more guest cluster of the active disk in them."""
        clusters = self._in_use
        if not self._report.holds_compressed:
            return np.isin(clusters, self.shared.cluster)
        bits, regions = self._geometry.cluster_bits, self._report.regions
        low, high = np.searchsorted(clusters, (regions.first(bits), regions.last(bits) + 1))
        change = np.zeros(len(clusters) + 1, dtype=np.int64)
        np.add.at(change, low, 1)
        np.add.at(change, high, -1)
        more: Mask = (np.cumsum(change[:-1]) == 0) & ~self._is_mapped
        return more
