"""Where the guest's bytes are: L1 and L2 words in, runs of guest bytes out.

What a word means to a reader is decided here, once for all who ask: the reads of a disk, the map,
the explanation of an offset. Follows qcow2_get_host_offset and qcow2_get_subcluster_type for what
QEMU reads, and for what it refuses to. Nothing here reads the guest's bytes themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property

import numpy as np

from planner.arrays import I64, U8, U64, Mask, distinct, expand_ranges, is_among
from planner.metadata.gone_tables import GoneTables
from planner.metadata.mapping_tables import TableParts
from planner.qcow2 import entries
from planner.qcow2.entries import NO_HOST, ClusterType, L2Entries
from planner.qcow2.geometry import SUBCLUSTERS_PER_CLUSTER, Geometry
from planner.source import SECTOR, Salvaged, Source, nonzero_words, present_tables, read_tables

KEPT_RUNS = 1 << 20
"""Runs that a mapping keeps for the next read, at most: 34 MiB of them."""

_OF_A_TABLE = 64
"""So many runs take as much memory as a table that is kept has besides."""

_READ_WINDOW = 1 << 9
_READ_WINDOW_EXTENDED = 1 << 6
_WALK_WINDOW = 1 << 16
_WALK_WINDOW_EXTENDED = 1 << 11
"""L2 entries that are decoded at a time: for a read, and for a walk."""

_WALK_PIECE = 1 << 13
"""Entries of a table that are left out together where they are a hole: to ask is as much as to
decode fewer.
"""

_TABLES_WINDOW_EXTENDED = 1 << 13
"""Entries of several tables that are decoded at a time; without subclusters `_WALK_WINDOW`."""

MAX_LAID = 1 << 16
"""So many runs of tables are laid out at a time, and one table more."""

Reading = Callable[[int], None]
"""Is told how many L2 entries are about to be read, and may raise."""


def read_freely(_entries: int) -> None:
    """Whoever counts nothing."""


class RunKind(IntEnum):
    """What a run of guest bytes is read from."""

    UNALLOCATED = 0
    """From the backing file; zeros without one."""
    ZERO = 1
    DATA = 2
    COMPRESSED = 3
    DAMAGED = 4
    """Cannot be read: see `Flaw`."""


class Flaw(IntEnum):
    """Why a run cannot be read."""

    NONE = 0
    L2_MISALIGNED = 1
    CLUSTER_MISALIGNED = 2
    ZERO_IN_V2 = 3
    COMPRESSED_EXTERNAL = 4
    NOT_IN_PLACE = 5
    SUBCLUSTERS = 6
    TABLE_LOST = 7
    CLUSTER_LOST = 8
    TABLE_GONE = 9


FLAW_SENTENCES = {
    Flaw.L2_MISALIGNED: "its L1 entry leads to an offset that is not cluster aligned",
    Flaw.CLUSTER_MISALIGNED: "its L2 entry leads to an offset that is not cluster aligned",
    Flaw.ZERO_IN_V2: "its L2 entry has the zero flag, which version 2 does not know",
    Flaw.COMPRESSED_EXTERNAL: "its L2 entry is compressed, and the data is in an external file",
    Flaw.NOT_IN_PLACE: "its offset in the external data file is not that in the guest",
    Flaw.SUBCLUSTERS: "the subcluster bitmap of its L2 entry contradicts itself",
    Flaw.TABLE_LOST: "its L1 or L2 entry is past the end of the file, or cannot be read",
    Flaw.CLUSTER_LOST: "its cluster is past the end of the file",
    Flaw.TABLE_GONE: "its L1 or L2 table was overwritten with something else",
}

_FLAWS: tuple[tuple[Flaw, Callable[[L2Entries], Mask]], ...] = (
    (Flaw.CLUSTER_MISALIGNED, lambda entry: entry.is_misaligned),
    (Flaw.COMPRESSED_EXTERNAL, lambda entry: entry.is_compressed_elsewhere),
    (Flaw.ZERO_IN_V2, lambda entry: entry.is_zero_in_version_2),
    (Flaw.SUBCLUSTERS, lambda entry: entry.has_subcluster_conflict),
    (Flaw.SUBCLUSTERS, lambda entry: entry.has_subclusters_without_cluster),
)
"""What an L2 entry cannot be read with; of several the last."""

_KIND_OF_TYPE = np.zeros(len(ClusterType), dtype=np.uint8)
_KIND_OF_TYPE[ClusterType.ZERO_PLAIN] = RunKind.ZERO
_KIND_OF_TYPE[ClusterType.ZERO_ALLOC] = RunKind.ZERO
_KIND_OF_TYPE[ClusterType.NORMAL] = RunKind.DATA
_KIND_OF_TYPE[ClusterType.COMPRESSED] = RunKind.COMPRESSED


@dataclass(frozen=True, slots=True)
class Runs:
    """Runs of guest bytes, one a row, adjacent and ascending. Offsets and lengths in bytes.

    ``guest``, ``length``: which. ``kind``: `RunKind`. ``host``: where the run begins in the data
    file (for a compressed cluster where its data begins in the image, even if the run is only a
    part of it), or `NO_HOST`; a run that is zero or unallocated may have a host cluster too.
    ``stored``: length of the compressed data, else 0. ``flaw``: `Flaw`.
    """

    guest: I64
    length: I64
    kind: U8
    host: I64
    stored: I64
    flaw: U8

    def __len__(self) -> int:
        return len(self.guest)

    @classmethod
    def unallocated(cls, offset: int, end: int) -> Runs:
        """One run, of which the image knows nothing."""
        return cls.all_unallocated(np.array([offset]), np.array([end]))

    @classmethod
    def all_unallocated(cls, offset: I64, end: I64) -> Runs:
        """Runs of that sort."""
        return cls(
            guest=offset,
            length=end - offset,
            kind=np.full(len(offset), RunKind.UNALLOCATED, dtype=np.uint8),
            host=np.full(len(offset), NO_HOST, dtype=np.int64),
            stored=np.zeros(len(offset), dtype=np.int64),
            flaw=np.zeros(len(offset), dtype=np.uint8),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Runs]) -> Runs:
        """All of them, one after the other."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            guest=np.concatenate([part.guest for part in parts]),
            length=np.concatenate([part.length for part in parts]),
            kind=np.concatenate([part.kind for part in parts]),
            host=np.concatenate([part.host for part in parts]),
            stored=np.concatenate([part.stored for part in parts]),
            flaw=np.concatenate([part.flaw for part in parts]),
        )

    def select(self, which: I64 | Mask | slice) -> Runs:
        """The rows *which*."""
        return Runs(
            guest=self.guest[which],
            length=self.length[which],
            kind=self.kind[which],
            host=self.host[which],
            stored=self.stored[which],
            flaw=self.flaw[which],
        )

    def joined(self, *, packed: bool = False, within: int = 0) -> Runs:
        """Neighbours that continue each other as one run.

        Each compressed cluster stays alone, unless *packed*: then ``host`` and ``stored`` are those
        of the first one of a run. *within*: so many bytes, if any, from a multiple of them on, no
        run goes on behind.
        """
        if len(self) < 2:
            return self
        host = np.where(self.host == NO_HOST, NO_HOST, self.host + self.length)
        compressed = self.kind[1:] == RunKind.COMPRESSED
        apart = self.host[1:] != host[:-1]
        breaks = np.ones(len(self), dtype=np.bool_)
        breaks[1:] = (
            (self.kind[1:] != self.kind[:-1])
            | (self.flaw[1:] != self.flaw[:-1])
            | (apart & ~compressed if packed else apart | compressed)
        )
        if within:
            breaks[1:] |= self.guest[1:] % within == 0
        if breaks.all():
            return self
        first = np.flatnonzero(breaks)
        return replace(self.select(first), length=np.add.reduceat(self.length, first))

    def without_lost(self, end: int) -> Runs:
        """The same, of which data past host offset *end* is not there: it is DAMAGED."""
        data = self.kind == RunKind.DATA
        held = np.where(data, np.clip(end - self.host, 0, self.length), self.length)
        if (held == self.length).all():
            return self
        cut = (held > 0) & (held < self.length)
        both = self.select(np.repeat(np.arange(len(self)), 1 + cut))
        # Of a run that the end cuts there are two now: what is there, and what is not.
        second = np.flatnonzero(np.repeat(cut, 1 + cut))[1::2]
        skipped, lost = np.zeros(len(both), dtype=np.int64), np.repeat(held == 0, 1 + cut)
        skipped[second], lost[second] = held[cut], True
        length = both.length - skipped
        length[second - 1] = held[cut]
        return replace(
            both,
            guest=both.guest + skipped,
            length=length,
            kind=np.where(lost, RunKind.DAMAGED, both.kind).astype(np.uint8),
            host=np.where(lost, NO_HOST, both.host),
            flaw=np.where(lost, Flaw.CLUSTER_LOST, both.flaw).astype(np.uint8),
        )

    def cut(self, offset: int, end: int) -> Runs:
        """What of them lies in *offset* to *end*."""
        low = int(np.searchsorted(self.guest, offset, side="right")) - 1
        high = int(np.searchsorted(self.guest, end, side="left"))
        part = self.select(slice(max(0, low), high))
        return part.narrowed(
            np.maximum(part.guest, offset), np.minimum(part.guest + part.length, end)
        )

    def over(self, beneath: Runs) -> Runs:
        """The same, and between them what *beneath* has there.

        Either may have gaps; *beneath* begins no later.
        """
        free = np.concatenate((beneath.guest[:1], self.guest + self.length))
        until = np.append(self.guest, beneath.guest[-1] + beneath.length[-1])
        starts = distinct(np.concatenate((beneath.guest, free)))
        below = beneath.select(np.searchsorted(beneath.guest, starts, side="right") - 1)
        ends = np.minimum(
            below.guest + below.length, until[np.searchsorted(free, starts, side="right") - 1]
        )
        shown = starts < ends
        both = Runs.concatenate([self, below.select(shown).narrowed(starts[shown], ends[shown])])
        return both.select(np.argsort(both.guest, kind="stable"))

    def narrowed(self, guest: I64, end: I64) -> Runs:
        """Of each row what is from *guest* to *end*."""
        moves = (self.host != NO_HOST) & (self.kind != RunKind.COMPRESSED)
        host = self.host + np.where(moves, guest - self.guest, 0)
        return replace(self, guest=guest, length=end - guest, host=host)


def runs_of_entries(
    guest: I64,
    words: U64,
    bitmaps: U64 | None,
    geometry: Geometry,
    table_flaw: U8,
    *,
    nowhere: bool | Mask = False,
    clusters: I64 | int = 1,
) -> Runs:
    """The runs of guest clusters, a run a cluster, or a subcluster where those of one differ.

    *guest*: their offsets. *words*, *bitmaps*: their L2 entries (uint64); *bitmaps* only with
    extended L2. *table_flaw*: `Flaw` of what leads to them, NONE where their words are what is in
    the image. All of shape (clusters,). *nowhere*: with an external data file none of them, or none
    of those, is in its place there, whatever *guest* is. *clusters*: how many a run is of: more
    than one only where their entries say nothing.
    """
    entry = L2Entries(geometry, words, entries.bitmaps_of(words, bitmaps))
    flaw = np.zeros(len(words), dtype=np.uint8)
    if geometry.external_data:
        flaw[entry.has_cluster & (nowhere | (entry.offset != guest))] = Flaw.NOT_IN_PLACE
    for each, is_so in _FLAWS:
        flaw[is_so(entry)] = each
    np.copyto(flaw, table_flaw, where=table_flaw != Flaw.NONE)
    damaged = flaw != Flaw.NONE
    runs = Runs(
        guest=guest,
        length=np.full(len(words), geometry.cluster_size, dtype=np.int64) * clusters,
        kind=np.where(damaged, RunKind.DAMAGED, _KIND_OF_TYPE[entry.types]).astype(np.uint8),
        host=np.where(damaged, NO_HOST, entry.offset),
        stored=np.where(damaged | ~entry.is_compressed, 0, entry.size),
        flaw=flaw,
    )
    return runs if bitmaps is None else _subclusters(runs, bitmaps, geometry)


def _are_alike(bitmaps: U64) -> Mask:
    """Of which clusters all subclusters are the same."""
    every = np.uint64(entries.SUBCLUSTERS_ALLOCATED)
    zero, allocated = bitmaps >> np.uint64(SUBCLUSTERS_PER_CLUSTER), bitmaps & every
    alike: Mask = (zero == every) | ((zero == 0) & ((allocated == 0) | (allocated == every)))
    return alike


def _subclusters(runs: Runs, bitmaps: U64, geometry: Geometry) -> Runs:
    """Runs of whole clusters with extended L2 entries as runs of subclusters, where they differ."""
    known = (runs.kind == RunKind.COMPRESSED) | (runs.kind == RunKind.DAMAGED)
    whole = known | _are_alike(bitmaps)
    count = np.where(whole, 1, SUBCLUSTERS_PER_CLUSTER)
    of = np.repeat(np.arange(len(runs)), count)
    number = np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count)
    size = geometry.cluster_size // SUBCLUSTERS_PER_CLUSTER
    allocated = bitmaps[of] >> number.astype(np.uint64) & np.uint64(1) != 0
    zero = bitmaps[of] >> (number + 32).astype(np.uint64) & np.uint64(1) != 0
    kind = np.where(zero, RunKind.ZERO, np.where(allocated, RunKind.DATA, RunKind.UNALLOCATED))
    host = runs.host[of]
    return Runs(
        guest=runs.guest[of] + number * size,
        length=np.where(whole, runs.length, size)[of],
        kind=np.where(known[of], runs.kind[of], kind).astype(np.uint8),
        host=host + np.where(host != NO_HOST, number * size, 0),
        stored=runs.stored[of],
        flaw=runs.flaw[of],
    )


@dataclass(frozen=True, slots=True)
class _Places:
    """Where tables stand, a row each: ``number`` of the first L1 entry, ``times`` in a row, and
    the offset of the ``table`` that is there.
    """

    number: I64
    times: I64
    table: I64

    def __len__(self) -> int:
        return len(self.number)

    def select(self, which: I64 | slice) -> _Places:
        """The rows *which*."""
        return _Places(self.number[which], self.times[which], self.table[which])

    def in_parts(self, rows: I64) -> Iterator[_Places]:
        """All of them, up to `MAX_LAID` runs of theirs at a time and one table more.

        *rows*: how many runs the table of each has; none has more than that.
        """
        most = MAX_LAID // rows
        pieces = -(-self.times // most)
        of = np.repeat(np.arange(len(self)), pieces)
        before = (np.arange(len(of)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * most[of]
        times = np.minimum(most[of], self.times[of] - before)
        every = _Places(self.number[of] + before, times, self.table[of])
        rows = times * rows[of]
        part = (np.cumsum(rows) - rows) // MAX_LAID
        ends = np.flatnonzero(np.diff(part, append=-1)) + 1
        for begin, end in itertools.pairwise([0, *ends.tolist()]):
            yield every.select(slice(begin, end))


@dataclass(frozen=True, slots=True)
class _Walk:
    """What a walk is to give: guest bytes from ``offset`` to ``end``, ``packed`` as of
    `Runs.joined`, ``reading`` as of `Mapping.walk`. ``again``: offsets of the tables that stand at
    several L1 indices there, ascending.
    """

    offset: int
    end: int
    packed: bool
    reading: Reading
    again: I64

    def repeats(self, tables: I64) -> Mask:
        """Which of *tables* are such ones."""
        return is_among(tables, self.again)


def _laid(places: _Places, decoded: dict[int, Runs], size: int) -> Runs:
    """The runs of tables where they stand, ascending, with gaps where no table is.

    *decoded*: those of each as if it stood at index 0. *size*: guest bytes of a table.
    """
    offsets, which = np.unique(places.table, return_inverse=True)
    tables = [decoded[offset] for offset in offsets.tolist()]
    rows = np.array([len(runs) for runs in tables])
    table = np.repeat(which, places.times)
    number = expand_ranges(places.number, places.number + places.times - 1)
    last = np.cumsum(rows)[table]
    rows = rows[table]
    runs = Runs.concatenate(tables).select(expand_ranges(last - rows, last - 1))
    return replace(runs, guest=runs.guest + np.repeat(number * size, rows))


def _over(in_place: Runs | None, runs: Runs) -> Runs:
    """*runs*, ascending, over them what there is of *in_place* from the first to the last."""
    if in_place is None:
        return runs
    ends = [runs.guest[0], runs.guest[-1] + runs.length[-1]]
    low, high = np.searchsorted(in_place.guest, ends)
    return in_place.select(slice(low, high)).over(runs) if low < high else runs


class Mapping:
    """Where the guest bytes that one L1 table maps are. Usable from several threads.

    Costs what there is of the L1 table; L2 tables are read when they are asked for. What has been
    looked up is kept, up to `KEPT_RUNS`, and not looked at again: an image that changes needs
    another mapping.
    """

    def __init__(
        self,
        source: Source,
        geometry: Geometry,
        l1_offset: int,
        l1_size: int,
        *,
        data_end: int | None = None,
    ) -> None:
        """*l1_size*: entries of the table at *l1_offset*.

        *data_end*: where the file of the data ends. Given, tables and data that are past the end
        of their file are DAMAGED, and so is what a table maps that cannot be read, or that was
        overwritten; otherwise all of that is as QEMU has it: zeros, an error, or whatever the
        words there happen to lead to.
        """
        self.geometry = geometry
        self._data_end = data_end
        self._salvaged = None if data_end is None else Salvaged(source)
        self._source: Source = self._salvaged or source
        index, words = nonzero_words(self._source, l1_offset, l1_size)
        offset = entries.l1_offsets(words)
        self._gone_tables = GoneTables(geometry, source.size)
        self._is_l1_gone = self._gone_tables.is_gone_l1(words)
        # Where to look for overwritten tables: L1 indices, the first and behind the last.
        self._marked = range(l1_size if data_end is not None else 0)
        leads = offset != 0
        self._index, self._offset = index[leads], offset[leads]
        misaligned = self._offset & (geometry.cluster_size - 1) != 0
        self._flaw = np.where(misaligned, Flaw.L2_MISALIGNED, Flaw.NONE).astype(np.uint8)
        # By L1 index; none where nothing is lost.
        self._lost: Mask = np.zeros(0, dtype=np.bool_)
        if self._salvaged is not None:
            self._note_lost(self._salvaged, l1_offset, l1_size)
        extended = geometry.extended_l2
        self._read_window = _READ_WINDOW_EXTENDED if extended else _READ_WINDOW
        self._walk_window = _WALK_WINDOW_EXTENDED if extended else _WALK_WINDOW
        self._tables_window = _TABLES_WINDOW_EXTENDED if extended else _WALK_WINDOW
        self._piece = min(geometry.l2_entries, _WALK_PIECE, self._walk_window)
        runs_a_window = self._read_window * (SUBCLUSTERS_PER_CLUSTER if extended else 1)
        self._windows_kept = max(1, KEPT_RUNS // runs_a_window)
        self._kept: dict[int, Runs] = {}
        self._last_marked: tuple[range, Mapping] | None = None

    def _note_lost(self, source: Salvaged, l1_offset: int, l1_size: int) -> None:
        """Give a flaw to L2 tables past the end of the file; note which L1 entries are lost.

        These are a mask, however many the header claims: among the others they would take 17 bytes
        each, and several times as much while they are put in order.
        """
        self._flaw[(self._offset >= source.size) & (self._flaw == Flaw.NONE)] = Flaw.TABLE_LOST
        lost = source.lost_words(l1_offset, l1_size)
        if lost.any():
            kept = ~lost[self._index]
            self._index, self._offset = self._index[kept], self._offset[kept]
            self._flaw, self._lost = self._flaw[kept], lost

    def marked(self, offset: int, end: int) -> Mapping:
        """The same, but that what a table maps which was overwritten is DAMAGED, for who walks from
        guest offset *offset* to *end*. The last one is kept: who shows a map walks three times.
        """
        coverage = self.geometry.l2_coverage
        span = range(offset // coverage, -(-end // coverage))
        known = self._last_marked
        if known is None or known[0] != span:
            other = copy(self)
            vars(other).update(_marked=span, _kept={}, _last_marked=None)
            known = self._last_marked = span, other
        return known[1]

    @property
    def _is_gone(self) -> bool:
        """Whether nothing is left of the L1 table, and that is to be told."""
        return self._is_l1_gone and len(self._marked) > 0

    def runs(self, offset: int, end: int, source: Source | None = None) -> Runs:
        """The runs from guest offset *offset* to *end*, for a read: bytes around are kept for more.

        *source*: what to read tables from instead; an error of its own leaves everything as it is.
        """
        size = self._read_window << self.geometry.cluster_bits
        numbers = range(offset // size, -(-end // size))
        parts = [self.window(number, source) for number in numbers]
        return Runs.concatenate(parts).cut(offset, end) if parts else Runs.unallocated(0, 0)

    @property
    def window_size(self) -> int:
        """Guest bytes of a `window`; a power of two."""
        return self._read_window << self.geometry.cluster_bits

    def window(self, number: int, source: Source | None = None) -> Runs:
        """The joined runs of window *number*, which begins at that many times `window_size`."""
        runs = self._kept.get(number)
        if runs is None:
            count = self._read_window
            chosen = self._salvaged or source or self._source
            runs = self._decode(chosen, number * count, count).joined()
            if len(self._kept) >= self._windows_kept:
                self._kept.clear()
            self._kept[number] = runs
        return runs

    def walk(
        self, offset: int, end: int, *, packed: bool = False, reading: Reading = read_freely
    ) -> Iterator[Runs]:
        """All runs from guest offset *offset* to *end*, in joined batches, for one who wants all.

        What leads to no table, or to one in a hole, costs nothing; a table that several L1 entries
        lead to is read once. *packed*: as of `Runs.joined`. *reading*: is told how many entries
        are about to be read, and may raise.
        """
        if self._is_gone:
            yield self._gone_runs(offset, end)
            return
        walk, position = self._walk_windows, offset
        if self._is_by_table(offset, end):
            walk = self._walk_tables
        for each in walk(offset, end, packed, reading):
            runs = each.cut(offset, end)
            stop = int(runs.guest[-1] + runs.length[-1])
            if int(runs.length.sum()) < stop - position:
                runs = runs.over(self._lifeless(position, stop))
            yield runs.joined(packed=packed)
            position = stop
        if position < end:
            yield self._lifeless(position, end)

    def _is_by_table(self, offset: int, end: int) -> bool:
        """Whether to walk table by table: where they repeat, or stand far from each other."""
        if self._repeats:
            return True
        window = self._walk_window << self.geometry.cluster_bits
        tables = len(self._numbers_in_use(offset, end, self.geometry.l2_coverage))
        return tables <= 2 * len(self._numbers_in_use(offset, end, window))

    def _walk_windows(
        self, offset: int, end: int, packed: bool, reading: Reading
    ) -> Iterator[Runs]:
        """The runs where tables are in use, ascending; they may begin before, and end behind."""
        size = self._walk_window << self.geometry.cluster_bits
        for number in self._numbers_in_use(offset, end, size).tolist():
            reading(self._walk_window)
            runs = self._decode(self._source, number * self._walk_window, self._walk_window)
            yield runs.joined(packed=packed)

    def _walk_tables(self, offset: int, end: int, packed: bool, reading: Reading) -> Iterator[Runs]:
        """The same table by table; one that repeats is decoded once, unless it has very many."""
        numbers = self._numbers_in_use(offset, end, self.geometry.l2_coverage)
        tables = self._offset[np.searchsorted(self._index, numbers)]
        offsets, times = np.unique(tables, return_counts=True)
        walk = _Walk(offset, end, packed, reading, offsets[times > 1])
        in_place = self._in_place(numbers, tables, walk)
        breaks = np.ones(len(numbers), dtype=np.bool_)
        breaks[1:] = (np.diff(numbers) != 1) | (np.diff(tables) != 0)
        first = np.flatnonzero(breaks)
        places = _Places(numbers[first], np.diff(first, append=len(numbers)), tables[first])
        laid, rows = list[Runs](), 0
        for runs in self._lay(places, walk):
            laid.append(runs)
            rows += len(runs)
            if rows >= MAX_LAID:
                yield _over(in_place, Runs.concatenate(laid))
                laid, rows = [], 0
        if laid:
            yield _over(in_place, Runs.concatenate(laid))

    def _lay(self, places: _Places, walk: _Walk) -> Iterator[Runs]:
        """The runs of the tables at *places*, ascending; of one with very many a part at a time,
        and no part that is not wanted. Those that come again are kept, as many as `KEPT_RUNS` are.
        """
        end = 0
        while end < len(places):
            places, decoded, kept = places.select(slice(end, None)), dict[int, Runs](), 0
            _, first = np.unique(places.table, return_index=True)
            first, known, end = np.sort(first), 0, 0
            for tables in self._decoded(places.select(first), walk):
                decoded |= tables
                repeats = walk.repeats(places.table[first[known : known + len(tables)]]).tolist()
                known += len(tables)
                start, end = end, int(first[known]) if known < len(first) else len(places)
                some = places.select(slice(start, end))
                yield from self._lay_decoded(some, decoded, walk)
                for (table, runs), is_repeated in zip(tables.items(), repeats, strict=True):
                    if is_repeated:  # a copy: the others of its batch are not kept with it
                        decoded[table] = runs.select(np.arange(len(runs)))
                        kept += len(runs) + _OF_A_TABLE
                    else:
                        del decoded[table]
                if kept > KEPT_RUNS:
                    break

    def _decoded(self, places: _Places, walk: _Walk) -> Iterator[dict[int, Runs]]:
        """The tables at *places*, each at one of them, some at a time, as `_whole_tables` does."""
        most = self._tables_window // self._piece
        for start in range(0, len(places), most):
            some = places.select(slice(start, start + most))
            held = self._are_held(some.table)
            while len(some):
                tables = self._whole_tables(some, held, walk)
                yield tables
                some, held = some.select(slice(len(tables), None)), held[len(tables) :]

    def _lay_decoded(
        self, places: _Places, decoded: dict[int, Runs], walk: _Walk
    ) -> Iterator[Runs]:
        """The same of tables that were *decoded*, each as `_whole_tables` gives it."""
        offsets, which = np.unique(places.table, return_inverse=True)
        rows = np.array([len(decoded[offset]) for offset in offsets.tolist()])[which]
        turns = np.flatnonzero(np.diff(rows == 0)) + 1
        for start, end in itertools.pairwise([0, *turns.tolist(), len(places)]):
            some = places.select(slice(start, end))
            if rows[start]:
                for part in some.in_parts(rows[start:end]):
                    yield _laid(part, decoded, self.geometry.l2_coverage)
                continue
            columns = some.number.tolist(), some.times.tolist(), self._are_held(some.table)
            again = walk.repeats(some.table).tolist()
            for number, times, held, nowhere in zip(*columns, again, strict=True):
                for each in range(number, number + times):
                    yield from self._parts(each, held, walk, nowhere=nowhere)

    def _whole_tables(self, places: _Places, held: Mask, walk: _Walk) -> dict[int, Runs]:
        """All runs of the first tables at *places*, as if they stood at index 0, by their offsets.

        None of one that has more than `MAX_LAID`: to decode such a table anew each time takes no
        longer than to do anything with its runs, and memory for a part of it. *held*: as
        `_are_held` gives it of all of them.
        """
        size, at = self.geometry.l2_coverage, self._pieces
        total = np.cumsum(np.count_nonzero(held, axis=1) * self._piece)
        count = int(np.searchsorted(total, self._tables_window, side="right"))
        if not count:
            table = int(places.table[0])
            return {table: self._whole_table(int(places.number[0]), table, held[0], walk)}
        walk.reading(int(total[count - 1]))
        places, held = places.select(slice(count)), held[:count]
        home = places.number * size
        row, column = np.nonzero(held)
        guest = home[row] + (at[column] << self.geometry.cluster_bits)
        parts = self._decode_pieces(guest, places.table[row], at[column], walk)
        row, bounds = np.nonzero(np.diff(held, prepend=True, append=True, axis=1))
        bounds = home[row] + (bounds * self._piece << self.geometry.cluster_bits)
        runs = Runs.concatenate([*parts, Runs.all_unallocated(bounds[::2], bounds[1::2])])
        runs = runs.select(np.argsort(runs.guest, kind="stable"))
        runs = runs.joined(packed=walk.packed, within=size)
        low, high = (np.searchsorted(runs.guest, each) for each in (home, home + size))
        low = np.where(high - low > MAX_LAID, high, low)
        runs = replace(runs, guest=runs.guest % size)
        columns = places.table.tolist(), low.tolist(), high.tolist()
        return {
            table: runs.select(slice(start, stop))
            for table, start, stop in zip(*columns, strict=True)
        }

    def _decode_pieces(self, guest: I64, table: I64, at: I64, walk: _Walk) -> Iterator[Runs]:
        """The joined runs of pieces of tables: from guest offset *guest* on, of the *table* there
        from entry *at* on.

        Of extended entries no more than become `MAX_LAID` runs are taken apart at a time.
        """
        geometry, inside = self.geometry, np.arange(self._piece) << self.geometry.cluster_bits
        words, flaws = self._read_pieces(table + at * geometry.l2_entry_size)
        words, bitmaps = self._split(words)
        guest = (guest[:, None] + inside).reshape(-1)
        nowhere = np.repeat(walk.repeats(table), self._piece)
        runs = np.ones(len(words), dtype=np.int64)
        if bitmaps is not None:
            runs[~_are_alike(bitmaps)] = SUBCLUSTERS_PER_CLUSTER
        ends = np.flatnonzero(np.diff((np.cumsum(runs) - runs) // MAX_LAID, append=-1)) + 1
        for start, end in itertools.pairwise([0, *ends.tolist()]):
            part = slice(start, end)
            some = None if bitmaps is None else bitmaps[part]
            decoded = self._runs_of(
                guest[part], words[part], some, flaws[part], nowhere=nowhere[part]
            )
            yield decoded.joined(packed=walk.packed, within=geometry.l2_coverage)

    def _read_pieces(self, offset: I64) -> tuple[U64, U8]:
        """The words of pieces of tables at *offset*, and the flaw of each entry."""
        size = self._piece * self.geometry.l2_entry_size
        words = np.zeros((len(offset), size // 8), dtype=np.uint64)
        for part, rows in read_tables(self._source, offset, size):
            words[part] = rows.view(">u8")
        flaws = np.zeros((len(offset), self._piece), dtype=np.uint8)
        self._mark(flaws, np.arange(len(offset)), offset)
        return words.reshape(-1), flaws.reshape(-1)

    def _in_place(self, numbers: I64, tables: I64, walk: _Walk) -> Runs | None:
        """The rows of entries that are in their place in the data file, of the tables that stand at
        several L1 indices: each can be at one of them. Ascending, with gaps.

        *tables*: where the tables of L1 indices *numbers* are. None: without such a file no entry
        has a place, nor has any if there are none. Wherever else such a table stands, what it maps
        is damaged in one and the same way.
        """
        if not self.geometry.external_data:
            return None
        found, most = list[Runs](), self._tables_window // self._piece
        for start in range(0, len(walk.again), most):
            offsets = walk.again[start : start + most]
            row, column = np.nonzero(self._are_held(offsets))
            for begin in range(0, len(row), most):
                part = slice(begin, begin + most)
                places = offsets[row[part]], self._pieces[column[part]]
                walk.reading(len(places[0]) * self._piece)
                found.append(self._homes(numbers, tables, *places))
        rows = Runs.concatenate(found) if found else Runs.unallocated(0, 0)
        return rows.select(np.argsort(rows.guest, kind="stable")) if len(rows) else None

    def _homes(self, numbers: I64, tables: I64, table: I64, at: I64) -> Runs:
        """The same of the pieces of *table* from entry *at* on."""
        geometry = self.geometry
        words, flaws = self._read_pieces(table + at * geometry.l2_entry_size)
        words, bitmaps = self._split(words)
        entry = L2Entries(geometry, words, entries.bitmaps_of(words, bitmaps))
        guest = (at[:, None] + np.arange(self._piece)).reshape(-1) << geometry.cluster_bits
        homes, rest = np.divmod(entry.offset - guest, geometry.l2_coverage)
        place = np.minimum(np.searchsorted(numbers, homes), len(numbers) - 1)
        there = (numbers[place] == homes) & (tables[place] == np.repeat(table, self._piece))
        there &= (rest == 0) & entry.has_cluster & (flaws == Flaw.NONE)
        some = None if bitmaps is None else bitmaps[there]
        guest = (homes * geometry.l2_coverage + guest)[there]
        return self._runs_of(guest, words[there], some, flaws[there])

    def _whole_table(self, number: int, offset: int, held: Mask, walk: _Walk) -> Runs:
        """As `_whole_tables`, of the one at *offset*, L1 index *number*."""
        home, size = number * self.geometry.l2_coverage, self.geometry.l2_coverage
        parts, rows = list[Runs](), 0
        whole = replace(walk, offset=home, end=home + size)
        for part in self._parts(
            number, held, whole, nowhere=bool(walk.repeats(np.array([offset]))[0])
        ):
            parts.append(part)
            rows += len(part)
            if rows > MAX_LAID:
                return part.select(slice(0, 0))
        runs = Runs.concatenate(parts).joined(packed=walk.packed)
        return replace(runs, guest=runs.guest - home)

    def _parts(self, number: int, held: Mask, walk: _Walk, *, nowhere: bool) -> Iterator[Runs]:
        """The runs of the table at L1 index *number* a part at a time, however many there are; of
        those that have anything of what is wanted.

        *held*: which of its pieces may say anything. *nowhere*: as of `runs_of_entries`.
        """
        bits, most, at = self.geometry.cluster_bits, self.geometry.l2_entries, self._pieces
        # Neighbours that are there, and those that are not, together.
        begins = at % min(most, self._walk_window) == 0
        begins[1:] |= held[1:] != held[:-1]
        first = np.flatnonzero(begins)
        start = number * most + at[first]
        stop = start + np.diff(at[first], append=most)
        inside = (stop << bits > walk.offset) & (start << bits < walk.end)
        columns = start[inside].tolist(), stop[inside].tolist(), held[first][inside].tolist()
        for begin, end, is_held in zip(*columns, strict=True):
            if is_held:
                walk.reading(end - begin)
                runs = self._decode(self._source, begin, end - begin, nowhere=nowhere)
                yield runs.joined(packed=walk.packed)
            else:
                yield Runs.unallocated(begin << bits, end << bits)

    @property
    def _pieces(self) -> I64:
        """The first entries of the pieces in which a table is gone through."""
        return np.arange(0, self.geometry.l2_entries, self._piece)

    def _are_held(self, tables: I64) -> Mask:
        """Which pieces of *tables* may say anything, (tables, pieces)."""
        offset = (tables[:, None] + self._pieces * self.geometry.l2_entry_size).reshape(-1)
        return self._parts_in_use(offset, self._piece).reshape(len(tables), -1)

    @cached_property
    def _in_use(self) -> Mask:
        """Which L1 entries lead to a table that may hold anything but zeros."""
        sound = np.flatnonzero(self._flaw == Flaw.NONE)
        order = sound[np.argsort(self._offset[sound])]
        in_use = np.zeros(len(self._index), dtype=np.bool_)
        if len(order):
            in_use[order] = present_tables(
                self._source, self._offset[order], self.geometry.cluster_size
            )
        return in_use

    @cached_property
    def _repeats(self) -> frozenset[int]:
        """Offsets of the tables that several L1 entries lead to."""
        offset = np.sort(self._offset[self._in_use])
        return frozenset(offset[1:][offset[1:] == offset[:-1]].tolist())

    def _numbers_in_use(self, offset: int, end: int, size: int) -> I64:
        """Numbers of the parts of *size* bytes that a table in use maps some of; ascending."""
        coverage = self.geometry.l2_coverage
        tables = self._index[self._in_use]
        low, high = np.searchsorted(tables, [offset // coverage, -(-end // coverage)])
        inside = np.arange(max(1, coverage // size))
        numbers = distinct(((tables[low:high] * coverage // size)[:, None] + inside).reshape(-1))
        numbers = numbers[(numbers >= offset // size) & (numbers < -(-end // size))]
        if size >= coverage:
            return numbers
        table, part = np.divmod(numbers, coverage // size)
        count = size >> self.geometry.cluster_bits
        starts = self._offset[np.searchsorted(self._index, table)]
        starts = starts + part * (count * self.geometry.l2_entry_size)
        return numbers[self._parts_in_use(starts, count)]

    def _parts_in_use(self, offset: I64, count: int) -> Mask:
        """Which parts of tables, of *count* entries from *offset* each, may say anything.

        Those in a hole do not: what they map is not allocated, as where there is no table.
        """
        if count == self.geometry.l2_entries:
            return np.ones(len(offset), dtype=np.bool_)
        size = count * self.geometry.l2_entry_size
        order = np.argsort(offset, kind="stable")
        in_use = np.zeros(len(offset), dtype=np.bool_)
        in_use[order] = present_tables(self._source, offset[order], size, anyway=0)
        if self._salvaged is not None:
            # Past the end it is lost.
            in_use |= offset + size > self._salvaged.size
        if self._marked:
            # Of a table that was overwritten a hole may be lost, too.
            in_use |= np.isin(offset & ~(self.geometry.cluster_size - 1), self._gone[0])
        return in_use

    def _gone_runs(self, low: int, high: int) -> Runs:
        """The run from guest offset *low* to *high* of a disk whose L1 table was overwritten."""
        kind = np.array([RunKind.DAMAGED], dtype=np.uint8)
        flaw = np.array([Flaw.TABLE_GONE], dtype=np.uint8)
        return replace(Runs.unallocated(low, high), kind=kind, flaw=flaw)

    @cached_property
    def _gone(self) -> tuple[I64, Mask]:
        """Tables that were overwritten: their offsets, ascending, and which of their sectors."""
        is_wanted = (self._index >= self._marked.start) & (self._index < self._marked.stop)
        offsets, masks = distinct(self._offset[self._in_use & is_wanted]), []
        parts = TableParts.of(self._source, offsets, self.geometry.cluster_size)
        if parts.size < self.geometry.cluster_size:  # none is read whole of which no sector is gone
            found = [parts.table[:0]]
            for part, rows in parts.read(self._source):
                found.append(parts.table[part][self._gone_tables.counts(rows)[0] > 0])
            offsets = offsets[distinct(np.concatenate(found))]
        for part, rows in read_tables(self._source, offsets, self.geometry.cluster_size):
            sectors, _ = self._gone_tables.sectors(rows)
            some = np.flatnonzero(sectors.any(axis=1))
            masks.append((offsets[part][some], sectors[some]))
        nothing = np.zeros((0, self.geometry.cluster_size // SECTOR), dtype=np.bool_)
        return (
            np.concatenate([offsets[:0], *(found for found, _ in masks)]),
            np.concatenate([nothing, *(sectors for _, sectors in masks)]),
        )

    def _mark_gone(self, flaws: U8, rows: I64, offset: I64) -> None:
        """Mark the entries in *rows*, at *offset* in the file, that were overwritten."""
        tables, sectors = self._gone
        if not len(tables):
            return
        start = offset & ~(self.geometry.cluster_size - 1)
        at = np.searchsorted(tables, start)
        hit = np.flatnonzero(np.append(tables, -1)[at] == start)
        if not len(hit):
            return
        # Not all of a table may have been asked for.
        of_sector = SECTOR // self.geometry.l2_entry_size
        inside = (offset - start)[hit, None] // SECTOR + np.arange(flaws.shape[1] // of_sector)
        each = np.repeat(sectors[at[hit, None], inside], of_sector, axis=1)
        flaws[rows[hit]] = np.where(each, np.uint8(Flaw.TABLE_GONE), flaws[rows[hit]])

    def _lifeless(self, low: int, high: int) -> Runs:
        """The runs from guest offset *low* to *high*, where no table is in use."""
        coverage = self.geometry.l2_coverage
        first, last, flaw = self._flawed(low // coverage, -(-high // coverage))
        if not len(first):
            return Runs.unallocated(low, high)
        start, stop = first * coverage, last * coverage
        bounds = distinct(np.concatenate(([low], start, stop)))
        bounds = bounds[(bounds >= low) & (bounds < high)]
        before = np.searchsorted(start, bounds, side="right") - 1
        flawed = (before >= 0) & (bounds < stop[before])
        return Runs(
            guest=bounds,
            length=np.diff(bounds, append=high),
            kind=np.where(flawed, RunKind.DAMAGED, RunKind.UNALLOCATED).astype(np.uint8),
            host=np.full(len(bounds), NO_HOST, dtype=np.int64),
            stored=np.zeros(len(bounds), dtype=np.int64),
            flaw=np.where(flawed, flaw[before], Flaw.NONE).astype(np.uint8),
        ).joined()

    def _flawed(self, low: int, high: int) -> tuple[I64, I64, U8]:
        """L1 entries from *low* to *high* that lead to nothing that can be read: the first ones,
        those behind the last, and the `Flaw`, of stretches; those that are lost, together."""
        at, to = np.searchsorted(self._index, [low, high])
        which = at + np.flatnonzero(self._flaw[at:to])
        lost = self._lost[low:high]
        edges = low + np.flatnonzero(np.diff(lost, prepend=False, append=False))
        first = np.concatenate((self._index[which], edges[0::2]))
        last = np.concatenate((self._index[which] + 1, edges[1::2]))
        flaws = np.full(len(edges) // 2, Flaw.TABLE_LOST, dtype=np.uint8)
        order = np.argsort(first, kind="stable")
        return first[order], last[order], np.concatenate((self._flaw[which], flaws))[order]

    def _decode(self, source: Source, first: int, count: int, *, nowhere: bool = False) -> Runs:
        """The runs of *count* guest clusters from cluster *first* on."""
        words, flaws = self._read_words(source, first, count)
        guest = np.arange(first, first + count, dtype=np.int64) << self.geometry.cluster_bits
        return self._runs_of(guest, *self._split(words), flaws, nowhere=nowhere)

    def _split(self, words: U64) -> tuple[U64, U64 | None]:
        """L2 entries, and their bitmaps where they have any."""
        return (words[0::2], words[1::2]) if self.geometry.extended_l2 else (words, None)

    def _runs_of(
        self,
        guest: I64,
        words: U64,
        bitmaps: U64 | None,
        flaws: U8,
        *,
        nowhere: bool | Mask = False,
    ) -> Runs:
        """As `runs_of_entries`, but that what is past the end of the data file is lost.

        Entries of a table that say nothing, one after the other, become one run: often most do.
        """
        says_nothing = words == 0
        if bitmaps is not None:
            says_nothing &= bitmaps == 0
        says_nothing |= flaws != Flaw.NONE
        goes_on = says_nothing[1:] & says_nothing[:-1] & (flaws[1:] == flaws[:-1])
        goes_on &= guest[1:] - guest[:-1] == self.geometry.cluster_size
        goes_on &= guest[1:] & (self.geometry.l2_coverage - 1) != 0
        first = np.flatnonzero(np.append(True, ~goes_on))[: len(words)]
        runs = runs_of_entries(
            guest[first],
            words[first],
            None if bitmaps is None else bitmaps[first],
            self.geometry,
            flaws[first],
            nowhere=nowhere if isinstance(nowhere, bool) else nowhere[first],
            clusters=np.diff(first, append=len(words)),
        )
        return runs if self._data_end is None else runs.without_lost(self._data_end)

    def _read_words(self, source: Source, first: int, count: int) -> tuple[U64, U8]:
        """The L2 words of guest clusters, zeros where there is no table; and the flaw of each."""
        geometry = self.geometry
        per_table, width = geometry.l2_entries, geometry.l2_entry_size // 8
        low, high = first // per_table, -(-(first + count) // per_table)
        at, to = np.searchsorted(self._index, [low, high])
        index, offset, flaw = self._index[at:to] - low, self._offset[at:to], self._flaw[at:to]
        flaws = np.zeros(high - low, dtype=np.uint8)
        flaws[index] = flaw
        lost = self._lost[low:high]
        flaws[: len(lost)][lost] = Flaw.TABLE_LOST
        index, offset = index[flaw == Flaw.NONE], offset[flaw == Flaw.NONE]
        if high - low == 1:  # a part of one table
            raw = np.zeros(count * width, dtype=">u8")
            offset = offset + first % per_table * width * 8
            if len(offset):
                source.read_into(int(offset[0]), raw.view(np.uint8).data)
            words = raw.astype(np.uint64).reshape(1, -1)
        else:  # windows and tables both hold powers of two: these are whole tables
            words = np.zeros((high - low, per_table * width), dtype=np.uint64)
            for part, rows in read_tables(source, offset, geometry.cluster_size):
                words[index[part]] = rows.view(">u8")
        each = np.repeat(flaws, words.shape[1] // width)
        self._mark(each.reshape(len(words), -1), index, offset)
        if self._is_gone:
            each[:] = Flaw.TABLE_GONE
        return words.reshape(-1), each

    def _mark(self, flaws: U8, rows: I64, offset: I64) -> None:
        """Mark the entries in *rows*, which stand at *offset* in the file, that are not there or
        were overwritten.
        """
        if self._marked:
            self._mark_gone(flaws, rows, offset)
        if self._salvaged is not None:
            self._mark_lost(self._salvaged, flaws, rows, offset)

    def _mark_lost(self, source: Salvaged, flaws: U8, rows: I64, offset: I64) -> None:
        """Mark the entries in *rows*, which stand at *offset* in the file, that are not there."""
        width = self.geometry.l2_entry_size // 8
        for row, start in zip(rows.tolist(), offset.tolist(), strict=True):
            lost = source.lost_words(start, flaws.shape[1] * width)
            flaws[row, lost.reshape(-1, width).any(axis=1)] = Flaw.TABLE_LOST
