"""Where the guest's bytes are: L1 and L2 words in, runs of guest bytes out.

What a word means to a reader is decided here, once for all who ask: the reads of a disk, the map,
the explanation of an offset. Follows qcow2_get_host_offset and qcow2_get_subcluster_type for what
QEMU reads, and for what it refuses to. Nothing here reads the guest's bytes themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np

from planner.arrays import I64, U8, U64, Mask
from planner.qcow2 import entries
from planner.qcow2.entries import ClusterType
from planner.qcow2.geometry import SUBCLUSTERS_PER_CLUSTER, Geometry
from planner.source import Source, nonzero_words, read_tables

NO_HOST = -1
"""The host offset of what has none."""

KEPT_RUNS = 1 << 20
"""Runs that a mapping keeps for the next read, at most: 34 MiB of them."""

_READ_WINDOW = 1 << 9
_READ_WINDOW_EXTENDED = 1 << 6
_WALK_WINDOW = 1 << 16
_WALK_WINDOW_EXTENDED = 1 << 11
"""L2 entries that are decoded at a time: for a read, and for a walk."""


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


FLAW_SENTENCES = {
    Flaw.L2_MISALIGNED: "its L1 entry leads to an offset that is not cluster aligned",
    Flaw.CLUSTER_MISALIGNED: "its L2 entry leads to an offset that is not cluster aligned",
    Flaw.ZERO_IN_V2: "its L2 entry has the zero flag, which version 2 does not know",
    Flaw.COMPRESSED_EXTERNAL: "its L2 entry is compressed, and the data is in an external file",
    Flaw.NOT_IN_PLACE: "its offset in the external data file is not that in the guest",
    Flaw.SUBCLUSTERS: "the subcluster bitmap of its L2 entry contradicts itself",
}

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
        return cls(
            np.array([offset], dtype=np.int64),
            np.array([end - offset], dtype=np.int64),
            np.array([RunKind.UNALLOCATED], dtype=np.uint8),
            np.array([NO_HOST], dtype=np.int64),
            np.zeros(1, dtype=np.int64),
            np.zeros(1, dtype=np.uint8),
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

    def joined(self) -> Runs:
        """Neighbours that continue each other as one run. Each compressed cluster stays alone."""
        if len(self) < 2:
            return self
        host = np.where(self.host == NO_HOST, NO_HOST, self.host + self.length)
        breaks = np.ones(len(self), dtype=np.bool_)
        breaks[1:] = (
            (self.kind[1:] != self.kind[:-1])
            | (self.kind[1:] == RunKind.COMPRESSED)
            | (self.flaw[1:] != self.flaw[:-1])
            | (self.host[1:] != host[:-1])
        )
        first = np.flatnonzero(breaks)
        return replace(self.select(first), length=np.add.reduceat(self.length, first))

    def cut(self, offset: int, end: int) -> Runs:
        """What of them lies in *offset* to *end*."""
        low = int(np.searchsorted(self.guest, offset, side="right")) - 1
        high = int(np.searchsorted(self.guest, end, side="left"))
        part = self.select(slice(max(0, low), high))
        guest = np.maximum(part.guest, offset)
        skipped = guest - part.guest
        moves = (part.host != NO_HOST) & (part.kind != RunKind.COMPRESSED)
        return replace(
            part,
            guest=guest,
            length=np.minimum(part.guest + part.length, end) - guest,
            host=part.host + np.where(moves, skipped, 0),
        )


def runs_of_entries(
    guest: I64, words: U64, bitmaps: U64 | None, geometry: Geometry, l2_misaligned: Mask
) -> Runs:
    """The runs of guest clusters that lie one after the other, a run a cluster or subcluster.

    *guest*: their offsets. *words*, *bitmaps*: their L2 entries (uint64); *bitmaps* only with
    extended L2. *l2_misaligned*: which of them are in an L2 table that cannot be read (their words
    do not matter). All of shape (clusters,).
    """
    types = entries.cluster_types(words, geometry)
    host, stored = entries.l2_offsets(words), np.zeros(len(words), dtype=np.int64)
    placed = (types == ClusterType.NORMAL) | (types == ClusterType.ZERO_ALLOC)
    flaw = np.zeros(len(words), dtype=np.uint8)
    flaw[placed & (host & (geometry.cluster_size - 1) != 0)] = Flaw.CLUSTER_MISALIGNED
    host[~placed] = NO_HOST
    packed = types == ClusterType.COMPRESSED
    if packed.any():
        host[packed], stored[packed] = entries.compressed_ranges(words[packed], geometry)
    if geometry.external_data:
        flaw[placed & (flaw == Flaw.NONE) & (host != guest)] = Flaw.NOT_IN_PLACE
        flaw[packed] = Flaw.COMPRESSED_EXTERNAL
    if geometry.version < 3:
        is_zero = (types == ClusterType.ZERO_PLAIN) | (types == ClusterType.ZERO_ALLOC)
        flaw[is_zero] = Flaw.ZERO_IN_V2
    kind = _KIND_OF_TYPE[types]
    if bitmaps is not None:
        flaw[_contradictory(types, bitmaps)] = Flaw.SUBCLUSTERS
    flaw[l2_misaligned] = Flaw.L2_MISALIGNED
    damaged = flaw != Flaw.NONE
    kind[damaged], host[damaged], stored[damaged] = RunKind.DAMAGED, NO_HOST, 0
    length = np.full(len(words), geometry.cluster_size, dtype=np.int64)
    runs = Runs(guest, length, kind, host, stored, flaw)
    return runs if bitmaps is None else _subclusters(runs, bitmaps, geometry)


def _contradictory(types: U8, bitmaps: U64) -> Mask:
    """Which clusters have QCOW2_SUBCLUSTER_INVALID."""
    both = (bitmaps >> np.uint64(32)) & bitmaps != 0
    allocated = (bitmaps & np.uint64(entries.SUBCLUSTERS_ALLOCATED)) != 0
    nowhere = types == ClusterType.UNALLOCATED
    contradictory: Mask = ((types == ClusterType.NORMAL) & both) | (nowhere & allocated)
    return contradictory


def _subclusters(runs: Runs, bitmaps: U64, geometry: Geometry) -> Runs:
    """Runs of whole clusters with extended L2 entries as runs of subclusters, where they differ."""
    whole = (runs.kind == RunKind.COMPRESSED) | (runs.kind == RunKind.DAMAGED)
    count = np.where(whole, 1, SUBCLUSTERS_PER_CLUSTER)
    of = np.repeat(np.arange(len(runs)), count)
    number = np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count)
    size = geometry.cluster_size // SUBCLUSTERS_PER_CLUSTER
    split = ~whole[of]
    allocated = bitmaps[of] >> number.astype(np.uint64) & np.uint64(1) != 0
    zero = bitmaps[of] >> (number + 32).astype(np.uint64) & np.uint64(1) != 0
    kind = np.where(zero, RunKind.ZERO, np.where(allocated, RunKind.DATA, RunKind.UNALLOCATED))
    host = runs.host[of]
    return Runs(
        guest=runs.guest[of] + np.where(split, number * size, 0),
        length=np.where(split, size, geometry.cluster_size),
        kind=np.where(split, kind, runs.kind[of]).astype(np.uint8),
        host=host + np.where(split & (host != NO_HOST), number * size, 0),
        stored=runs.stored[of],
        flaw=runs.flaw[of],
    )


class Mapping:
    """Where the guest bytes that one L1 table maps are. Usable from several threads.

    Costs what there is of the L1 table; L2 tables are read when they are asked for. What has been
    looked up is kept, up to `KEPT_RUNS`, and not looked at again: an image that changes needs
    another mapping.
    """

    def __init__(self, source: Source, geometry: Geometry, l1_offset: int, l1_size: int) -> None:
        """*l1_size*: entries of the table at *l1_offset*."""
        self.geometry = geometry
        self._source = source
        index, words = nonzero_words(source, l1_offset, l1_size)
        offset = (words & np.uint64(entries.L1_OFFSET)).astype(np.int64)
        leads = offset != 0
        self._l1_index, self._l2_offset = index[leads], offset[leads]
        extended = geometry.extended_l2
        self._read_window = _READ_WINDOW_EXTENDED if extended else _READ_WINDOW
        self._walk_window = _WALK_WINDOW_EXTENDED if extended else _WALK_WINDOW
        runs_a_window = self._read_window * (SUBCLUSTERS_PER_CLUSTER if extended else 1)
        self._windows_kept = max(1, KEPT_RUNS // runs_a_window)
        self._kept: dict[int, Runs] = {}

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
            runs = self._decode(source or self._source, number * count, count).joined()
            if len(self._kept) >= self._windows_kept:
                self._kept.clear()
            self._kept[number] = runs
        return runs

    def walk(self, offset: int, end: int) -> Iterator[Runs]:
        """All runs from guest offset *offset* to *end*, in joined batches, for one who wants all.

        What no L1 entry leads to costs nothing.
        """
        bits, position = self.geometry.cluster_bits, offset
        for number in self._windows_in_use(offset, end).tolist():
            first = number * self._walk_window
            low, high = max(offset, first << bits), min(end, (first + self._walk_window) << bits)
            if position < low:
                yield Runs.unallocated(position, low)
            runs = self._decode(self._source, first, self._walk_window)
            yield runs.joined().cut(low, high)
            position = high
        if position < end:
            yield Runs.unallocated(position, end)

    def _windows_in_use(self, offset: int, end: int) -> I64:
        """Numbers of the windows of a walk that an L1 entry leads to; ascending."""
        coverage, per_table = self.geometry.l2_coverage, self.geometry.l2_entries
        low, high = np.searchsorted(self._l1_index, [offset // coverage, -(-end // coverage)])
        tables = self._l1_index[low:high]
        inside = np.arange(max(1, per_table // self._walk_window))
        first = tables * per_table // self._walk_window
        numbers = np.unique(first[:, None] + inside)
        size = self._walk_window << self.geometry.cluster_bits
        return numbers[(numbers >= offset // size) & (numbers < -(-end // size))]

    def _decode(self, source: Source, first: int, count: int) -> Runs:
        """The runs of *count* guest clusters from cluster *first* on."""
        words, misaligned = self._read_words(source, first, count)
        bitmaps = None
        if self.geometry.extended_l2:
            words, bitmaps = words[0::2], words[1::2]
        guest = np.arange(first, first + count, dtype=np.int64) << self.geometry.cluster_bits
        return runs_of_entries(guest, words, bitmaps, self.geometry, misaligned)

    def _read_words(self, source: Source, first: int, count: int) -> tuple[U64, Mask]:
        """The L2 words of guest clusters, zeros where there is no table; which have a bad table."""
        geometry = self.geometry
        per_table, width = geometry.l2_entries, geometry.l2_entry_size // 8
        low, high = first // per_table, -(-(first + count) // per_table)
        at, to = np.searchsorted(self._l1_index, [low, high])
        index, offset = self._l1_index[at:to] - low, self._l2_offset[at:to]
        bad = offset & (geometry.cluster_size - 1) != 0
        misaligned = np.zeros(high - low, dtype=np.bool_)
        misaligned[index[bad]] = True
        index, offset = index[~bad], offset[~bad]
        if high - low == 1:  # a part of one table
            raw = np.zeros(count * width, dtype=">u8")
            if len(offset):
                start = first % per_table * width
                source.read_into(int(offset[0]) + start * 8, raw.view(np.uint8).data)
            return raw.astype(np.uint64), np.repeat(misaligned, count)
        words = np.zeros((high - low, per_table * width), dtype=np.uint64)
        for part, rows in read_tables(source, offset, geometry.cluster_size):
            words[index[part]] = rows.view(">u8")
        # Windows and tables both hold powers of two: a window of several tables is all of them.
        return words.reshape(-1), np.repeat(misaligned, per_table)
