"""Leaked clusters by what they look like: a lost L2 table, a lost snapshot, or just data.

A leak is waste only if nothing was lost. A cluster full of pointers to other leaked clusters is not
waste: it is the table that mapped them. Only leaked clusters are read, of very many a share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice, pairwise

import numpy as np

from planner.arrays import I32, I64, U8, U32, U64, Mask, distinct, is_among, is_any_of, merged
from planner.check.check import check_image
from planner.check.classify import Look, Looker, filled_columns
from planner.check.refcount_comparison import CHUNK, Mismatches
from planner.check.report import Report
from planner.check.signatures import NAMES, REACH
from planner.errors import ImageError
from planner.findings.kinds import NONE, UNLISTED, FindingKind, Structure
from planner.findings.wording import plural
from planner.metadata.refcounts import Reftable, StoredRefcounts
from planner.metadata.work_limits import LIMITS, Limits
from planner.progress import Progress, tell_nobody
from planner.qcow2 import entries
from planner.qcow2.header import FEATURES_AT, Incompatible
from planner.qcow2.layout import MAX_L1_BYTES
from planner.qcow2.names import quoted
from planner.qcow2.snapshots import ENTRY_BYTES, Snapshot, decode_snapshot
from planner.source import (
    SECTOR,
    Filled,
    Patched,
    Source,
    nonzero_words,
    present_tables,
    read_filled,
    read_tables,
)
from planner.triage.astray import astray_tables
from planner.triage.bitmaps import bitmap_clusters, bitmaps_of, lost_bitmap_clusters
from planner.triage.l1_holes import Gaps, Place, PlaceKind, read_gaps
from planner.triage.losses import (
    CauseKind,
    Leaked,
    Losses,
    find_losses,
    find_shared,
)
from planner.triage.old_refcounts import OldRefcounts
from planner.triage.uncounted import uncounted_clusters

MAX_LOST_SNAPSHOTS = 1 << 10
"""Entries of present and former snapshot tables that are read, to find lost snapshots."""

MAX_LOST_L1 = 256
"""Clusters of lost L1 tables that are read once more, for where their L2 tables stood."""

MAX_REFERENCES = 1 << 31
"""A refcount above says nothing."""

SCREENED_BYTES = 1 << 19
"""Of first sectors that are read at a time, a request each: what takes longer ends too late."""

PLACES_NAMED = 4
"""Runs of L1 entries that are named as where a lost table may have stood."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """A leaked cluster that looks like a table.

    ``offset``: of the cluster, bytes. ``words``, ``plausible``: its words that are not zero, and
    those of them that could be entries. ``targets``: clusters that they point at.
    ``leaked_targets``: how many of them are leaked too. ``is_l1``: whether most of them are L2
    tables themselves, as those of a lost snapshot's L1 table are. ``looks_lost``: whether freeing
    it could bury something; otherwise it is an old table whose targets have gone other ways.

    ``in_use``: something refers to it still, so that nothing of it is freed.

    ``places``: where it may have stood, the first of ``place_count`` L1 entries. ``snapshot``: the
    lost snapshot whose L1 table it is, where the snapshot table still names it. ``mapped``: what
    its leaked targets look like; by ``starts_with`` what the data among them begins with.
    """

    offset: int
    words: int
    plausible: int
    targets: int
    leaked_targets: int
    is_l1: bool
    looks_lost: bool = True
    in_use: bool = False
    places: tuple[Place, ...] = ()
    place_count: int = 0
    snapshot: Snapshot | None = None
    mapped: Counter[Look] = field(default_factory=Counter)
    starts_with: Counter[str] = field(default_factory=Counter)

    @property
    def sentence(self) -> str:
        """One line for a person who is about to reclaim it."""
        what = "the L1 table of a lost snapshot" if self.is_l1 else "a lost L2 table"
        if self.snapshot is not None:
            what += f", {snapshot_phrase(self.snapshot)}"
        where = "" if self.is_l1 else self._where
        if not self.targets:
            return (
                f"the leaked cluster at {self.offset} looks like {what}: all that it"
                f" holds are zeros that hide what the backing file has there{where}"
            )
        return (
            f"the leaked cluster at {self.offset} looks like {what}: {self._leaked_targets}{where}"
        )

    @property
    def _leaked_targets(self) -> str:
        if self.targets == 1:
            leaks = "is leaked too" if self.leaked_targets else "is not leaked"
            return f"the cluster that it points at {leaks}"
        verb = "is" if self.leaked_targets == 1 else "are"
        return (
            f"{self.leaked_targets} of the {self.targets} clusters that it points at {verb} leaked"
            " too"
        )

    @property
    def _where(self) -> str:
        if not self.places:
            return "; no L1 entry is empty, so that it may be left of a deleted snapshot"
        more = self.place_count - sum(place.count for place in self.places)
        named = " or ".join(place.phrase for place in self.places)
        return f"; {named}" + (f", or at one of {more} more empty L1 entries" if more else "")


def snapshot_phrase(snapshot: Snapshot) -> str:
    """Its ID and name, as the image has them."""
    return f"ID {quoted(snapshot.id_str)}, name {quoted(snapshot.name)}"


@dataclass(frozen=True, slots=True)
class Triage:
    """``looked_at`` of ``leaked`` clusters were read whole or are all zeros.

    ``clusters``: the leaked ones, and those of ``uncounted``, which look free since their refcount
    is lost, and hold data; ascending, int64; of each its `Look` and the signature of its
    data (position in `signatures.NAMES`), uint8, and ``group``, int32: the position in ``tables``
    of the first that points at it, or `NONE`. ``tables``: the former tables, ascending, at most
    the limit. ``suspect_count``: how many of all look lost; ``buried_count``: how many of those
    would be freed. ``snapshots``: those that the snapshot table still names, though the image no
    longer counts them. ``losses``: what the data among them may have been.
    """

    clusters: I64 = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    look: U8 = field(default_factory=lambda: np.zeros(0, dtype=np.uint8))
    signature: U8 = field(default_factory=lambda: np.zeros(0, dtype=np.uint8))
    group: I32 = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    tables: tuple[Suspect, ...] = ()
    suspect_count: int = 0
    buried_count: int = 0
    snapshots: tuple[Snapshot, ...] = ()
    uncounted: I64 = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    losses: Losses = field(default_factory=Losses)

    @property
    def is_evidence(self) -> bool:
        """Whether something may be lost that freeing these clusters would bury, or would no longer
        show.
        """
        return self.buried_count > 0 or bool(self.losses.causes)

    @property
    def is_buried(self) -> bool:
        """The same of what is in use nowhere else."""
        causes = {cause.kind for cause in self.losses.causes} - {CauseKind.EXCHANGED}
        return self.buried_count > 0 or bool(causes)

    @property
    def is_table_lost(self) -> bool:
        """Whether more than single clusters may be lost among them."""
        causes = {cause.kind for cause in self.losses.causes} - {CauseKind.DAMAGED_ENTRY}
        return self.buried_count > 0 or bool(causes)

    def warnings(self, limit: int) -> list[str]:
        """What a person who is about to free them has to know, a line each, *limit* of tables."""
        named = [table.sentence for table in self.suspects if not table.in_use][:limit]
        more = self.buried_count - len(named)
        named += [f"and {plural(more, 'table')} more that may be lost"] if more else []
        return [*named, *self.losses.sentences]

    @property
    def suspects(self) -> tuple[Suspect, ...]:
        """The tables that look lost, as far as they are listed."""
        return tuple(table for table in self.tables if table.looks_lost)

    @property
    def leaked(self) -> int:
        return len(self.clusters)

    @property
    def lost_tables(self) -> int:
        """L2 tables that nothing leads to, as far as tables are listed."""
        return sum(not (table.is_l1 or table.in_use) for table in self.suspects)

    @property
    def mapped(self) -> int:
        """Leaked clusters that a former table points at."""
        return int(np.count_nonzero(self.group != NONE))

    @property
    def looked_at(self) -> int:
        return int(np.count_nonzero(self.look != Look.UNREAD))

    def looks(self) -> Counter[Look]:
        """How many clusters look like what."""
        return looks_of(self.look)

    def starts_with(self) -> Counter[str]:
        """What the data begins with, where that is known: clusters by name."""
        return names_of(self.signature)


def looks_of(look: U8) -> Counter[Look]:
    """How many there are of each."""
    counts = _count_each(look, len(Look))
    return Counter({Look(at): number for at, number in enumerate(counts) if number})


def names_of(signature: U8) -> Counter[str]:
    """How many there are of each, without those that are not known."""
    counts = _count_each(signature, len(NAMES))
    return Counter({NAMES[at]: number for at, number in enumerate(counts) if number and at})


def _count_each(values: U8, most: int) -> list[int]:
    counts = np.zeros(most, dtype=np.int64)
    for start in range(0, len(values), CHUNK):  # of all at once it makes eight bytes each
        counts += np.bincount(values[start : start + CHUNK], minlength=most)
    listed: list[int] = counts.tolist()
    return listed


def adjacent(clusters: I64) -> tuple[I64, I64]:
    """Ascending clusters as runs of neighbours: the first of each, and how many they are."""
    begins = np.ones(len(clusters) + 1, dtype=np.bool_)
    for start in range(0, len(clusters) - 1, CHUNK):
        some = clusters[start : start + CHUNK + 1]
        np.not_equal(np.diff(some), 1, out=begins[start + 1 : start + len(some)])
    first, count = clusters[begins[:-1]], clusters[begins[1:]]
    count -= first
    count += 1
    return first, count


_REFERENCES = replace(LIMITS, owners=0, past_end=False, overwritten=False, entry_findings=False)
"""Of a check that is asked for nothing but what is referred to."""


def triage_leaks(
    source: Source,
    report: Report,
    *,
    ignored: I64 | None = None,
    progress: Progress = tell_nobody,
    limits: Limits = LIMITS,
) -> Triage:
    """Look into the leaked clusters of the image that *report* is about.

    Where refcounts are lost, also into those that nothing refers to and that hold data. Those in
    *ignored* are known to be waste. *progress*: bytes of them read.
    """
    mismatches = report.mismatches
    if mismatches is None:
        return Triage()
    counted = mismatches.clusters(FindingKind.LEAK, report.counters.leaks)
    if ignored is not None and len(ignored):
        counted = counted[~is_among(counted, ignored)]
    uncounted = uncounted_clusters(_Watched(source, progress, 0), report)
    leaked = merged(counted, uncounted) if len(uncounted) else counted
    if not len(leaked):
        return Triage(losses=find_shared(source, report))
    most = min(len(leaked) * report.geometry.cluster_size, limits.triaged_bytes)
    watched = _Watched(source, progress, most)
    looker = looker_of(watched, report)
    look, signature = _look(watched, report, mismatches, leaked, looker, limits=limits)
    if len(uncounted):  # what is free and empty there is free, and empty
        kept = ~is_among(leaked, uncounted[look[np.searchsorted(leaked, uncounted)] == Look.ZEROS])
        leaked, look, signature = leaked[kept], look[kept], signature[kept]
        uncounted = uncounted[is_among(uncounted, leaked)]
    describer = _Describer(
        watched,
        report,
        mismatches,
        looker,
        leaked=leaked,
        look=look,
        uncounted=uncounted,
        most_tables=limits.former_tables,
    )
    return describer.describe(signature)


def looker_of(source: Source, report: Report) -> Looker:
    """Judges clusters of the image that *report* is about. Raises its ``error``, if it has one."""
    layout = report.layout
    if layout is None:
        raise report.error or ImageError("header", "unknown", "it was not read")
    stored = StoredRefcounts(source, layout, Reftable(source, layout))
    return Looker(layout, len(report.snapshots), stored.counted_end(layout.host_clusters))


@dataclass(slots=True)
class _Watched:
    """A source that tells how much of ``most`` bytes was read."""

    source: Source
    progress: Progress
    most: int
    done: int = 0

    @property
    def size(self) -> int:
        return self.source.size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.source.read_into(offset, buffer)
        self._advance(buffer.nbytes)

    def read_sectors(self, offsets: I64) -> Iterator[tuple[slice, U8]]:
        """As of any source, ahead where that can be done; it is told of what has come."""
        for part, rows in read_tables(self.source, offsets, SECTOR, SCREENED_BYTES):
            self._advance(rows.nbytes)
            yield part, rows

    def read_filled(self, offsets: I64, size: int) -> Iterator[Filled]:
        """The same of clusters; what of them is a hole has come with the rest."""
        for filled in read_filled(self.source, offsets, size, head=REACH):
            self._advance(len(filled.rows) * size)
            yield filled

    def _advance(self, count: int) -> None:
        self.done += count
        self.progress("leaks", min(self.done, self.most), self.most)

    def data_extents(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        return self.source.data_extents(offset, length)


def _look(
    source: _Watched,
    report: Report,
    mismatches: Mismatches,
    leaked: I64,
    looker: Looker,
    *,
    limits: Limits,
) -> tuple[U8, U8]:
    """The `Look` and the signature of every leaked cluster."""
    geometry, size = report.geometry, report.geometry.cluster_size
    look = np.full(len(leaked), Look.IN_USE, dtype=np.uint8)
    signature = np.zeros(len(leaked), dtype=np.uint8)
    # What is in use and only counted too high is not lost, whatever it looks like. But an L2 table
    # may have lost one of the L1 entries that shared it.
    tables, present = _known_l2_tables(report), []
    for start in range(0, len(leaked), CHUNK):
        some = leaked[start : start + CHUNK]
        unused = mismatches.count_references(some) == 0
        which = start + np.flatnonzero(unused | is_any_of(some, tables))
        is_there = present_tables(source, leaked[which] << geometry.cluster_bits, size)
        look[which] = np.where(is_there, Look.UNREAD, Look.ZEROS)
        present.append(which[is_there])
    at = np.concatenate(present)
    offsets = leaked[at] << geometry.cluster_bits
    chosen = _choose(source, offsets, size, looker, limits)
    for filled in source.read_filled(offsets[chosen], size):
        which = at[chosen[filled.part]]
        look[which], signature[which] = looker.look(filled.rows, filled.words())
    return look, signature


def _choose(source: _Watched, offsets: I64, size: int, looker: Looker, limits: Limits) -> I64:
    """Positions of the clusters to read: all, or every nth and those that begin like tables."""
    if len(offsets) * size <= limits.triaged_bytes:
        return np.arange(len(offsets))
    room = limits.triaged_bytes // size // 2
    screened = np.arange(len(offsets))[:: max(1, -(-len(offsets) // limits.screened))]
    likely = np.zeros(len(screened), dtype=np.bool_)
    for part, sectors in source.read_sectors(offsets[screened]):
        likely[part] = looker.may_be_tables(sectors)
    tables = screened[likely]
    tables = tables[:: max(1, -(-len(tables) // room))]
    others = np.arange(len(offsets))[:: max(1, -(-len(offsets) // room))]
    return distinct(np.concatenate((tables, others)))


def _known_l2_tables(report: Report) -> I64:
    """The clusters of all L2 tables that an L1 entry leads to."""
    regions = report.regions
    tables = regions.select(regions.structure == Structure.L2_TABLE)
    return tables.first(report.geometry.cluster_bits)


@dataclass(frozen=True, slots=True)
class _Tables:
    """Former tables in columns; see `Suspect`. ``at``: position among the leaked clusters.

    ``copied``: whether an entry has the COPIED flag, as only tables of the active disk have.
    ``uncounted``: the entries of those that look lost which no refcount counts.
    """

    at: I64
    words: I64
    plausible: I64
    targets: I64
    leaked_targets: I64
    is_l1: Mask
    copied: Mask
    looks_lost: Mask
    in_use: Mask
    uncounted: I64


class _Describer:
    """Turns what clusters look like into what they are to each other."""

    def __init__(
        self,
        source: Source,
        report: Report,
        mismatches: Mismatches,
        looker: Looker,
        *,
        leaked: I64,
        look: U8,
        uncounted: I64,
        most_tables: int,
    ) -> None:
        self._most_tables = most_tables
        self._source, self._report, self._leaked, self._look = source, report, leaked, look
        self._geometry, self._mismatches = report.geometry, mismatches
        self._uncounted = uncounted
        self._unused = mismatches.count_references(leaked) == 0
        self._looker = looker
        self._bitmaps = bitmaps_of(source, report)
        in_use = self._leaked[~self._unused]
        self._high = in_use[is_among(in_use, distinct(_known_l2_tables(report)))]
        unused_tables = np.count_nonzero((look == Look.L2_TABLE) & self._unused)
        tables = len(self._high) + int(unused_tables)
        # Without tables nothing is in a group, and that takes no memory for each.
        self._group = np.broadcast_to(np.int32(NONE), len(leaked))
        if tables:
            self._group = self._group.copy()
        self._astray = astray_tables(source, report, tables)
        self._gaps = read_gaps(source, report, self._astray)
        # For every cluster that has a slot, which of the leaked ones it is.
        index = mismatches.index
        ranked = index.slots if tables and index.keys is None else 0
        self._rank = np.full(ranked, NONE, dtype=np.int32)
        if len(self._rank):
            self._rank[leaked] = np.arange(len(leaked), dtype=np.int32)

    def describe(self, signature: U8) -> Triage:
        self._set_bitmaps_aside()
        self._set_old_refcounts_aside()
        tables = self._judge(np.flatnonzero(self._look == Look.L2_TABLE))
        self._look[tables.at[tables.is_l1]] = Look.L1_TABLE
        snapshots = self._lost_snapshots()
        described = tuple(self._objects(tables, signature, snapshots)) if len(tables.at) else ()
        return Triage(
            clusters=self._leaked,
            look=self._look,
            signature=signature,
            group=self._group,
            tables=described,
            suspect_count=int(np.count_nonzero(tables.looks_lost)),
            buried_count=int(np.count_nonzero(tables.looks_lost & ~tables.in_use)),
            snapshots=snapshots,
            uncounted=self._uncounted,
            losses=self._losses(tables, described, snapshots),
        )

    def _set_bitmaps_aside(self) -> None:
        """Clusters of bitmaps that nothing vouches for are waste, whatever they look like.

        Where their directory is gone too, their tables are known by what they lack: the COPIED
        flag, which entries of the active disk have.
        """
        clusters, is_whole = bitmap_clusters(self._report, self._source.size, self._bitmaps)
        mine = self._unused & is_among(self._leaked, clusters)
        self._look[mine] = Look.BITMAP
        if is_whole or len(self._report.snapshots):
            return
        at = np.flatnonzero(self._unused & (self._look == Look.L2_TABLE))
        offsets = self._leaked[at] << self._geometry.cluster_bits
        for filled in read_filled(self._source, offsets, self._geometry.cluster_size):
            words = entries.decode_words(filled.rows)
            wrong = (words & np.uint64(entries.BITMAP_RESERVED)) != 0
            sound = ~wrong.any(axis=1)
            targets = np.unique(words[sound] >> np.uint64(self._geometry.cluster_bits))
            self._look[at[filled.part][sound]] = Look.BITMAP
            self._look[self._unused & is_among(self._leaked, targets.astype(np.int64))] = (
                Look.BITMAP
            )

    def _set_old_refcounts_aside(self) -> None:
        """What refcounts were in before is waste, too."""
        if self._report.layout is None:
            return
        at = np.flatnonzero(self._unused & (self._look == Look.L2_TABLE))
        old = OldRefcounts(self._source, self._report.layout, self._mismatches, self._leaked)
        tables, blocks = old.find(self._leaked[at])
        self._look[self._unused & is_among(self._leaked, tables)] = Look.REFTABLE
        self._look[self._unused & is_among(self._leaked, blocks)] = Look.OLD_REFBLOCK

    def _losses(
        self, tables: _Tables, described: tuple[Suspect, ...], snapshots: tuple[Snapshot, ...]
    ) -> Losses:
        """What the clusters that hold data, or may, were: but for those with a place elsewhere."""
        is_table = (self._look == Look.SNAPSHOT_TABLE) & (len(snapshots) > 0)
        is_table[tables.at[tables.looks_lost]] = True
        no_data = np.zeros(256, dtype=np.bool_)
        no_data[list(_NO_DATA)] = True
        holds_data = ~is_table & ~no_data[self._look]
        lost = _references_lost(self._mismatches, self._leaked)
        if all(table.snapshot for table in described if table.is_l1):
            # What a lost L1 table leads to was a snapshot's, if all of them were.
            elsewhere = [
                number
                for number, table in enumerate(described)
                if table.is_l1 or {place.kind for place in table.places} == {PlaceKind.LOST}
            ]
            lost[np.isin(self._group, elsewhere) & (lost == 1)] = 0
        of_bitmaps = lost_bitmap_clusters(
            self._report, self._source.size, self._bitmaps, self._leaked
        )
        lost[is_among(self._leaked, of_bitmaps) & (lost == 1)] = 0
        leads = np.append(tables.looks_lost, False)  # the last for those of no group
        leaked = Leaked(
            cluster=self._leaked,
            lost=lost,
            uncounted=is_among(self._leaked, self._uncounted),
            unused=self._unused,
            holds_data=holds_data,
            has_table=leads[self._group],
            is_refcounts=self._look == Look.REFBLOCK,
            is_empty=self._look == Look.ZEROS,
            lost_tables=int(np.count_nonzero(tables.looks_lost)),
            lowered=int(tables.uncounted.sum()),
            gaps=self._gaps,
            astray=self._astray,
            exchanged=self._exchanged(),
        )
        return find_losses(self._source, self._report, leaked, self._other_reading)

    def _exchanged(self) -> I64:
        """The L1 indices at which one disk has a table that is another's by its refcount, and a
        table that another disk has there has lost a reference.

        Both may be whole, and lead to much the same.
        """
        regions = self._report.regions
        tables = regions.select(regions.structure == Structure.L2_TABLE)
        clusters = tables.first(self._geometry.cluster_bits)
        astray, high = (
            tables.l1_index[np.isin(clusters, some)] for some in (self._astray, self._high)
        )
        found: I64 = np.intersect1d(astray, high)
        return found

    def _other_reading(self, data: I64) -> str:
        """The header bit without which clusters with *data* are in use, if there is one."""
        layout = self._report.layout
        if layout is None or len(data) * 4 < self._report.counters.allocated_clusters:
            return ""
        features = layout.header.incompatible_features
        for bit, name in _BITS.items():
            if layout.header.version < 3 or not features & bit:
                continue
            without = (features & ~bit).to_bytes(8, "big")
            image = Patched(self._source, FEATURES_AT, without)
            other = check_image(image, limits=_REFERENCES).mismatches
            if other is None:
                continue
            explained = np.count_nonzero(other.count_references(data))
            if explained * 10 >= len(data) * 9:
                return name
        return ""

    # -- tables ----------------------------------------------------------------------------------

    def _judge(self, at: I64) -> _Tables:
        """Whether the targets of tables are leaked too, and tables themselves.

        With an external data file the targets are not in this file: there, looking like a table is
        enough, if all of it does.
        """
        known = (_known_l2_tables(self._report), self._leaked[at])
        tables = distinct(np.concatenate(known))
        numbers = np.zeros((6, len(at)), dtype=np.int64)
        copied, led_alone = np.zeros((2, len(at)), dtype=np.bool_)
        offsets = self._leaked[at] << self._geometry.cluster_bits
        for read in read_filled(self._source, offsets, self._geometry.cluster_size):
            part = read.part
            # Columns of nothing but zeros count for nothing: most of tables that are mostly holes.
            words = filled_columns(self._looker.table_words(read.rows))
            filled, plausible = words != 0, self._looker.plausible(words)
            is_own = self._looker.are_own(words, plausible)
            copied[part] = is_own.any(axis=1)
            numbers[0, part] = np.count_nonzero(filled, axis=1)
            numbers[1, part] = np.count_nonzero(filled & plausible, axis=1)
            targets = self._looker.targets(words, plausible)
            led_alone[part] = self._lead_to_data(np.where(is_own, targets, 0))
            numbers[5, part] = self._count_uncounted(words, targets, is_own)
            numbers[2:5, part] = self._count_targets(targets, part.start, tables)
        entries_, plausible_, targets_, hits, to_tables, uncounted = numbers
        # A newer copy of a table in use had what is new alone, as an older one has nothing.
        lost: Mask = (hits * 2 >= targets_) | led_alone
        if self._geometry.external_data:
            lost = entries_ == plausible_
        is_l1 = to_tables * 2 > targets_
        in_use = ~self._unused[at]
        # What is in use has lost an entry only where one is missing: in another disk, at its index.
        lost &= ~in_use | np.isin(self._leaked[at], self._missed_tables())
        # Where most of what it led to was freed, or has gone other ways, a table is an older one.
        uncounted[(hits * 2 < targets_) | ~lost | is_l1 | in_use] = 0
        return _Tables(
            at, entries_, plausible_, targets_, hits, is_l1, copied, lost, in_use, uncounted
        )

    def _missed_tables(self) -> I64:
        """The clusters of L2 tables whose L1 index leads to none in one of the disks."""
        regions = self._report.regions
        tables = regions.select(regions.structure == Structure.L2_TABLE)
        tables = tables.select(self._gaps.cover(tables.l1_index))
        return tables.first(self._geometry.cluster_bits)

    def _lead_to_data(self, targets: I64) -> Mask:
        """Which tables lead to a leaked cluster with data that nothing else leads to."""
        row, at = np.nonzero(targets)
        rank = self._ranks(targets[row, at])
        alone = (rank != NONE) & self._unused[rank] & ~np.isin(self._look[rank], _NO_DATA)
        result: Mask = np.bincount(row[alone], minlength=len(targets)) > 0
        return result

    def _count_targets(self, targets: I64, first: int, tables: I64) -> I64:
        """Of each table: its targets, those that are leaked, and those that are *tables*; (3, n).

        Puts the leaked ones into the group of their table, which is number *first* and up: of
        several tables the first one's, whichever are read together.
        """
        if not (targets[:, 1:] > targets[:, :-1]).all():
            targets.sort(axis=1)
        new = targets != 0
        new[:, 1:] &= targets[:, 1:] != targets[:, :-1]
        row = np.repeat(np.arange(len(targets)), np.count_nonzero(new, axis=1))
        rank = self._ranks(targets[new])
        hit = rank != NONE
        free = hit & (self._group[rank] == NONE)
        self._group[rank[free][::-1]] = first + row[free][::-1]
        rows = (row, row[hit], row[np.isin(targets[new], tables)])
        return np.stack([np.bincount(some, minlength=len(targets)) for some in rows])

    def _count_uncounted(self, words: U64, targets: I64, is_own: Mask) -> I64:
        """Of each table: how many entries lead to a cluster that nothing refers to, or that is
        counted as free, and that counts fewer references than the table has to it. It was lowered:
        for those nothing leaks.

        Entries of the active disk, as far as that is known: *is_own*, and all that are compressed;
        in a table that has such ones, others that lead to what a snapshot has. What is a hole holds
        nothing.
        """
        result = np.zeros(len(targets), dtype=np.int64)
        is_packed = (words & np.uint64(entries.COMPRESSED)) != 0
        has_own = is_own.any(axis=1, keepdims=True)
        row, at = np.nonzero((has_own | is_packed) & (targets != 0))
        if self._geometry.external_data or not len(row):
            return result
        slots, known = self._mismatches.index.find(targets[row, at])
        row, at, slots = row[known], at[known], slots[known]
        # Several compressed clusters may lie in one, and of data there is one.
        is_unused = self._mismatches.counted[slots] == 0
        likely = is_packed[row, at] & is_unused
        likely |= (self._mismatches.stored[slots] == 0) & (is_own[row, at] | ~is_unused)
        row, at, slots = row[likely], at[likely], slots[likely]
        order = np.lexsort((row, slots))
        row, slots, cluster = row[order], slots[order], targets[row, at][order]
        first = np.flatnonzero((np.diff(row, prepend=-1) != 0) | (np.diff(slots, prepend=-1) != 0))
        times = np.diff(first, append=len(row))
        row, slots, cluster = row[first], slots[first], cluster[first]
        # Of a cluster that several tables lead to, what leaks is counted once.
        before = np.cumsum(times) - times
        begins = np.flatnonzero(np.diff(slots, prepend=-1))
        before -= np.repeat(before[begins], np.diff(begins, append=len(slots)))
        # What looks free and is looked at like a leak has lost one reference at least.
        leaks = np.minimum(self._mismatches.stored[slots].astype(np.uint64), MAX_REFERENCES)
        leaks = np.maximum(leaks.astype(np.int64), self._ranks(cluster) != NONE)
        more = np.clip(before + times - leaks, 0, times)
        some = np.flatnonzero(more)
        some = some[self._are_there(cluster[some])]
        np.add.at(result, row[some], more[some])
        return result

    def _are_there(self, clusters: I64) -> Mask:
        """Which of *clusters* are in no hole of the file."""
        places, at = np.unique(clusters << self._geometry.cluster_bits, return_inverse=True)
        present = present_tables(self._source, places, self._geometry.cluster_size, anyway=0)
        is_there: Mask = present[at]
        return is_there

    def _ranks(self, clusters: I64) -> I64:
        """Which of the leaked ones each of *clusters* is; `NONE`: it is none of them."""
        if len(self._rank):
            known = clusters < len(self._rank)
            return np.where(known, self._rank[np.where(known, clusters, 0)], NONE)
        at = np.minimum(np.searchsorted(self._leaked, clusters), len(self._leaked) - 1)
        return np.where(self._leaked[at] == clusters, at, NONE)

    def _objects(
        self, tables: _Tables, signature: U8, snapshots: tuple[Snapshot, ...]
    ) -> list[Suspect]:
        """The first tables, each with where it stood and what it mapped."""
        listed = slice(0, self._most_tables)
        offsets = self._leaked[tables.at[listed]] << self._geometry.cluster_bits
        places = _Places(
            self._source,
            self._report,
            self._gaps,
            offsets=offsets,
            tables=tables,
            snapshots=snapshots,
        )
        members = self._members(len(offsets))
        return [
            Suspect(
                offset=offset,
                words=int(tables.words[number]),
                plausible=int(tables.plausible[number]),
                targets=int(tables.targets[number]),
                leaked_targets=int(tables.leaked_targets[number]),
                is_l1=bool(tables.is_l1[number]),
                looks_lost=bool(tables.looks_lost[number]),
                in_use=bool(tables.in_use[number]),
                places=places.of(number)[0],
                place_count=places.of(number)[1],
                snapshot=places.snapshot_of(number),
                mapped=looks_of(self._look[members[number]]),
                starts_with=names_of(signature[members[number]]),
            )
            for number, offset in enumerate(offsets.tolist())
        ]

    def _members(self, count: int) -> list[I64]:
        """Of each of the first *count* tables the leaked clusters of its group."""
        order = np.argsort(self._group, kind="stable")
        bounds = np.searchsorted(self._group[order], np.arange(count + 1)).tolist()
        return [order[low:high] for low, high in pairwise(bounds)]

    # -- snapshots -------------------------------------------------------------------------------

    def _lost_snapshots(self) -> tuple[Snapshot, ...]:
        """Snapshots that a snapshot table names, whose L1 table is leaked.

        In the present table they stand behind those that the header counts; in a leaked one too.
        """
        header = self._report.layout.header if self._report.layout else None
        regions = self._report.regions
        present = regions.select(regions.structure == Structure.SNAPSHOT_TABLE)
        starts: list[int] = (present.offset + present.size).tolist()
        if not starts and header is not None:  # it counts none, or its table cannot be read
            starts.append(header.snapshots_offset)
        leaked = self._leaked[self._look == Look.SNAPSHOT_TABLE][:MAX_LOST_SNAPSHOTS]
        starts += (leaked << self._geometry.cluster_bits).tolist()
        listed = chain.from_iterable(self._snapshots_from(start) for start in starts)
        found: dict[int, Snapshot] = {}
        for snapshot in islice(listed, MAX_LOST_SNAPSHOTS):
            at = np.array([snapshot.l1_table_offset >> self._geometry.cluster_bits])
            if self._ranks(at)[0] != NONE:
                found.setdefault(snapshot.l1_table_offset, snapshot)
        return tuple(found.values())

    def _snapshots_from(self, position: int) -> Iterator[Snapshot]:
        """The entries of a snapshot table from *position* on, as far as they make sense."""
        size = self._geometry.cluster_size
        while True:
            position = (position + 7) & ~7
            try:
                snapshot = decode_snapshot(self._source, position)
            except ImageError:
                return
            offset, length = snapshot.l1_table_offset, snapshot.l1_size * 8
            if not offset or offset % size or not 0 < length <= MAX_L1_BYTES:
                return
            yield snapshot
            position += ENTRY_BYTES + len(snapshot.extra_data)
            position += len(snapshot.id_str) + len(snapshot.name)


_NO_DATA = (Look.ZEROS, Look.BITMAP, Look.REFTABLE, Look.OLD_REFBLOCK)

_BITS = {
    Incompatible.DATA_FILE: "external data file",
    Incompatible.EXTENDED_L2: "extended L2 entries",
}
"""Under whose other reading the tables refer to other clusters, by the names that QEMU gives."""


def _references_lost(mismatches: Mismatches, leaked: I64) -> U32:
    """How many references each cluster has lost, as far as its refcount can tell; uint32."""
    lost = np.ones(len(leaked), dtype=np.uint32)
    for start in range(0, len(leaked), CHUNK):
        slots, known = mismatches.index.find(leaked[start : start + CHUNK])
        stored, counted = (
            np.minimum(values[slots[known]].astype(np.uint64), MAX_REFERENCES).astype(np.int64)
            for values in (mismatches.stored, mismatches.counted)
        )
        lost[start + np.flatnonzero(known)] = np.maximum(stored - counted, 1)
    return lost


class _Places:
    """Where former tables may have stood."""

    def __init__(
        self,
        source: Source,
        report: Report,
        gaps: Gaps,
        *,
        offsets: I64,
        tables: _Tables,
        snapshots: tuple[Snapshot, ...],
    ) -> None:
        self._report, self._offsets, self._tables = report, offsets, tables
        self._snapshots = snapshots
        self._gaps = gaps
        self._anywhere = {
            only_active: (
                self._gaps.first(PLACES_NAMED, only_active=only_active),
                self._gaps.entries(only_active=only_active),
            )
            for only_active in (False, True)
        }
        self._known = self._known_places() | self._lost_places(source)

    def of(self, number: int) -> tuple[tuple[Place, ...], int]:
        """The first places of the table of that number, and how many L1 entries there are."""
        if self._tables.is_l1[number]:
            return (), 0
        place = self._known.get(int(self._offsets[number]))
        if place is not None:
            return (place,), 1
        return self._anywhere[bool(self._tables.copied[number])]

    def snapshot_of(self, number: int) -> Snapshot | None:
        """The lost snapshot whose L1 table that one is, or a part of it."""
        offset = int(self._offsets[number])
        return self._snapshot_at(offset) if self._tables.is_l1[number] else None

    def _snapshot_at(self, offset: int) -> Snapshot | None:
        for snapshot in self._snapshots:
            start = snapshot.l1_table_offset
            if start <= offset < start + snapshot.l1_size * 8:
                return snapshot
        return None

    def _known_places(self) -> dict[int, Place]:
        """Tables that an L1 entry still leads to."""
        regions = self._report.regions
        tables = regions.select(regions.structure == Structure.L2_TABLE)
        mine = tables.select(np.isin(tables.offset, self._offsets, assume_unique=True))
        columns = (mine.offset, mine.snapshot, mine.l1_index)
        return {
            offset: Place(PlaceKind.SHARED, snapshot, l1_index, 1, self._gaps.coverage)
            for offset, snapshot, l1_index in zip(*(c.tolist() for c in columns), strict=True)
        }

    def _lost_places(self, source: Source) -> dict[int, Place]:
        """L2 tables that a lost L1 table leads to: their place in it says what they mapped."""
        size = self._report.geometry.cluster_size
        is_l1 = (
            self._tables.is_l1[: len(self._offsets)] & self._tables.looks_lost[: len(self._offsets)]
        )
        base, end = 0, NONE
        found: dict[int, Place] = {}
        for offset in self._offsets[is_l1][:MAX_LOST_L1].tolist():
            snapshot = self._snapshot_at(offset)
            if snapshot is not None:
                base = (offset - snapshot.l1_table_offset) // 8
            else:
                base = base + size // 8 if offset == end else 0
            end = offset + size
            index, words = nonzero_words(source, offset, size // 8)
            tables = words & np.uint64(entries.L1_OFFSET)
            wanted = np.isin(tables, self._offsets.astype(np.uint64))
            for at, table in zip(index[wanted].tolist(), tables[wanted].tolist(), strict=True):
                place = Place(PlaceKind.LOST, UNLISTED, base + at, 1, self._gaps.coverage)
                found.setdefault(table, place)
        return found
