"""The indexes of NTFS's directories: names of files whose own records are lost.

A name stands twice, in the record of its file and in the index of its directory. What an index
says is asked for only where a record cannot be read. An index begins in the directory's record and
goes on in blocks outside of it; which of those are in use, its bitmap says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planner.arrays import I64, U8, Mask, expand_ranges
from planner.guestfs.columns import little
from planner.guestfs.ntfs.attributes import (
    BITMAP,
    INDEX_ALLOCATION,
    INDEX_ROOT,
    NUMBER,
    Attributes,
    Records,
    Runs,
    mended,
    runs_of,
    values_of,
)
from planner.guestfs.ntfs.boot import Boot
from planner.guestfs.reading import Holes, read_blocks

MAGIC = b"INDX"
NAME = "$I30".encode("utf-16-le")
"""Of the attributes of a directory's index of names."""

ROOT_NODE, BLOCK_NODE = 16, 24
"""Where in the value, and in a block, the head of the entries is."""

BYTES_AT_A_TIME = 2 << 20
SHORTEST = 16
IS_LAST = 2


@dataclass(frozen=True, slots=True)
class Entries:
    """Entries of indexes: the directory, what is named, and where in ``flat`` the name's attribute
    is and how long.
    """

    parent: I64
    child: I64
    flat: U8
    start: I64
    length: I64


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Blocks of indexes: the ``row`` of the record that each is of, its number in the index, and
    where its parts are that lie in one cluster each, shape (n, parts).
    """

    row: I64
    number: I64
    place: I64

    def select(self, which: Mask) -> _Blocks:
        """Some of them."""
        return _Blocks(self.row[which], self.number[which], self.place[which])


class Indexes:
    """The indexes of one file system. ``lost``: blocks of them that could not be read."""

    def __init__(self, source: Holes, boot: Boot) -> None:
        self._source, self._boot = source, boot
        self.lost = 0

    def entries(self, records: Records, attributes: Attributes) -> Iterator[Entries]:
        """What the indexes in *attributes* of directories name."""
        inode = np.where(records.base > 0, records.base, records.number)
        attributes = attributes.select(_are_named(records.flat, attributes))
        roots = attributes.select((attributes.type == INDEX_ROOT) & ~attributes.is_outside)
        start, length = values_of(records.flat, roots)
        yield _entries_in(records.flat, start + ROOT_NODE, start + length, inode[roots.row])
        outside = attributes.select((attributes.type == INDEX_ALLOCATION) & attributes.is_outside)
        size = self._boot.index_size
        if not len(outside):
            return
        if not size:
            self.lost += 1
            return
        found = self._blocks(records, outside)
        bitmaps = attributes.select(attributes.type == BITMAP)
        found = found.select(self._are_used(records, bitmaps, found))
        step, unit = max(1, BYTES_AT_A_TIME // size), min(size, self._boot.cluster_size)
        for at in range(0, len(found.row), step):
            raw = _read_any(self._source, found.place[at : at + step], unit)
            sound, raw = mended(raw, MAGIC)
            self.lost += len(found.row[at : at + step]) - len(sound)
            begin = np.arange(len(raw), dtype=np.int64) * size
            parent = inode[found.row[at : at + step][sound]]
            yield _entries_in(raw.reshape(-1), begin + BLOCK_NODE, begin + size, parent)

    def _blocks(self, records: Records, outside: Attributes) -> _Blocks:
        boot = self._boot
        runs, _ = runs_of(records.flat, outside, boot.clusters)
        unit = min(boot.index_size, boot.cluster_size)
        per_cluster, per_block = boot.cluster_size // unit, boot.index_size // unit
        # No more than the disk holds: runs of garbage may have all of it many times.
        fits = np.cumsum(runs.length) <= boot.clusters
        self.lost += int((~fits).sum())
        attribute, virtual, cluster, length = (
            column[fits] for column in (runs.attribute, runs.virtual, runs.cluster, runs.length)
        )
        count = length * per_cluster
        within = expand_ranges(np.zeros_like(count), count - 1) if len(count) else count
        attribute = np.repeat(attribute, count)
        number = np.repeat(virtual * per_cluster, count) + within
        place = np.repeat(cluster * boot.cluster_size, count) + within * unit
        order = np.lexsort((number, attribute))
        attribute, number, place = attribute[order], number[order], place[order]
        first = np.flatnonzero(number % per_block == 0)
        first = first[first + per_block <= len(number)]
        parts = first[:, None] + np.arange(per_block)
        whole = (attribute[parts] == attribute[first][:, None]).all(axis=1)
        whole &= (number[parts] == number[first][:, None] + np.arange(per_block)).all(axis=1)
        first, parts = first[whole], parts[whole]
        return _Blocks(outside.row[attribute[first]], number[first] // per_block, place[parts])

    def _are_used(self, records: Records, bitmaps: Attributes, blocks: _Blocks) -> Mask:
        """Whether the bitmap of its directory has each block as used, or does not say."""
        used = np.ones(len(blocks.row), dtype=np.bool_)
        inside = bitmaps.select(~bitmaps.is_outside)
        if len(inside):
            inside = inside.select(np.argsort(inside.row, kind="stable"))
            start, length = values_of(records.flat, inside)
            at = np.minimum(np.searchsorted(inside.row, blocks.row), len(inside) - 1)
            known = (inside.row[at] == blocks.row) & (blocks.number // 8 < length[at])
            some = np.flatnonzero(known)
            byte = records.flat[start[at[some]] + blocks.number[some] // 8]
            used[some] = _bits(byte, blocks.number[some])
        outside = bitmaps.select(bitmaps.is_outside)
        runs, _ = runs_of(records.flat, outside, self._boot.clusters)
        if len(runs.virtual):
            row = outside.row[runs.attribute]
            some, place = self._bytes_of(runs, row, blocks)
            byte = _read_any(self._source, place[:, None], 1)[:, 0]
            told = ~self._source.are_holes(place, 1)
            used[some[told]] = _bits(byte[told], blocks.number[some[told]])
        return used

    def _bytes_of(self, runs: Runs, row: I64, blocks: _Blocks) -> tuple[I64, I64]:
        """Which of the blocks bitmaps in *runs* tell of, and where the byte of each is."""
        size = self._boot.cluster_size
        order = np.lexsort((runs.virtual, row))
        key = (row << 53 | runs.virtual)[order]
        wanted = blocks.row << 53 | blocks.number // 8 // size
        at = order[np.maximum(np.searchsorted(key, wanted, side="right") - 1, 0)]
        within = blocks.number // 8 - runs.virtual[at] * size
        known = (row[at] == blocks.row) & (within >= 0) & (within < runs.length[at] * size)
        some = np.flatnonzero(known)
        return some, runs.cluster[at[some]] * size + within[some]


def _are_named(flat: U8, attributes: Attributes) -> Mask:
    named: Mask = attributes.name_length == len(NAME) // 2
    at = np.flatnonzero(named)
    place = attributes.name[at][:, None] + np.arange(len(NAME))
    named[at] = (flat[place] == np.frombuffer(NAME, dtype=np.uint8)).all(axis=1)
    return named


def _bits(byte: U8, number: I64) -> Mask:
    result: Mask = (byte >> (number % 8).astype(np.uint8)) & 1 != 0
    return result


def _read_any(source: Holes, place: I64, size: int) -> U8:
    """Blocks in parts of *size* bytes at *place*, shape (n, parts), read in the disk's order."""
    at = place.reshape(-1)
    order = np.argsort(at, kind="stable")
    raw = np.empty((len(at), size), dtype=np.uint8)
    raw[order] = read_blocks(source, at[order], size)
    return raw.reshape(len(place), -1)


def _entries_in(flat: U8, head: I64, limit: I64, parent: I64) -> Entries:
    """The entries of nodes whose heads are at *head* in *flat*, each up to *limit* at most."""
    fits = head + 16 <= limit
    head, limit, parent = head[fits], limit[fits], parent[fits]
    at = head + little(flat, head, 4)
    end = np.minimum(head + little(flat, head + 4, 4), limit)
    found: list[tuple[I64, ...]] = []
    live = np.flatnonzero(at + SHORTEST <= end)
    while len(live):
        place = at[live]
        length, key = little(flat, place + 8, 2), little(flat, place + 10, 2)
        sound = (length >= SHORTEST) & (length % 8 == 0) & (place + length <= end[live])
        sound &= (flat[place + 12] & IS_LAST) == 0
        live, place, length, key = live[sound], place[sound], length[sound], key[sound]
        good = SHORTEST + key <= length
        child = little(flat, place, 8) & NUMBER
        columns = (parent[live], child, place + SHORTEST, key)
        found.append(tuple(column[good] for column in columns))
        at[live] = place + length
        live = live[at[live] + SHORTEST <= end[live]]
    none = np.zeros(0, dtype=np.int64)
    found.append((none,) * 4)
    parents, children, starts, lengths = (
        np.concatenate(column) for column in zip(*found, strict=True)
    )
    return Entries(parents, children, flat, starts, lengths)
