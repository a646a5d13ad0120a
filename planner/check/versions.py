"""Counts L2 tables that stand at the same L1 index of several snapshots: versions of one table.

They mostly agree. One of them is counted for all, and of the others only the entries in which they
differ: so a snapshot costs reading its tables and comparing them, not counting them again. Where
they have little in common, or are not plain, they are left to be counted one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Self

import numpy as np

from planner.arrays import I64, U64, Mask, distinct
from planner.check.census import Census
from planner.check.entry_counter import EntryCounter
from planner.check.plain_counter import PlainCounter
from planner.metadata.mapping_tables import Batch, L2Tables, clusters_of_entries
from planner.metadata.work_limits import Limits
from planner.progress import Meter
from planner.qcow2 import entries
from planner.source import Source, read_parts

PART_BYTES = 8 << 20
"""Of tables that are looked at together: enough for the calls between small arrays to be few."""

MAX_BYTES = 16 << 20
"""Of all versions of one table, which are held at a time."""

HELD = 1 << 18
"""Entries that differ are counted when so many have come together."""

_SAME = np.array([(1 << 64) - 1 - entries.COPIED], dtype=">u8").view(np.uint64)
"""The COPIED flag does not make an entry another one. In the byte order of the disk."""


@dataclass(frozen=True, slots=True)
class Differences:
    """Entries that are not as in the first version of their table.

    ``table``: position in `L2Tables`. ``column``: in it. ``word``, ``base``: the entry in that
    version, and in the first. ``fresh``: whether it is as in none of the versions before.
    """

    table: I64
    column: I64
    word: U64
    base: U64
    fresh: Mask

    @classmethod
    def join(cls, parts: list[Self]) -> Self:
        names = [field.name for field in fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


class VersionCounter:
    """Counts into a census: what versions share through *plain*, where they differ through
    *single*.
    """

    def __init__(
        self, census: Census, plain: PlainCounter, single: EntryCounter, limits: Limits
    ) -> None:
        self._least, self._share = limits.version_entries, limits.version_share
        self._census, self._plain, self._single = census, plain, single
        self._geometry, self._tables = census.layout.geometry, census.tables
        self._found: list[Differences] = []

    def count(self, source: Source, which: I64, meter: Meter) -> I64:
        """Count the tables at positions *which* of `L2Tables`; returns those that it did not."""
        if not len(which) or self._geometry.extended_l2 or self._geometry.l2_entries < self._least:
            return which
        tables, size = self._tables, self._geometry.cluster_size
        parts, left = cut(tables, which, PART_BYTES // size, MAX_BYTES // size)
        uncounted = [left]
        order = np.concatenate([left[:0], *(part.reshape(-1) for part in parts)])
        ends = np.cumsum([0, *(part.size for part in parts)]).tolist()
        slices = [slice(*pair) for pair in pairwise(ends)]
        read = read_parts(source, tables.offset[order], size, slices)
        for part, (_, rows) in zip(parts, read, strict=True):
            uncounted.append(self._count_part(part, rows.view(np.uint64)))
            meter.advance(rows.size)
        self._count_found()
        return np.concatenate(uncounted)

    def _count_part(self, part: I64, words: U64) -> I64:
        """Count groups of versions; returns those that are to be counted one by one.

        *words*: of the tables in *part*, in the byte order of the disk.
        """
        versions = words.reshape(*part.shape, -1)
        base = versions[0].byteswap()
        sound = self._plain.are_plain(base)
        found = _differences(part, versions, sound, self._share)
        if sound.any():
            first = int(part[0, 0])
            tables, weight = self._tables, int(self._tables.weight[part[:, 0]].sum())
            active, copied = int(tables.active[first]), int(tables.copied[first])
            batch = Batch(part[0, sound], weight, active, copied, sibling=False)
            self._plain.count(batch, base if sound.all() else base[sound])
        self._found.append(found)
        if sum(len(each.table) for each in self._found) > HELD:
            self._count_found()
        return part[:, ~sound].reshape(-1)

    def _count_found(self) -> None:
        """Count the entries that differ, of all parts since the last time."""
        if self._found:
            found = Differences.join(self._found)
            self._found = []
            self._correct(found)
            self._count_differences(found)

    def _correct(self, found: Differences) -> None:
        """Take back what was counted for versions that differ there."""
        clusters = entries.l2_offsets(found.base) >> self._geometry.cluster_bits
        held = clusters != 0
        slots = self._census.index.slots_of(clusters[held])
        self._census.references.subtract(slots, self._tables.weight[found.table[held]])

    def _count_differences(self, found: Differences) -> None:
        """Count entries that are not as in the version that was counted for all."""
        width = self._geometry.l2_entries
        weight = self._tables.weight[found.table]
        for each in distinct(weight).tolist():
            chosen = (weight == each) & (found.word != 0)
            batch = Batch(found.table[chosen], each, active=0, copied=0, sibling=True)
            positions = np.arange(len(batch.ids)) * width + found.column[chosen]
            self._single.count_entries(batch, positions, found.word[chosen])
        clusters, _ = clusters_of_entries(found.word[found.fresh], self._census.layout)
        self._census.mapped.add(self._census.index.slots_of(clusters), 1)


def cut(tables: L2Tables, which: I64, target: int, limit: int) -> tuple[list[I64], I64]:
    """Cut the tables at positions *which* into parts of about *target* tables.

    A part holds whole groups that count alike and have equally many versions, as positions of shape
    (versions, groups): the same version of neighbours mostly lies together in the file. The active
    version comes first: it is counted for all, as only of it QEMU looks at COPIED. Besides, the
    positions of the tables in groups over *limit*.
    """
    l1_index = tables.l1_index
    order = np.lexsort((tables.offset[which], tables.active[which] == 0, l1_index[which]))
    which = which[order]
    first = _starts(l1_index[which])
    base = which[first]
    size = np.diff(first, append=len(which))
    weight = np.add.reduceat(tables.weight[which], first)
    kinds = np.stack((size, weight, tables.active[base], tables.copied[base]))
    order = np.lexsort((tables.offset[base], *kinds))
    order = order[size[order] <= limit]
    parts: list[I64] = []
    for low, high in _equal_columns(kinds[:, order]):
        versions = np.arange(int(size[order[low]]))[:, None]
        step = max(1, target // len(versions))
        for start in range(low, high, step):
            groups = order[start : min(start + step, high)]
            parts.append(which[first[groups] + versions])
    return parts, which[np.repeat(size > limit, size)]


def _equal_columns(values: I64) -> Iterator[tuple[int, int]]:
    """The runs of equal columns in a 2-D array."""
    borders = np.flatnonzero((np.diff(values, axis=1) != 0).any(axis=0)) + 1
    if values.shape[1]:
        yield from pairwise([0, *borders.tolist(), values.shape[1]])


def _starts(values: I64) -> I64:
    """Where runs of equal values begin."""
    return np.concatenate((np.zeros(1, dtype=np.int64), np.flatnonzero(np.diff(values)) + 1))


def _differences(part: I64, versions: U64, sound: Mask, share: int) -> Differences:
    """Compare the versions of tables, uint64 of shape (versions, groups, entries), big-endian.

    *part*: their positions in `L2Tables`. Groups with little in common are taken out of *sound*,
    and those that are not in it are left out.
    """
    width = versions.shape[2]
    at = _differing(versions)
    if (_times(at // width, len(sound)) > width // share).any():  # perhaps in COPIED alone
        at = _differing(versions & _SAME)
        sound &= _times(at // width, len(sound)) <= width // share
    group, column = np.divmod(at, width)
    group, column = group[sound[group]], column[sound[group]]
    words = versions[:, group, column]
    same = words & _SAME
    changed = same[1:] != same[:1]
    fresh = changed.copy()
    for lag in range(1, len(same) - 1):
        fresh[lag:] &= same[1 + lag :] != same[1:-lag]
    version, place = np.nonzero(changed)
    return Differences(
        table=part[1 + version, group[place]],
        column=column[place],
        word=words[1 + version, place].byteswap(),
        base=words[0, place].byteswap(),
        fresh=fresh[version, place],
    )


def _differing(versions: U64) -> I64:
    """At which flat positions in the tables not all versions are as the first."""
    base = versions[0].reshape(-1)
    differs = np.zeros(base.shape, dtype=np.bool_)
    unlike = np.empty_like(differs)
    for version in versions[1:]:
        differs |= np.not_equal(version.reshape(-1), base, out=unlike)
    return np.flatnonzero(differs)


def _times(numbers: I64, end: int) -> I64:
    """How often each number below *end* occurs."""
    return np.bincount(numbers, minlength=end)
