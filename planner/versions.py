"""Counts L2 tables that stand at the same L1 index of several snapshots: versions of one table.

They mostly agree. One of them is counted for all, and of the others only the entries in which they
differ: so a snapshot costs reading its tables and comparing them, not counting them again. Where
they have little in common, or are not plain, `planner.census` counts them one by one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from planner.arrays import I64, U8, U64, Mask, distinct
from planner.counts import ClusterCounts, ClusterIndex
from planner.qcow2 import entries
from planner.qcow2.entries import ClusterType
from planner.qcow2.geometry import Geometry
from planner.source import Source, read_parts
from planner.tables import Batch, L2Tables

MIN_ENTRIES = 1 << 11
"""Of tables smaller than this, comparing costs more than counting."""

PART_BYTES = 4 << 20
"""Of tables that are looked at together: enough for the calls between small arrays to be few."""

MAX_BYTES = 16 << 20
"""Of all versions of one table, which are held at a time."""

SHARED = 8
"""Versions that differ in more than one of so many entries are counted one by one."""

_SAME = np.array([(1 << 64) - 1 - entries.COPIED], dtype=">u8").view(np.uint64)
"""The COPIED flag does not make an entry another one. In the byte order of the disk."""


class Counter(Protocol):
    """What counts entries: `planner.census.Walker`."""

    def are_plain(self, words: U64) -> Mask:
        """Which tables (rows) have only entries that `count_plain` can count."""

    def count_plain(self, batch: Batch, words: U64) -> None:
        """Count whole tables."""

    def count_entries(self, batch: Batch, positions: I64, words: U64) -> None:
        """Count single entries of any type, at flat *positions* in the tables of *batch*."""


@dataclass(frozen=True, slots=True)
class Differences:
    """Entries that are not as in the first version: ``row`` and ``column`` in a part of tables.

    ``fresh``: which are as in none of the versions before.
    """

    row: I64
    column: I64
    fresh: Mask


class VersionCounter:
    """Counts into *references* and *mapped*; see `planner.census.Census`."""

    def __init__(
        self,
        geometry: Geometry,
        tables: L2Tables,
        counter: Counter,
        *,
        index: ClusterIndex,
        references: ClusterCounts,
        mapped: ClusterCounts,
    ) -> None:
        self._geometry, self._tables, self._counter = geometry, tables, counter
        self._index, self._references, self._mapped = index, references, mapped

    def count(self, source: Source, which: I64, tick: Callable[[int], None]) -> I64:
        """Count the tables at positions *which* of `L2Tables`; returns those that it did not."""
        if not len(which) or self._geometry.extended_l2 or self._geometry.l2_entries < MIN_ENTRIES:
            return which
        tables, size = self._tables, self._geometry.cluster_size
        # The active one comes first: it is counted for all, as only of it QEMU looks at COPIED.
        order = (tables.offset[which], tables.active[which] == 0, tables.l1_index[which])
        which = which[np.lexsort(order)]
        parts, left = cut(tables.l1_index[which], PART_BYTES // size, MAX_BYTES // size)
        uncounted = [which[part] for part in left]
        for part, rows in read_parts(source, tables.offset[which], size, parts):
            uncounted.append(self._count_part(which[part], rows))
            tick(rows.size)
        return np.concatenate([*uncounted, np.zeros(0, dtype=np.int64)])

    def _count_part(self, which: I64, rows: U8) -> I64:
        """Count whole groups of versions; returns those that are to be counted one by one."""
        tables = self._tables
        first = _starts(tables.l1_index[which])
        groups = np.repeat(np.arange(len(first)), np.diff(first, append=len(which)))
        words = rows[first].view(">u8").astype(np.uint64)
        sound = self._counter.are_plain(words)
        found = _differences(rows.view(np.uint64), first, sound)
        weight = np.bincount(groups, weights=tables.weight[which]).astype(np.int64)
        self._count_bases(which[first], words, weight, sound)
        self._correct(which, words, groups, found)
        self._count_differences(which, rows, found)
        return which[~sound[groups]]

    def _count_bases(self, which: I64, words: U64, weight: I64, sound: Mask) -> None:
        """Count the *sound* ones of the tables *which*, each with the weight of its group."""
        tables = self._tables
        columns = (weight, tables.active[which], tables.copied[which])
        kinds, kind = np.unique(np.stack(columns), axis=1, return_inverse=True)
        for number, (each, active, copied) in enumerate(kinds.T.tolist()):
            chosen = sound & (kind.reshape(-1) == number)
            if chosen.any():
                batch = Batch(which[chosen], each, active, copied, sibling=False)
                self._counter.count_plain(batch, words[chosen])

    def _correct(self, which: I64, words: U64, groups: I64, found: Differences) -> None:
        """Take back what was counted for versions that differ there."""
        base = words[groups[found.row], found.column]
        clusters = entries.l2_offsets(base) >> self._geometry.cluster_bits
        held = clusters != 0
        slots = self._index.slots_of(clusters[held])
        self._references.subtract(slots, self._tables.weight[which[found.row[held]]])

    def _count_differences(self, which: I64, rows: U8, found: Differences) -> None:
        """Count entries that are not as in the version that was counted for all."""
        width = self._geometry.l2_entries
        words = rows.view(">u8")[found.row, found.column].astype(np.uint64)
        positions = found.row * width + found.column
        weight = self._tables.weight[which[found.row]]
        for each in distinct(weight).tolist():
            chosen = (weight == each) & (words != 0)
            batch = Batch(which, each, active=0, copied=0, sibling=True)
            self._counter.count_entries(batch, positions[chosen], words[chosen])
        words = words[found.fresh]
        types = entries.cluster_types(words, self._geometry)
        data = (types == ClusterType.NORMAL) | (types == ClusterType.ZERO_ALLOC)
        clusters = entries.l2_offsets(words[data]) >> self._geometry.cluster_bits
        slots, known = self._index.find(clusters)
        self._mapped.add(slots[known], 1)


def _starts(values: I64) -> I64:
    """Where runs of equal values begin."""
    return np.concatenate((np.zeros(1, dtype=np.int64), np.flatnonzero(np.diff(values)) + 1))


def cut(l1_index: I64, target: int, limit: int) -> tuple[list[slice], list[slice]]:
    """Cut at group borders into parts of about *target* tables; and the groups over *limit*."""
    starts = _starts(l1_index)
    ends = np.append(starts[1:], len(l1_index))
    parts: list[slice] = []
    left: list[slice] = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        if end - start > limit:
            left.append(slice(start, end))
        elif parts and parts[-1].stop == start and end - parts[-1].start <= target:
            parts[-1] = slice(parts[-1].start, end)
        else:
            parts.append(slice(start, end))
    return parts, left


def _differences(words: U64, first: I64, sound: Mask) -> Differences:
    """Compare the versions in each group of rows; groups begin at *first*.

    Groups with little in common are taken out of *sound*, and those that are not in it are left
    out.
    """
    size = np.diff(first, append=len(words))
    none = np.zeros(0, dtype=np.int64)
    found = [Differences(none, none, none != 0)]
    # Neighbours with as many versions each are compared together.
    borders = [*(np.flatnonzero(np.diff(size)) + 1).tolist(), len(first)]
    for low, high in itertools.pairwise([0, *borders]):
        start, count = int(first[low]), int(size[low])
        block = words[start : start + (high - low) * count].reshape(high - low, count, -1)
        found.append(_differences_in(block, start, sound[low:high]))
    columns = ([getattr(each, name) for each in found] for name in Differences.__slots__)
    return Differences(*(np.concatenate(parts) for parts in columns))


def _differences_in(block: U64, start: int, sound: Mask) -> Differences:
    """`_differences` in groups of equally many versions, from row *start* on.

    *block* has the shape (groups, versions, entries).
    """
    _, count, width = block.shape
    differs = _differing_columns(block)
    if (differs.sum(axis=1) > width // SHARED).any():  # perhaps in the COPIED flag alone
        block = block & _SAME
        differs = _differing_columns(block)
        sound &= differs.sum(axis=1) <= width // SHARED
    group, column = np.nonzero(differs & sound[:, None])
    versions = block[group, :, column] & _SAME
    changed = versions[:, 1:] != versions[:, :1]
    fresh = changed.copy()
    for lag in range(1, count - 1):
        fresh[:, lag:] &= versions[:, 1 + lag :] != versions[:, 1:-lag]
    at, version = np.nonzero(changed)
    return Differences(start + group[at] * count + 1 + version, column[at], fresh[at, version])


def _differing_columns(block: U64) -> Mask:
    """In which entries not all versions are as the first: bool (groups, entries)."""
    differs: Mask = np.logical_or.reduce(block[:, 1:] != block[:, :1], axis=1)
    return differs
