"""Walks all L2 tables and counts the references of every host cluster.

Which tables are read, in what order, and which way of counting is the fastest that holds for them
is here; how entries count is in `planner.check.plain_counter`, `planner.check.versions` and
`planner.check.entry_counter`. The clusters of all other structures are counted as regions, and
comparing with the stored refcounts is the business of `planner.check.check`. Source:
docs/interop/qcow2.txt; check_refcounts_l2.

The counts do not depend on the order of counting (a full counter stays full, and each reference too
many is one finding), so tables may be read in the order in which they lie in the file.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from planner.arrays import I64, U64
from planner.check.census import Census
from planner.check.entry_counter import EntryCounter
from planner.check.plain_counter import PlainCounter, has_plain_bitmaps
from planner.check.versions import VersionCounter
from planner.metadata.mapping_tables import Batch, TableParts, clusters_of_entries
from planner.metadata.refcounts import StoredRefcounts
from planner.metadata.work_limits import LIMITS, Limits
from planner.progress import Meter
from planner.qcow2 import entries
from planner.source import Source, read_tables

MAX_SIBLING_LAG = 64
"""With how many tables before it in a batch an L2 table is compared, to find what they share."""


def count_references(
    source: Source,
    census: Census,
    stored: StoredRefcounts,
    which: I64,
    meter: Meter,
    *,
    limits: Limits = LIMITS,
) -> None:
    """Count into *census* what its tables at positions *which* refer to.

    *stored*: what COPIED flags are compared with. *meter* is told of the bytes read.
    """
    _Walk(source, census, stored, meter, limits=limits).count(which)


class _Walk:
    """One walk. All ways of counting count alike."""

    def __init__(
        self,
        source: Source,
        census: Census,
        stored: StoredRefcounts,
        meter: Meter,
        *,
        limits: Limits,
    ) -> None:
        self._source, self._census, self._meter, self._limits = source, census, meter, limits
        self._geometry, self._tables = census.layout.geometry, census.tables
        self._plain, self._single = PlainCounter(census, stored), EntryCounter(census, stored)

    def count(self, which: I64) -> None:
        """Tables at one L1 index are versions of each other: the first of them stands for all."""
        if self._geometry.external_data:
            self._count_tables(which)
            return
        is_sibling = self._tables.sibling[which]
        alone, siblings = which[~is_sibling], which[is_sibling]
        size = self._geometry.cluster_size
        # Of those that are holes for the most part all are counted by what is there of them.
        if TableParts.of(self._source, self._tables.offset[siblings], size).size == size:
            versions = VersionCounter(self._census, self._plain, self._single, self._limits)
            siblings = np.sort(versions.count(self._source, siblings, self._meter))
        self._count_tables(np.sort(np.concatenate((alone, siblings))))
        self._map_siblings(siblings)

    def _count_tables(self, which: I64) -> None:
        """Count tables one by one; of those that are holes for the most part what is there."""
        for group in self._tables.classes(which):
            offsets = self._tables.offset[group.ids]
            parts = TableParts.of(self._source, offsets, self._geometry.cluster_size)
            if parts.size < self._geometry.cluster_size:
                self._count_parts(group, parts)
                continue
            for part, rows in read_tables(self._source, offsets, self._geometry.cluster_size):
                batch = replace(group, ids=group.ids[part])
                self._count_batch(batch, entries.decode_words(rows))
                self._meter.advance(rows.size)

    def _count_parts(self, batch: Batch, parts: TableParts) -> None:
        """Count the entries of *parts* of the tables of *batch*, where few are more than zeros."""
        size, told = self._geometry.cluster_size, 0
        for part, rows in parts.read(self._source):
            words, bitmaps = entries.split_entries(
                entries.decode_words(rows), self._geometry.extended_l2
            )
            to_positions = partial(parts.positions, part, geometry=self._geometry)
            self._single.count_tables(batch, words, bitmaps, to_positions)
            done = int(parts.table[part][-1]) + 1
            self._meter.advance((done - told) * size)
            told = done
        self._meter.advance((len(parts.offsets) - told) * size)

    def _count_batch(self, batch: Batch, words: U64) -> None:
        """Count by the fastest way that holds for these tables."""
        words, bitmaps = entries.split_entries(words, self._geometry.extended_l2)
        if not self._geometry.external_data and has_plain_bitmaps(words, bitmaps):
            runs = self._plain.find_runs(words)
            if runs is not None:
                self._plain.count_runs(batch, runs)
                return
            clusters = self._plain.find_clusters(words)
            if clusters is not None:
                self._plain.count_clusters(batch, words, clusters)
                return
        self._single.count_tables(batch, words, bitmaps)

    def _map_siblings(self, which: I64) -> None:
        """Count into ``mapped`` what tables at the same L1 index map, once for what they share."""
        census, tables = self._census, self._tables
        size = self._geometry.cluster_size
        parts = TableParts.of(self._source, tables.offset[which], size)
        offset = parts.offsets[parts.table] + parts.inside
        # The same parts of tables at one index, one after the other.
        place = (tables.l1_index[which[parts.table]] * size + parts.inside) // parts.size
        order = np.lexsort((offset, place))
        for part, rows in read_tables(self._source, offset[order], parts.size):
            words = entries.decode_words(rows)
            words, _ = entries.split_entries(words, self._geometry.extended_l2)
            _drop_shared(words, place[order[part]])
            clusters, _ = clusters_of_entries(words[words != 0], census.layout)
            census.mapped.add(census.index.slots_of(clusters), 1)
            self._meter.advance(rows.size)


def _drop_shared(words: U64, place: I64) -> None:
    """Set to 0 what a table, or a part of one, shares, entry by entry, with one before it at the
    same place of the disk."""
    copied = np.uint64(entries.COPIED)
    for lag in range(1, min(len(place), MAX_SIBLING_LAG + 1)):
        same = np.flatnonzero(place[lag:] == place[:-lag])
        if not len(same):
            return
        later = words[same + lag]
        later[(later | copied) == (words[same] | copied)] = 0
        words[same + lag] = later
