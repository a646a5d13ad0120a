"""Lists of attributes: which records of the MFT go on which other one.

A file whose attributes fill more than its own record has a list of all of them. So where a record
that goes on another is lost, its file is still known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from planner.arrays import I64, U8, expand_ranges
from planner.guestfs.columns import little
from planner.guestfs.ntfs.attributes import (
    ATTRIBUTE_LIST,
    NUMBER,
    Attributes,
    Records,
    runs_of,
    values_of,
)
from planner.guestfs.ntfs.boot import Boot
from planner.guestfs.ntfs.table import MAX_LIST_BYTES
from planner.guestfs.reading import Holes, read_blocks

SHORTEST = 26


@dataclass(frozen=True, slots=True)
class GoesOn:
    """Which ``record``, ascending, goes on which ``base``; int64."""

    record: I64
    base: I64

    @classmethod
    def of(cls, parts: Sequence[tuple[I64, I64]]) -> GoesOn:
        """Of records and bases in any order."""
        none = np.zeros(0, dtype=np.int64)
        record, base = (np.concatenate(each) for each in zip((none, none), *parts, strict=True))
        order = np.argsort(record, kind="stable")
        record, base = record[order], base[order]
        first = np.append(True, record[1:] != record[:-1])[: len(record)]
        return cls(record[first], base[first])

    def bases_of(self, number: I64) -> I64:
        """Of records the ones that they go on; those that are in no list as they are."""
        if not len(self.record):
            return number
        at = np.minimum(np.searchsorted(self.record, number), len(self.record) - 1)
        return np.where(self.record[at] == number, self.base[at], number)


def listed_in(
    source: Holes, boot: Boot, records: Records, attributes: Attributes
) -> Iterator[tuple[I64, I64]]:
    """The records that lists among *attributes* name, and those that they go on."""
    lists = attributes.select(attributes.type == ATTRIBUTE_LIST)
    for row, record in _listed(source, boot, records, lists):
        base = records.number[row]
        other = record != base
        yield record[other], base[other]


def _listed(
    source: Holes, boot: Boot, records: Records, lists: Attributes
) -> Iterator[tuple[I64, I64]]:
    """Rows of *records*, and the numbers that their lists name."""
    inside = lists.select(~lists.is_outside)
    start, length = values_of(records.flat, inside)
    yield _records_in(records.flat, inside.row, start, start + length)
    outside = lists.select(lists.is_outside)
    runs, _ = runs_of(records.flat, outside, boot.clusters)
    # Of each as much as Windows makes; in the order of its bytes.
    fits = (runs.virtual + runs.length) * boot.cluster_size <= MAX_LIST_BYTES
    fits &= np.cumsum(runs.length) <= boot.clusters
    order = np.flatnonzero(fits)
    order = order[np.lexsort((runs.virtual[order], runs.attribute[order]))]
    if not len(order):
        return
    count = runs.length[order]
    cluster = np.repeat(runs.cluster[order], count)
    cluster += expand_ranges(np.zeros_like(count), count - 1)
    of = np.repeat(runs.attribute[order], count)
    raw = read_blocks(source, cluster * boot.cluster_size, boot.cluster_size)
    first = np.flatnonzero(np.append(True, of[1:] != of[:-1]))
    last = np.append(first[1:], len(of))
    stated = little(records.flat, outside.at[of[first]] + 48, 8)
    room = (last - first) * boot.cluster_size
    start = first * boot.cluster_size
    end = start + np.where((stated > 0) & (stated < room), stated, room)
    yield _records_in(raw.reshape(-1), outside.row[of[first]], start, end)


def _records_in(flat: U8, row: I64, at: I64, end: I64) -> tuple[I64, I64]:
    """Of lists from *at* to *end* in *flat*, each of *row*, what they name."""
    at, found = at.copy(), list[tuple[I64, I64]]()
    live = np.flatnonzero(at + SHORTEST <= end)
    while len(live):
        length = little(flat, at[live] + 4, 2)
        sound = (length >= SHORTEST) & (length % 8 == 0) & (at[live] + length <= end[live])
        live, length = live[sound], length[sound]
        found.append((row[live], little(flat, at[live] + 16, 8) & NUMBER))
        at[live] += length
        live = live[at[live] + SHORTEST <= end[live]]
    none = np.zeros(0, dtype=np.int64)
    rows, numbers = zip(*[(none, none), *found], strict=True)
    return np.concatenate(rows), np.concatenate(numbers)
