"""What L2 tables lead to, of many at once: held and read as far as it is there.

Tables in holes take nothing, and of one that is a hole for the most no more than the pages of it
that hold anything: however large clusters are, and however often one table is led to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planner.arrays import I32, I64, Mask, distinct, expand_ranges
from planner.qcow2 import entries
from planner.qcow2.entries import ClusterType
from planner.qcow2.geometry import Geometry
from planner.source import Source, present_pieces, read_tables

NOWHERE, ZEROS, PACKED = 0, -1, -2
"""Instead of a cluster: nothing is allocated, zeros, compressed data."""

PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Filled:
    """Entries that lead to a cluster, a row each, by table and entry: ``table``, a position among
    those asked about; ``entry``, its number in it; ``cluster``, where it leads.
    """

    table: I64
    entry: I64
    cluster: I64


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Tables of ``entries`` entries each, in pages.

    ``row``: which of the different tables each of them is, int64 (tables,). ``key``: of each page
    that holds anything the table, times the pages of one, and its number in it, ascending.
    ``clusters``: of each entry of these pages the cluster of the file, or `NOWHERE`, `ZEROS`,
    `PACKED`, int32 (pages, entries of a page); ``own``: which have the COPIED flag.
    """

    entries: int
    row: I64
    key: I64
    clusters: I32
    own: Mask

    def __len__(self) -> int:
        return len(self.row)

    @property
    def _pages(self) -> int:
        """Of a table."""
        return self.entries // int(self.clusters.shape[1])

    def cut(self, table: int, first: int, end: int) -> I64:
        """Where the entries *first* to *end* of one table lead, as ``clusters`` says, int64."""
        size, begin = self.clusters.shape[1], int(self.row[table]) * self._pages
        low, high = first // size, -(-end // size)
        result = np.zeros((max(0, high - low), size), dtype=np.int64)
        here = slice(*np.searchsorted(self.key, (begin + low, begin + high)))
        result[self.key[here] - begin - low] = self.clusters[here]
        return result.reshape(-1)[first - low * size : end - low * size]

    def allocated(self, tables: I64, first: I64, end: I64) -> tuple[I64, I64]:
        """Which entries *first* to *end* of each of *tables* lead to a cluster, or compressed data.

        Returns the position among *tables* and the number of the entry, ascending.
        """
        size, begin = self.clusters.shape[1], self.row[tables] * self._pages
        low = np.searchsorted(self.key, begin + first // size)
        high = np.searchsorted(self.key, begin - (-end // size))
        page, of = expand_ranges(low, high - 1), np.repeat(np.arange(len(tables)), high - low)
        clusters = self.clusters[page]
        at, column = np.nonzero((clusters > 0) | (clusters == PACKED))
        of, entry = of[at], (self.key[page] % self._pages * size)[at] + column
        wanted = (entry >= first[of]) & (entry < end[of])
        return of[wanted], entry[wanted]

    def at(self, table: int, entry: int) -> int:
        """Where one entry of a table leads."""
        page, column = divmod(entry, self.clusters.shape[1])
        key = int(self.row[table]) * self._pages + page
        at = int(self.key.searchsorted(key))
        return int(self.clusters[at, column]) if at < len(self.key) and self.key[at] == key else 0

    def of_each(self, tables: I64, entry: int) -> I64:
        """Where that entry of each of *tables* leads, as ``clusters`` says, int64."""
        size = self.clusters.shape[1]
        if not len(self.key):
            return np.full(len(tables), NOWHERE, dtype=np.int64)
        key = self.row[tables] * self._pages + entry // size
        at = np.minimum(np.searchsorted(self.key, key), len(self.key) - 1)
        result: I64 = self.clusters[at, entry % size].astype(np.int64)
        result[self.key[at] != key] = NOWHERE
        return result

    def leads(self, tables: I64, entry: int) -> Mask:
        """Which of *tables* lead to a cluster at that entry."""
        result: Mask = self.of_each(tables, entry) > 0
        return result

    def last(self, tables: I64, *, zeros: bool) -> I64:
        """The last entry of each of *tables* that leads somewhere, -1 where none does. *zeros*:
        whether one that says that there are zeros does."""
        leads = self.clusters != NOWHERE
        if not zeros:
            leads &= self.clusters != ZEROS
        page = np.flatnonzero(leads.any(axis=1))
        width = self.clusters.shape[1]
        column = width - 1 - leads[page, ::-1].argmax(axis=1)
        row, number = np.divmod(self.key[page], self._pages)
        last = np.full(int(self.row.max(initial=-1)) + 1, -1)
        last[row] = number * width + column  # of several pages of a table the last holds
        return last[self.row[tables]]

    def used(self, tables: I64) -> Mask:
        """Which entries say anything, (tables, entries)."""
        used = np.zeros((len(tables), self._pages, self.clusters.shape[1]), dtype=np.bool_)
        for number, begin in enumerate((self.row[tables] * self._pages).tolist()):
            here = slice(*np.searchsorted(self.key, (begin, begin + self._pages)))
            used[number, self.key[here] - begin] = self.clusters[here] != NOWHERE
        return used.reshape(len(tables), self.entries)

    def filled(self, tables: I64, *, own: bool = False) -> Filled:
        """What leads to a cluster in *tables*; of those that are one table only the first.

        *own*: only where that is the disk's own.
        """
        first = np.full(int(self.row.max(initial=-1)) + 1, -1)
        first[self.row[tables[::-1]]] = np.arange(len(tables))[::-1]
        of = first[self.key // self._pages]
        page = np.flatnonzero(of >= 0)
        page = page[np.lexsort((self.key[page], of[page]))]
        wanted = self.clusters[page] > 0
        if own:
            wanted &= self.own[page]
        at, column = np.nonzero(wanted)
        at = page[at]
        entry = self.key[at] % self._pages * self.clusters.shape[1] + column
        return Filled(of[at], entry, self.clusters[at, column].astype(np.int64))


def read_grid(source: Source, offsets: I64, geometry: Geometry) -> Grid:
    """The tables at *offsets*, bytes of the file, in any order; each is read once."""
    tables = distinct(offsets)
    size = min(PAGE_BYTES, geometry.cluster_size)
    pieces = _present(source, tables, geometry)
    width = size // geometry.l2_entry_size
    clusters = np.empty((len(pieces), width), dtype=np.int32)
    own = np.empty(clusters.shape, dtype=np.bool_)
    for part, found, flags in _read(source, pieces, geometry):
        clusters[part], own[part] = found, flags
    table = np.searchsorted(tables, pieces, side="right") - 1
    key = table * (geometry.cluster_size // size) + (pieces - tables[table]) // size
    return Grid(geometry.l2_entries, np.searchsorted(tables, offsets), key, clusters, own)


def _present(source: Source, tables: I64, geometry: Geometry) -> I64:
    if not len(tables):
        return tables
    return present_pieces(
        source, tables, geometry.cluster_size, min(PAGE_BYTES, geometry.cluster_size)
    )


def _read(source: Source, pieces: I64, geometry: Geometry) -> Iterator[tuple[slice, I32, Mask]]:
    for part, rows in read_tables(source, pieces, min(PAGE_BYTES, geometry.cluster_size)):
        words, bitmaps = entries.split_entries(entries.decode_words(rows), geometry.extended_l2)
        types = entries.cluster_types(words, geometry)
        host = entries.l2_offsets(words) >> geometry.cluster_bits
        host[host >= min(-(-source.size >> geometry.cluster_bits), 1 << 31)] = 0
        if bitmaps is not None:
            host[(bitmaps & np.uint64(entries.SUBCLUSTERS_ALLOCATED)) == 0] = 0
        found = np.where(types == ClusterType.NORMAL, host, NOWHERE).astype(np.int32)
        found[entries.reads_as_zeros(types)] = ZEROS
        found[types == ClusterType.COMPRESSED] = PACKED
        yield part, found, words >= np.uint64(entries.COPIED)
