"""All directories of a FAT or an exFAT, a level of the tree at a time.

Where a directory was lost, those below it are found again: in FAT each begins with an entry for
itself, and no chain leads to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planner.arrays import I64, U8, distinct, expand_ranges
from planner.guestfs.columns import Once, little
from planner.guestfs.fat.chains import ChainRuns, Chains
from planner.guestfs.fat.entries import (
    BITMAP,
    DIRECTORY,
    ENTRY,
    LABEL,
    UPCASE,
    Entries,
    exfat_entries,
    fat_entries,
)
from planner.guestfs.fat.volume import FIRST, Volume
from planner.guestfs.reading import Holes, read_blocks
from planner.source import SECTOR, read_tables

ROOT = 0

MAX_DEPTH = 512
"""Levels of directories: a path that anybody can open has fewer."""

BYTES_AT_A_TIME = 2 << 20
MAX_DIRECTORY = 32 << 20
"""Of a directory so many bytes are looked at: more than FAT allows, a million entries of exFAT."""

DIRECTORIES_AT_A_TIME = 1024


@dataclass(frozen=True, slots=True)
class Folders:
    """Directories to look at: number, first cluster, bytes if they are not chained, else 0."""

    inode: I64
    first: I64
    size: I64

    def select(self, which: I64 | slice) -> Folders:
        """Some of them."""
        return Folders(self.inode[which], self.first[which], self.size[which])


@dataclass(frozen=True, slots=True)
class Found:
    """Some directories that were looked at: their runs (``inode``, of each), and their entries with
    number and parent of each. ``own``: entries of exFAT for what is its own, as they are.
    """

    runs: ChainRuns
    inode: I64
    entries: Entries
    number: I64
    parent: I64
    own: U8


class Walk:
    """One walk. ``too_deep``: directories that were not looked at. ``lost``: those found again."""

    def __init__(self, source: Holes, volume: Volume, chains: Chains) -> None:
        self._source, self._volume, self._chains = source, volume, chains
        self._once = Once()
        self.too_deep = self.lost = 0

    def __iter__(self) -> Iterator[Found]:
        firsts = []
        for found in self._levels(self._root()):
            firsts.append(found.entries.first)
            yield found
        if not self._volume.is_exfat:
            known = np.concatenate([*firsts, np.array([self._volume.root])])
            for found in self._levels(self._lost(distinct(known))):
                yield found

    def _root(self) -> Folders:
        return Folders(*(np.array([each]) for each in (ROOT, self._volume.root, 0)))

    def _levels(self, level: Folders) -> Iterator[Found]:
        for _ in range(MAX_DEPTH):
            below = []
            for at in range(0, len(level.first), DIRECTORIES_AT_A_TIME):
                some = level.select(slice(at, at + DIRECTORIES_AT_A_TIME))
                some = some.select(self._once.first(some.first))
                for found in self._look_at(some):
                    entries = found.entries
                    of = np.flatnonzero(entries.is_directory)
                    size = np.where(entries.is_chained, 0, entries.size)[of]
                    below.append(Folders(found.number[of], entries.first[of], size))
                    yield found
            if not below:
                return
            columns = ([getattr(each, name) for each in below] for name in Folders.__slots__)
            level = Folders(*(np.concatenate(column) for column in columns))
        self.too_deep += len(level.first)

    # ---- a directory ----

    def _look_at(self, folders: Folders) -> Iterator[Found]:
        if not self._volume.root and len(folders.first) and not folders.first[0]:
            yield self._fixed_root()
            folders = folders.select(slice(1, None))
        runs = self._runs(folders)
        size, limit = self._volume.cluster_size, max(1, MAX_DIRECTORY // self._volume.cluster_size)
        count = np.clip(np.minimum(runs.count, limit - runs.logical), 0, None)
        # As many directories at a time as there is room for, one at least.
        total = np.bincount(runs.row, weights=count, minlength=len(folders.first))
        group = (np.cumsum(total) * size // BYTES_AT_A_TIME).astype(np.int64)
        for each in distinct(group).tolist():
            some = group[runs.row] == each
            cluster = np.repeat(runs.cluster[some], count[some])
            cluster += expand_ranges(np.zeros_like(count[some]), count[some] - 1)
            row = np.repeat(runs.row[some], count[some])
            offset = self._offset(cluster)
            order = np.argsort(offset, kind="stable")
            raw = np.empty((len(offset), size), dtype=np.uint8)
            raw[order] = read_blocks(self._source, offset[order], size)
            part = ChainRuns(
                runs.row[some], runs.logical[some], runs.cluster[some], runs.count[some]
            )
            yield self._decoded(raw, offset, row, folders.inode, part)

    def _offset(self, cluster: I64) -> I64:
        result: I64 = self._volume.heap + (cluster - FIRST) * self._volume.cluster_size
        return result

    def _runs(self, folders: Folders) -> ChainRuns:
        """Where these directories are, in the order of their bytes."""
        is_chained = np.flatnonzero(folders.size == 0)
        parts = [
            ChainRuns(is_chained[each.row], each.logical, each.cluster, each.count)
            for each in self._chains.walk(folders.first[is_chained])
        ]
        parts.append(contiguous(self._volume, folders.first, folders.size))
        columns = ([getattr(each, name) for each in parts] for name in ChainRuns.__slots__)
        row, logical, cluster, count = (np.concatenate(column) for column in columns)
        order = np.lexsort((logical, row))
        return ChainRuns(row[order], logical[order], cluster[order], count[order])

    def _fixed_root(self) -> Found:
        start, length = self._volume.root_region
        offset = np.arange(start, start + length, SECTOR, dtype=np.int64)
        raw = read_blocks(self._source, offset, SECTOR)
        none = np.zeros(0, dtype=np.int64)
        row = np.zeros(len(offset), dtype=np.int64)
        runs = ChainRuns(none, none, none, none)
        return self._decoded(raw, offset, row, np.array([ROOT]), runs)

    def _decoded(self, raw: U8, offset: I64, row: I64, inode: I64, runs: ChainRuns) -> Found:
        """The entries in pieces *raw* at *offset*, of the directories *row*."""
        size = raw.shape[1]
        per_piece = size // ENTRY
        is_hole = np.repeat(self._source.are_holes(offset, size), per_piece)
        entries = raw.reshape(-1, ENTRY)
        whose = np.repeat(row, per_piece)
        place = (offset[:, None] + np.arange(0, size, ENTRY)).reshape(-1)
        # A zero is the end of a directory, unless it only reads so.
        end = np.flatnonzero((entries[:, 0] == 0) & ~is_hole)
        first = np.flatnonzero(np.append(True, whose[1:] != whose[:-1]))[: len(whose)]
        at = np.searchsorted(end, first)
        stop = np.append(end, len(entries))[at]
        directory = np.cumsum(np.append(False, whose[1:] != whose[:-1]))[: len(whose)]
        kept = np.arange(len(entries)) < stop[directory] if len(entries) else np.zeros(0, np.bool_)
        entries, whose, place = np.ascontiguousarray(entries[kept]), whose[kept], place[kept]
        own = entries[:0]
        if self._volume.is_exfat:
            found = exfat_entries(entries, whose)
            is_own = np.isin(entries[:, 0], (BITMAP, UPCASE, LABEL)) & (inode[whose] == ROOT)
            own = entries[is_own]
        else:
            found = fat_entries(entries, whose, is_32=self._volume.bits == 32)
        return Found(runs, inode[runs.row], found, place[found.row], inode[whose[found.row]], own)

    # ---- directories that were lost ----

    def _lost(self, known: I64) -> Folders:
        """Directories that no entry leads to, but for those that are below another such."""
        heads = self._chains.heads()
        at = np.minimum(np.searchsorted(known, heads), len(known) - 1)
        heads = heads[known[at] != heads]
        is_one = np.zeros(len(heads), dtype=np.bool_)
        above = np.zeros(len(heads), dtype=np.int64)
        names = np.frombuffer(b".          ..         ", dtype=np.uint8).reshape(2, 11)
        for part, rows in read_tables(self._source, self._offset(heads), 2 * ENTRY):
            pair = rows.reshape(-1, 2, ENTRY)
            looks = (pair[:, :, :11] == names).all(axis=(1, 2))
            is_one[part] = looks & ((pair[:, :, 11] & DIRECTORY) != 0).all(axis=1)
            flat, base = rows.reshape(-1), np.arange(len(rows), dtype=np.int64) * 2 * ENTRY + ENTRY
            above[part] = little(flat, base + 26, 2) | little(flat, base + 20, 2) << 16
        heads, above = heads[is_one], above[is_one]
        heads = heads[~np.isin(above, heads)]
        self.lost += len(heads)
        return Folders(self._offset(heads), heads, np.zeros(len(heads), dtype=np.int64))


def contiguous(volume: Volume, first: I64, size: I64) -> ChainRuns:
    """The runs of what is not chained: *size* bytes from cluster *first* on; of size 0 none."""
    row = np.flatnonzero((size > 0) & (first >= FIRST) & (first < volume.clusters + FIRST))
    count = np.minimum(-(-size[row] // volume.cluster_size), volume.clusters + FIRST - first[row])
    return ChainRuns(row, np.zeros(len(row), dtype=np.int64), first[row], count)
