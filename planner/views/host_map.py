"""The atlas: what every host cluster is used for, and what is wrong with it.

A second walk over the L2 tables, after a check, notes for each cluster who uses it. Whatever draws
or lists the host file reads it here, run by run, in file order and in bounded parts: so a picture
and a list cannot disagree. A cluster with two users has both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from planner.arrays import (
    I64,
    U16,
    U32,
    U64,
    Mask,
    distinct,
    expand_ranges,
    join_bounds,
    join_ranges,
    merged,
)
from planner.check.refcount_comparison import NO_KIND, Mismatches, kinds_of
from planner.check.report import Report
from planner.errors import ImageError
from planner.findings.grouped import FindingsBuilder
from planner.findings.kinds import (
    ACTIVE,
    KINDS,
    FindingKind,
    Findings,
    Severity,
    Structure,
)
from planner.findings.runs import Columns, join_parts, merge_runs
from planner.metadata.cluster_counters import ClusterIndex
from planner.metadata.locate import Survey, take_survey
from planner.metadata.mapping_tables import data_and_compressed
from planner.metadata.regions import Regions
from planner.progress import Meter, Progress, tell_nobody
from planner.qcow2.layout import Layout
from planner.source import Source, read_tables

CHUNK = 1 << 18
"""Clusters that are looked at together."""


class Use(IntEnum):
    """What a cluster is used for: a bit in the ``uses`` of a run. Closed."""

    HEADER = 0
    L1_TABLE = 1
    SNAPSHOT_L1_TABLE = 2
    L2_TABLE = 3
    SNAPSHOT_L2_TABLE = 4
    DATA = 5
    SNAPSHOT_DATA = 6
    COMPRESSED = 7
    SNAPSHOT_COMPRESSED = 8
    SNAPSHOT_TABLE = 9
    REFTABLE = 10
    REFBLOCK = 11
    LUKS = 12
    BITMAP_DIRECTORY = 13
    BITMAP_TABLE = 14
    BITMAP_DATA = 15
    FREE = 16
    LEAKED = 17
    UNKNOWN = 18

    @property
    def label(self) -> str:
        return _LABELS[self]

    @property
    def bit(self) -> int:
        return 1 << self


_LABELS = {
    Use.HEADER: "header",
    Use.L1_TABLE: "L1 table",
    Use.SNAPSHOT_L1_TABLE: "L1 table of a snapshot",
    Use.L2_TABLE: "L2 table",
    Use.SNAPSHOT_L2_TABLE: "L2 table of a snapshot",
    Use.DATA: "data",
    Use.SNAPSHOT_DATA: "data of a snapshot",
    Use.COMPRESSED: "compressed data",
    Use.SNAPSHOT_COMPRESSED: "compressed data of a snapshot",
    Use.SNAPSHOT_TABLE: "snapshot table",
    Use.REFTABLE: "refcount table",
    Use.REFBLOCK: "refcount block",
    Use.LUKS: "LUKS header",
    Use.BITMAP_DIRECTORY: "bitmap directory",
    Use.BITMAP_TABLE: "bitmap table",
    Use.BITMAP_DATA: "bitmap data",
    Use.FREE: "free",
    Use.LEAKED: "leaked",
    Use.UNKNOWN: "unknown",
}

_ALSO_OF_SNAPSHOTS = (Use.L2_TABLE, Use.DATA, Use.COMPRESSED)
"""Of these the next value is the same of a snapshot; the active disk's own includes it."""

_USE_OF = {
    Structure.HEADER: Use.HEADER,
    Structure.SNAPSHOT_TABLE: Use.SNAPSHOT_TABLE,
    Structure.REFTABLE: Use.REFTABLE,
    Structure.REFBLOCK: Use.REFBLOCK,
    Structure.LUKS: Use.LUKS,
    Structure.BITMAP_DIRECTORY: Use.BITMAP_DIRECTORY,
    Structure.BITMAP_TABLE: Use.BITMAP_TABLE,
    Structure.BITMAP_DATA: Use.BITMAP_DATA,
}

_HOLDER_OF = {
    Structure.BITMAP_TABLE: Structure.BITMAP_DIRECTORY,
    Structure.BITMAP_DATA: Structure.BITMAP_TABLE,
}
"""Which structure points at one that lies past the end; the header, at those left out."""


def uses_in(uses: int) -> list[Use]:
    """The different uses in a set of bits. What snapshots share with the active disk is its own."""
    found = [use for use in Use if uses >> use & 1]
    return [use for use in found if use - 1 not in found or use - 1 not in _ALSO_OF_SNAPSHOTS]


def owner_label(uses: int) -> str:
    """The different uses in words, joined by ``+`` where there are several."""
    return "+".join(use.label for use in uses_in(uses))


def kinds_in(findings: int) -> list[FindingKind]:
    """The kinds of findings in a set of bits."""
    return [kind for kind in FindingKind if findings >> kind & 1]


def bits_of(*kinds: FindingKind) -> int:
    """The set of these kinds, as in the ``findings`` of a run."""
    return sum(1 << kind for kind in kinds)


DAMAGE = bits_of(*(kind for kind, info in KINDS.items() if info.severity >= Severity.CORRUPTION))
"""Those kinds of findings that are damage rather than waste."""


@dataclass(frozen=True, slots=True)
class Runs:
    """Runs of clusters that are alike, in columns. ``offset``, ``length``: bytes, whole clusters.

    ``uses``: bits of `Use`. ``findings``: bits of `FindingKind`, of all that a check found in or
    about these clusters. ``refcount``: stored; 0 where it is unreadable. ``references``: counted.
    """

    offset: I64
    length: I64
    uses: U32
    findings: U64
    refcount: U64
    references: U64

    def __len__(self) -> int:
        return len(self.offset)

    def select(self, which: slice) -> Runs:
        return Runs(*(getattr(self, name)[which] for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class Atlas:
    """The uses of every cluster that a check has counted, beside its ``mismatches``.

    ``uses``: bits of `Use` below `Use.FREE`, one number a slot of their index.
    ``damaged``: the clusters, ascending from -1 on, at which it changes what findings are about;
    ``damage``: the bits of their kinds from each of them up to the next. Refcounts that are merely
    wrong are not among them. ``torn``: it changed, or a program wrote to it, while it was looked
    at.
    """

    layout: Layout
    mismatches: Mismatches
    uses: U16
    damaged: I64
    damage: U64
    torn: bool = False

    def runs(self) -> Iterator[Runs]:
        """Every run of the file, from its first cluster to its last; neighbours differ.

        A cluster right behind the file is among them where something refers to it.
        """
        bits = self.layout.geometry.cluster_bits
        for cluster, length, uses, findings, refcount, references in join_parts(self._parts()):
            yield Runs(cluster << bits, length << bits, uses, findings, refcount, references)

    def totals(self) -> dict[tuple[int, int], int]:
        """Bytes by (``uses``, ``findings``), as in `Runs`."""
        found: dict[tuple[int, int], int] = {}
        for runs in self.runs():
            for uses in np.unique(runs.uses).tolist():
                mine = runs.uses == uses
                kinds, which = np.unique(runs.findings[mine], return_inverse=True)
                sums = np.zeros(len(kinds), dtype=np.int64)
                np.add.at(sums, which.reshape(-1), runs.length[mine])
                for kind, total in zip(kinds.tolist(), sums.tolist(), strict=True):
                    found[uses, kind] = found.get((uses, kind), 0) + total
        return found

    # ---- parts ----

    def _parts(self) -> Iterator[Columns]:
        """Runs, and between the clusters that have a counter those that have none."""
        index, end = self.mismatches.index, self.layout.host_clusters
        inside = index.slots_before(end)
        position = 0
        for low in range(0, inside, CHUNK):
            columns = self._look_at(low, min(inside, low + CHUNK))
            yield merge_runs(*_fill_gaps(position, columns))
            position = int(columns[0][-1]) + 1
        if position < end:
            yield _free(position, end - position)
        for slot in range(inside, index.slots):
            columns = self._look_at(slot, slot + 1)
            if self.mismatches.readable(slot, slot + 1)[0] and columns[2][0] != Use.FREE.bit:
                yield columns

    def _look_at(self, low: int, high: int) -> Columns:
        """Clusters of the slots low..high-1, one a run, and the columns of `Runs`."""
        mismatches = self.mismatches
        cluster = mismatches.index.clusters_of(np.arange(low, high))
        refcount = mismatches.stored[low:high].astype(np.uint64)
        references = mismatches.counted[low:high].astype(np.uint64)
        unreadable = ~mismatches.readable(low, high) & (cluster < self.layout.host_clusters)
        refcount[unreadable] = 0
        findings = _refcount_findings(refcount, references, unreadable)
        first, last = np.searchsorted(self.damaged, cluster[[0, -1]], side="right")
        change = np.searchsorted(cluster, self.damaged[first:last])
        lengths = np.diff(change, prepend=0, append=len(cluster))
        findings |= np.repeat(self.damage[first - 1 : last], lengths)
        uses = self.uses[low:high].astype(np.uint32)
        nobody = uses == 0
        uses[nobody & (refcount == 0)] = Use.FREE.bit
        uses[nobody & (refcount != 0)] = Use.LEAKED.bit
        uses[nobody & (unreadable | (references != 0))] = Use.UNKNOWN.bit
        return [cluster, np.ones_like(cluster), uses, findings, refcount, references]


def _refcount_findings(refcount: U64, references: U64, unreadable: Mask) -> U64:
    kind = kinds_of(refcount, references)
    kind[unreadable] = FindingKind.REFCOUNT_UNREADABLE
    return np.where(kind == NO_KIND, np.uint64(0), np.uint64(1) << kind.astype(np.uint64))


def _free(cluster: int, length: int) -> Columns:
    """A run of clusters that nothing knows of."""
    numbers = (np.zeros(1, dtype=np.uint64) for _ in range(3))
    return [np.array([cluster]), np.array([length]), np.array([Use.FREE.bit], np.uint32), *numbers]


def _fill_gaps(position: int, columns: Columns) -> Columns:
    """The same runs with free ones between them, from the cluster *position* on."""
    first, length = columns[0], columns[1]
    before = np.concatenate(([position], (first + length)[:-1]))
    gap = np.flatnonzero(first != before)
    if not len(gap):
        return columns
    free = _free(0, 0)
    free[0], free[1] = before[gap], (first - before)[gap]
    return [np.insert(column, gap, more) for column, more in zip(columns, free, strict=True)]


# ---- drawing it ----


def draw_atlas(source: Source, report: Report, progress: Progress = tell_nobody) -> Atlas:
    """The atlas of an image, from its check. *progress*: bytes of tables read.

    Raises the report's `ImageError` where nothing is known but that.
    """
    layout, mismatches = report.layout, report.mismatches
    if layout is None or mismatches is None:
        raise report.error or ImageError("header", "unknown", "it was not read")
    survey = take_survey(source, layout, FindingsBuilder())
    painter = _Painter(survey, mismatches.index)
    painter.paint_regions()
    if not layout.geometry.external_data:
        size = len(survey.present) * layout.geometry.cluster_size
        painter.paint_data(source, Meter(progress, "drawing", size))
    damaged, damage = _damaged_clusters(report, survey)
    return Atlas(layout, mismatches, painter.uses, damaged, damage, report.torn)


class _Painter:
    """Notes who uses which slot."""

    def __init__(self, survey: Survey, index: ClusterIndex) -> None:
        self._survey, self._bits, self._index = survey, survey.layout.geometry.cluster_bits, index
        self.uses: U16 = np.zeros(index.slots, dtype=np.uint16)

    def paint_regions(self) -> None:
        """All that is metadata."""
        regions, tables = self._survey.every_region, self._survey.tables
        for structure, use in _USE_OF.items():
            self._paint_region(regions.select(regions.structure == structure), use)
        l1 = regions.select(regions.structure == Structure.L1_TABLE)
        self._paint_region(l1.select(l1.snapshot == ACTIVE), Use.L1_TABLE)
        self._paint_region(l1.select(l1.snapshot != ACTIVE), Use.SNAPSHOT_L1_TABLE)
        l2 = regions.select(regions.structure == Structure.L2_TABLE)
        which = np.searchsorted(tables.offset, l2.offset)
        active, weight = tables.active[which], tables.weight[which]
        self._paint_region(l2.select(active > 0), Use.L2_TABLE)
        self._paint_region(l2.select(weight > active), Use.SNAPSHOT_L2_TABLE)

    def paint_data(self, source: Source, meter: Meter) -> None:
        """All that L2 tables map: those of the active disk, of snapshots, and of both."""
        tables, present = self._survey.tables, self._survey.present
        active = tables.active[present] > 0
        others = tables.weight[present] > tables.active[present]
        for mine, of_snapshots, data, packed in (
            (True, False, Use.DATA.bit, Use.COMPRESSED.bit),
            (False, True, Use.SNAPSHOT_DATA.bit, Use.SNAPSHOT_COMPRESSED.bit),
            (
                True,
                True,
                Use.DATA.bit | Use.SNAPSHOT_DATA.bit,
                Use.COMPRESSED.bit | Use.SNAPSHOT_COMPRESSED.bit,
            ),
        ):
            chosen = present[(active == mine) & (others == of_snapshots)]
            offsets, size = tables.offset[chosen], self._survey.layout.geometry.cluster_size
            for _, rows in read_tables(source, offsets, size):
                of_data, of_packed = data_and_compressed(rows, self._survey.layout)
                self._paint(of_data, data)
                self._paint(of_packed, packed)
                meter.advance(rows.size)

    def _paint_region(self, regions: Regions, use: Use) -> None:
        if len(regions.offset):
            spans = regions.first(self._bits), regions.last(self._bits)
            self._paint(expand_ranges(*spans), use.bit)

    def _paint(self, clusters: I64, bits: int) -> None:
        slots, known = self._index.find(clusters)
        self.uses[slots if known.all() else slots[known]] |= np.uint16(bits)


def _damaged_clusters(report: Report, survey: Survey) -> tuple[I64, U64]:
    """Where it begins and ends what findings are about, and the bits of their kinds up to there.

    As `Atlas` has them: one finding may be about millions of clusters.
    """
    bits, end = survey.layout.geometry.cluster_bits, survey.layout.host_clusters
    ranges = defaultdict[FindingKind, list[tuple[I64, I64]]](list)
    for (kind, _), group in report.findings.groups.items():
        first = group.host_offset >> bits
        inside = np.flatnonzero(first < end)
        # A length is whatever a header claims: no sum of it and an offset is one.
        offset = group.host_offset[inside]
        length = np.clip(group.length[inside], 1, (end << bits) - offset + 1)
        ranges[kind].append(join_ranges(first[inside], ((offset + length - 1) >> bits) + 1))
        # What lies past the end is shown where it is pointed at.
        lost = group.select(np.flatnonzero(first >= end))
        ranges[kind].append(_each(_pointers_to(lost, survey) >> bits))
    for batch in report.entries.batches() if report.entries else ():
        ends = np.stack((batch.host_offset, batch.host_offset + batch.length - 1)) >> bits
        ranges[FindingKind(batch.kind[0])].append(_each(np.minimum(ends, end).reshape(-1)))
    bounds = {
        kind: join_ranges(*map(np.concatenate, zip(*some, strict=True)))
        for kind, some in ranges.items()
    }
    damaged = merged(np.array([-1]), *(bound for both in bounds.values() for bound in both))
    change = np.zeros(len(damaged), dtype=np.uint64)
    for kind, both in bounds.items():
        for bound in both:
            change[np.searchsorted(damaged, bound)] ^= np.uint64(1 << kind)
    return damaged, np.bitwise_xor.accumulate(change)


def _each(clusters: I64) -> tuple[I64, I64]:
    """The ranges of these clusters, as `join_ranges` gives them."""
    each = distinct(clusters)
    return join_bounds(each, each + 1)


def _pointers_to(lost: Findings, survey: Survey) -> I64:
    """Host offsets of what points at structures that lie past the end of the file."""
    tables = lost.structure == Structure.L2_TABLE
    at_tables = survey.l1.host_offset[np.isin(survey.l1.offset, lost.host_offset[tables])]
    regions, others = survey.regions, np.unique(lost.structure[~tables]).tolist()
    pointers = [at_tables]
    for structure in map(Structure, others):
        holder = _HOLDER_OF.get(structure, Structure.HEADER)
        if structure is Structure.L1_TABLE and (lost.snapshot >= 0).any():
            holder = Structure.SNAPSHOT_TABLE
        pointers.append(regions.offset[regions.structure == holder][:1])
    return np.concatenate(pointers)
