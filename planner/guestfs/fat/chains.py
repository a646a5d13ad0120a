"""Chains of clusters: the FAT as runs of clusters that follow each other, and where they lead.

All chains are followed at once, a run of each in a step. The last few, of files in very many
pieces, are followed one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planner.arrays import I64, U8, U32, Mask
from planner.guestfs.fat.volume import FIRST, Volume
from planner.guestfs.reading import Holes
from planner.source import SECTOR, read_bytes

PIECE = 1 << 20
"""Entries of the FAT that are looked at together."""

STEPS_TOGETHER = 128
MASK32 = (1 << 28) - 1


@dataclass(frozen=True, slots=True)
class ChainRuns:
    """Runs of chains: ``row``, of which; ``logical``, its first cluster's place in the chain;
    ``cluster``, its number on the disk; ``count``.
    """

    row: I64
    logical: I64
    cluster: I64
    count: I64


class Chains:
    """The FAT of a volume. ``from_copy``: sectors of it were lost, or empty, and a copy's used.
    ``broken``: chains that lead to what is free, is none, or was handed out already too often.
    """

    def __init__(self, source: Holes, volume: Volume) -> None:
        self._source, self._volume = source, volume
        self.from_copy = False
        self.broken = 0
        self.next = self._read()
        self._tail, self._entry, self._after = self._runs()
        # No run is handed out more than once but where files share clusters.
        self._left = 2 * len(self._tail) + 2

    # ---- the table ----

    def _read(self) -> U32:
        """Where each cluster leads, by its number; 0: it is free, or nobody knows."""
        volume = self._volume
        entries = volume.clusters + FIRST
        if volume.bits < 32:
            raw = self._bytes(0, -(-entries * volume.bits // 8) + 2)
            return _narrow(raw, entries, volume.bits)
        result = np.zeros(entries, dtype=np.uint32)
        for at in range(0, entries, PIECE):
            stop = min(at + PIECE, entries)
            if not any(
                True
                for table in volume.tables
                for _ in self._source.data_extents(table + at * 4, (stop - at) * 4)
            ):
                continue
            raw = self._bytes(at * 4, (stop - at) * 4)
            result[at:stop] = raw.view("<u4")
        if not volume.is_exfat:
            result &= np.uint32(MASK32)
        return result

    def _bytes(self, offset: int, length: int) -> U8:
        """A part of the FAT that begins with a sector, of each sector what the copies know."""
        volume = self._volume
        whole = -(-length // SECTOR) * SECTOR
        result = np.zeros(whole, dtype=np.uint8)
        sectors = result.reshape(-1, SECTOR)
        lacking = np.ones(len(sectors), dtype=np.bool_)
        for copy, table in enumerate(volume.tables):
            size = max(0, min(whole, volume.table_size - offset))
            raw = np.zeros(whole, dtype=np.uint8)
            raw[:size] = np.frombuffer(read_bytes(self._source, table + offset, size), np.uint8)
            found = lacking & raw.reshape(-1, SECTOR).any(axis=1)
            sectors[found] = raw.reshape(-1, SECTOR)[found]
            lacking &= ~found
            self.from_copy |= copy > 0 and bool(found.any())
            if not lacking.any():
                break
        return result[:length]

    @property
    def end(self) -> int:
        """Numbers from this one on end a chain; below, from 8 less on, they are no clusters."""
        if self._volume.is_exfat:
            return 0xFFFFFFF8
        return {12: 0xFF8, 16: 0xFFF8, 32: 0xFFFFFF8}[self._volume.bits]

    def bad(self) -> I64:
        """The clusters that are marked as bad."""
        return np.flatnonzero(self.next[FIRST:] == self.end - 1) + FIRST

    def free(self) -> Iterator[tuple[I64, I64]]:
        """Free clusters, as the first and the number of them; not where the FAT is lost."""
        for at in range(FIRST, len(self.next), PIECE):
            piece = self.next[at : at + PIECE] == 0
            piece &= ~self._lost(np.arange(at, at + len(piece)))
            step = np.diff(np.concatenate(([0], piece, [0])).astype(np.int8))
            first, last = np.flatnonzero(step == 1), np.flatnonzero(step == -1)
            yield first + at, last - first

    def _lost(self, cluster: I64) -> Mask:
        """Of which clusters no copy of the FAT says anything."""
        offset = cluster * self._volume.bits // 8
        lost = np.ones(len(cluster), dtype=np.bool_)
        first, last = int(offset[0]) // SECTOR, int(offset[-1] + 2) // SECTOR
        sectors = np.arange(first, last + 1) * SECTOR
        gone = np.ones(len(sectors), dtype=np.bool_)
        for table in self._volume.tables:
            gone &= self._source.are_holes(table + sectors, SECTOR)
        lost &= gone[offset // SECTOR - first]
        return lost

    # ---- chains ----

    def _runs(self) -> tuple[I64, I64, I64]:
        """The last cluster of each run, where it leads (0: nowhere), and in which run that is."""
        parts = []
        for at in range(0, len(self.next), PIECE):
            piece = self.next[at : at + PIECE].astype(np.int64)
            number = np.arange(at, at + len(piece), dtype=np.int64)
            before = np.append(self.next[at - 1] if at else 0, piece[:-1])
            is_tail = (piece != number + 1) & ((piece != 0) | (before != 0))
            parts.append(number[is_tail])
        tail = np.append(np.concatenate(parts), len(self.next) - 1)
        entry = self.next[tail].astype(np.int64)
        entry[(entry < FIRST) | (entry >= len(self.next))] = 0
        return tail, entry, np.searchsorted(tail, entry)

    def walk(self, first: I64) -> Iterator[ChainRuns]:
        """The runs of the chains that begin with clusters *first*, in order for each of them."""
        row = np.flatnonzero((first >= FIRST) & (first < len(self.next)))
        cluster = first[row]
        run = np.searchsorted(self._tail, cluster)
        logical = np.zeros(len(row), dtype=np.int64)
        for _ in range(STEPS_TOGETHER):
            if not len(row):
                return
            self._left -= len(row)
            if self._left < 0:
                self.broken += len(row)
                return
            # What is marked as free is of the chain as well, and ends it.
            is_free = self.next[cluster] == 0
            count = np.where(is_free, 1, self._tail[run] - cluster + 1)
            yield ChainRuns(row, logical, cluster, count)
            goes_on = ~is_free & (self._entry[run] > 0) & (logical + count < len(self.next))
            last = self.next[self._tail[run]]
            self.broken += int((is_free | (~goes_on & (last < self.end))).sum())
            row, run, count = row[goes_on], run[goes_on], count[goes_on]
            logical = logical[goes_on] + count
            cluster, run = self._entry[run], self._after[run]
        for each in range(len(row)):
            yield from self._walk_one(int(row[each]), int(logical[each]), int(cluster[each]))

    def _walk_one(self, row: int, logical: int, cluster: int) -> Iterator[ChainRuns]:
        run, found = int(np.searchsorted(self._tail, cluster)), []
        tail, entry, after = self._tail, self._entry, self._after
        while cluster and logical < len(self.next) and self._left > 0:
            self._left -= 1
            count = 1 if not self.next[cluster] else int(tail[run]) - cluster + 1
            found.append((row, logical, cluster, count))
            logical += count
            cluster, run = (int(entry[run]), int(after[run])) if self.next[cluster] else (0, 0)
        self.broken += bool(cluster)
        if found:
            yield ChainRuns(*np.array(found, dtype=np.int64).T)

    def heads(self) -> I64:
        """Clusters in use that no other leads to."""
        is_head = self.next != 0
        is_head[:FIRST] = False
        step = self.next == np.arange(1, len(self.next) + 1, dtype=np.uint32)
        is_head[1:] &= ~step[:-1]
        is_head[self._entry] = False
        return np.flatnonzero(is_head)


def _narrow(raw: U8, entries: int, bits: int) -> U32:
    """The entries of a FAT12 or FAT16."""
    if bits == 16:
        return raw[: 2 * entries].view("<u2").astype(np.uint32)
    at = np.arange(entries) * 3 // 2
    value = raw[at].astype(np.uint32) | raw[at + 1].astype(np.uint32) << np.uint32(8)
    odd = np.arange(entries) % 2 == 1
    result: U32 = np.where(odd, value >> np.uint32(4), value & np.uint32(0xFFF)).astype(np.uint32)
    return result
