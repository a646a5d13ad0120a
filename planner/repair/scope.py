"""What every planner is given: the draft, the image as drafted so far, what must not be touched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from planner.arrays import I64, Mask, is_among
from planner.check.claims import refcounts_are_shared, shared_refcounts
from planner.check.entry_findings import EntryFindings
from planner.check.refcount_comparison import Mismatches
from planner.check.report import Report
from planner.errors import ParseFailed
from planner.findings.kinds import FindingKind, Structure
from planner.qcow2 import entries
from planner.qcow2.geometry import Geometry
from planner.qcow2.header import SIGNED_MAX
from planner.qcow2.layout import Layout
from planner.repair.draft import Draft
from planner.repair.plan import Edit, StageKind
from planner.source import Source, read_present

LOOKED_AHEAD = 16 << 20
"""Bytes behind all that is used that are looked through for room on a device."""

_LONG_TABLES = (
    Structure.L1_TABLE,
    Structure.SNAPSHOT_TABLE,
    Structure.REFTABLE,
    Structure.LUKS,
    Structure.BITMAP_DIRECTORY,
    Structure.BITMAP_TABLE,
)
"""What can be longer than a cluster, and so begin in the file and end past it."""


@dataclass(frozen=True)
class _Known:
    """What follows from an image and its report, each once, when somebody asks."""

    source: Source
    report: Report

    @cached_property
    def shared_refcounts(self) -> I64:
        """See `Scope.shared_refcounts`."""
        return shared_refcounts(self.source, self.report)

    @cached_property
    def with_two_owners(self) -> I64:
        """The clusters that have, ascending."""
        found = self.report.findings.of(FindingKind.MULTIPLE_OWNERS)
        return found.host_offset >> self.report.geometry.cluster_bits

    @cached_property
    def of_tables_alike(self) -> I64:
        """See `Owners.of_tables_alike`."""
        return self.report.owners.of_tables_alike()


@dataclass(frozen=True)
class Scope:
    """One step of planning: *source* is the image after all steps before, *report* its check.

    ``revision``: that of the draft which *source* shows. ``formerly_used``: all clusters that an
    earlier step found in use lie below it. ``refcounts_alone``: all that this step has drafted is
    refcounts, what the header says of itself, and what no other finding depends on.
    """

    draft: Draft
    source: Source
    report: Report
    revision: int = 0
    formerly_used: int = 0
    refcounts_alone: bool = False
    _facts: _Known | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        facts = self._facts
        if facts is None or facts.source is not self.source or facts.report is not self.report:
            # What is asked of a scope that another was made of is known to both.
            object.__setattr__(self, "_facts", _Known(self.source, self.report))

    @property
    def _known(self) -> _Known:
        return self._facts or _Known(self.source, self.report)

    def forked(self) -> Scope:
        """The same, with a draft to go on with on its own."""
        return replace(self, draft=self.draft.fork())

    @property
    def drafted(self) -> Source:
        """The image with what this step has drafted by now, too."""
        is_same = self.draft.revision == self.revision
        return self.source if is_same else self.draft.overlay()

    @property
    def layout(self) -> Layout:
        """Of an image whose header could be read; raises `ParseFailed` for another."""
        if self.report.layout is None:
            raise ParseFailed(str(self.report.error))
        return self.report.layout

    @property
    def geometry(self) -> Geometry:
        """The image's shape."""
        return self.layout.geometry

    @property
    def mismatches(self) -> Mismatches:
        """Stored against counted refcounts; raises `ParseFailed` where there was no census."""
        if self.report.mismatches is None:
            raise ParseFailed(str(self.report.error))
        return self.report.mismatches

    @property
    def entries(self) -> EntryFindings:
        """Findings about L2 entries; raises `ParseFailed` where there was no census."""
        if self.report.entries is None:
            raise ParseFailed(str(self.report.error))
        return self.report.entries

    @property
    def may_grow(self) -> bool:
        """Whether the file may grow: not where the image refers to what lies past its end.

        However little of it: zeros there would look like what was written.
        """
        return not self._lost()

    def may_grow_by(self, length: int) -> bool:
        """Whether it may by what *length* bytes take: what the image refers to lies behind that.

        There nothing of it will be read as what was written, as little as before.
        """
        if self.may_grow:
            return True
        size = self.geometry.cluster_size
        clusters = -(-length // size)
        end = (self.first_of_new(clusters) + clusters) * size
        return self._first_lost() >= end

    def _first_lost(self) -> int:
        """Where the first thing begins that lies past the end; 0 where one is cut, or packed."""
        findings = self.report.findings
        is_cut = FindingKind.CUT_OFF in self.report.counts()
        if is_cut or Structure.COMPRESSED in self.entries.structures(FindingKind.PAST_END):
            return 0
        first = [int(findings.of(FindingKind.PAST_END).host_offset.min(initial=SIGNED_MAX))]
        first += [
            int(each.found.min(initial=SIGNED_MAX))
            for each in self.entries.batches(FindingKind.PAST_END)
        ]
        return min(first)

    @property
    def may_grow_for_refcounts(self) -> bool:
        """The same for new refcounts: what is lost of the old ones is not referred to any more."""
        return self._lost() == self._lost(Structure.REFTABLE, Structure.REFBLOCK)

    def _lost(self, *structures: Structure) -> int:
        """How many things, of certain *structures* or of any, lie past the end of the file."""
        kinds, counts = (FindingKind.PAST_END, FindingKind.CUT_OFF), self.report.counts()
        if not structures:
            return sum(counts.get(kind, 0) for kind in kinds)
        return sum(len(self.report.findings.of(kind, *structures)) for kind in kinds)

    @property
    def may_write_header(self) -> bool:
        """Whether nothing else refers to the header's cluster, or only a claim to hold refcounts.

        That one is wrong, and they are made anew.
        """
        if not self.contested(np.zeros(1, dtype=np.int64)).any():
            return True
        others = {owner.structure for owner in self.report.owners.of(0)} - {Structure.HEADER}
        return others <= {Structure.REFTABLE, Structure.REFBLOCK} and not self.refcounts_are_shared

    @property
    def first_new_cluster(self) -> int:
        """Where the file may grow: behind its end, and behind all that reaches over it.

        Also behind what a reference reached that an earlier step has dropped: until that is
        written, which comes later than what is new, the reference stands. What cannot grow has its
        room behind all that is used, and behind what else is there, which may be evidence.
        """
        if self.draft.can_grow:
            end = -(-self.draft.size // self.geometry.cluster_size)
            return max(end, self.end_of_used)
        return self.end_of_used + self.filled_behind

    @property
    def filled_behind(self) -> int:
        """How many clusters behind all that is used reach up to the end of what is there.

        0 where that cannot be told, since very much is.
        """
        first, size = self.end_of_used, self.geometry.cluster_size
        behind = np.frombuffer(read_present(self.source, first * size, LOOKED_AHEAD), np.uint8)
        if not len(behind):
            return 0
        holds_data = np.bitwise_or.reduceat(behind, np.arange(0, len(behind), size)) != 0
        filled = int(np.flatnonzero(holds_data)[-1:].sum()) + bool(holds_data.any())
        return filled if filled * size < LOOKED_AHEAD else 0

    def first_of_new(self, count: int) -> int:
        """The first of *count* new clusters in a row at which no refcount table entry points.

        A refcount block that is lost past the end would be what is written there.
        """
        lost = self.report.findings.of(FindingKind.REFBLOCK_PAST_END).found
        claimed = (lost & np.uint64(entries.REFTABLE_OFFSET)) >> np.uint64(
            self.geometry.cluster_bits
        )
        first = self.first_new_cluster
        for cluster in np.unique(claimed).tolist():
            if first <= cluster < first + count:
                first = cluster + 1
        return first

    def make_room(self, end: int) -> bool:
        """Let the file reach up to *end*, bytes; false where that is past what cannot grow."""
        if self.draft.can_grow:
            self.draft.size = end
        return end <= self.draft.size

    def place_for(self, length: int) -> int | None:
        """Where *length* bytes fit in new clusters, host offset; None where there is no room."""
        size = self.geometry.cluster_size
        clusters = -(-length // size)
        offset = self.first_of_new(clusters) * size
        return offset if self.make_room(offset + clusters * size) else None

    @property
    def end_of_used(self) -> int:
        """Behind all clusters that are used, or were at an earlier step."""
        return max(self.formerly_used, self.mismatches.first_unused())

    @property
    def refcounts_are_shared(self) -> bool:
        """Whether something else lies where refcounts are, or may be."""
        if self.report.layout is None or self.report.mismatches is None:
            return refcounts_are_shared(self.source, self.report)
        return len(self.shared_refcounts) > 0

    @property
    def shared_refcounts(self) -> I64:
        """The clusters in which something else lies, or may, where refcounts are; ascending."""
        return self._known.shared_refcounts

    @property
    def refcounts_must_stay(self) -> bool:
        """Whether something else lies where refcounts are, and none can be made anew elsewhere."""
        may_move = self.may_write_header and self.may_grow_for_refcounts
        return self.refcounts_are_shared and not may_move

    def contested(self, clusters: I64) -> Mask:
        """Which clusters have two owners.

        A table that reaches past the end of the file is not counted where it lies: what else is
        there does not count as shared, and may well be.
        """
        shared = is_among(clusters.reshape(-1), self._known.with_two_owners).reshape(clusters.shape)
        return shared | self._is_in_lost_table(clusters)

    def is_writable(self, clusters: I64) -> Mask:
        """In which clusters entries may be corrected: of one owner, or of tables of one kind.

        What is the right word for one of these is it for all; which of them has its place there
        stays open.
        """
        alike = is_among(clusters.reshape(-1), self._known.of_tables_alike).reshape(clusters.shape)
        return ~self._is_in_lost_table(clusters) & (alike | ~self.contested(clusters))

    def _is_in_lost_table(self, clusters: I64) -> Mask:
        """Which clusters a table claims that reaches past the end of the file."""
        bits = self.geometry.cluster_bits
        tables = self.report.findings.of(FindingKind.PAST_END, *_LONG_TABLES)
        first, end = tables.host_offset >> bits, tables.host_offset + tables.length
        claimed: Mask = np.zeros(clusters.shape, dtype=np.bool_)
        for low, high in zip(first.tolist(), end.tolist(), strict=True):
            claimed |= (clusters >= low) & (clusters << bits < high)
        return claimed

    def explain(
        self,
        stage: StageKind,
        structure: Structure,
        kind: FindingKind,
        places: list[tuple[int, int, int]],
    ) -> None:
        """Say why things change; *places* are (offset, length, count) in the file."""
        self.draft.explain(
            lambda: (Edit(stage, structure, kind, *place) for place in places), len(places)
        )

    def explain_runs(
        self,
        stage: StageKind,
        structure: Structure,
        kind: FindingKind,
        places: tuple[I64, I64, I64],
    ) -> None:
        """As `explain`, of as many *places* as there may be: three columns."""
        columns = [column[: self.draft.edits_left].copy() for column in places]

        def edits() -> Iterator[Edit]:
            rows = zip(*(column.tolist() for column in columns), strict=True)
            return (Edit(stage, structure, kind, *row) for row in rows)

        self.draft.explain(edits, len(places[0]))
