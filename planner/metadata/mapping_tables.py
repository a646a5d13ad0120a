"""L1 tables, and the distinct L2 tables that they lead to.

An L2 table that many L1 entries share (snapshots) is walked once and counted as often as QEMU
would walk it. Source: docs/interop/qcow2.txt, "Cluster mapping"; check_refcounts_l1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planner.arrays import I32, I64, U8, U64, Mask, distinct_columns, expand_ranges, is_among
from planner.findings.kinds import ACTIVE
from planner.qcow2 import entries
from planner.qcow2.entries import ClusterType
from planner.qcow2.geometry import Geometry
from planner.qcow2.layout import Layout
from planner.qcow2.snapshots import Snapshots
from planner.source import (
    BATCH_BYTES,
    HOLE,
    Source,
    pieces_of_tables,
    read_parts,
    words_of_tables,
)

LARGE_TABLE = 1 << 18
"""Of a table of so many bytes it is asked what is there of it, before it is read."""


@dataclass(frozen=True, slots=True)
class L1Tables:
    """Where L1 tables lie. ``snapshot``: `ACTIVE` or a snapshot's index. ``offset``: bytes.
    ``size``: entries.
    """

    snapshot: I32
    offset: I64
    size: I64

    @classmethod
    def of_disk(cls, offset: int, size: int) -> L1Tables:
        """The active one alone."""
        return cls(
            np.array([ACTIVE], dtype=np.int32),
            np.array([offset], dtype=np.int64),
            np.array([size], dtype=np.int64),
        )

    @classmethod
    def of_snapshots(cls, snapshots: Snapshots, which: Mask) -> L1Tables:
        """Of those of *snapshots* in *which*, none of which has it further than any file goes."""
        fields, number = snapshots.fields(), np.flatnonzero(which)
        return cls(
            number.astype(np.int32),
            fields["l1_table_offset"][number].astype(np.int64),
            fields["l1_size"][number].astype(np.int64),
        )

    def select(self, which: Mask) -> L1Tables:
        return L1Tables(self.snapshot[which], self.offset[which], self.size[which])

    def joined(self, others: L1Tables) -> L1Tables:
        """These, and then *others*."""
        pairs = ((getattr(self, name), getattr(others, name)) for name in self.__slots__)
        return L1Tables(*map(np.concatenate, pairs))


@dataclass(frozen=True, slots=True)
class L1Entries:
    """The non-zero entries of all L1 tables that can be read, the active one first.

    ``snapshot``: `ACTIVE` or a snapshot's index. ``l1_index``: position in its table. ``word``:
    raw. ``host_offset``: of the entry itself, bytes.
    """

    snapshot: I32
    l1_index: I64
    word: U64
    host_offset: I64

    @property
    def offset(self) -> I64:
        """Of the L2 table that the entry leads to, bytes."""
        return entries.l1_offsets(self.word)

    @property
    def active(self) -> Mask:
        """Which entries are of the active L1 table."""
        return np.equal(self.snapshot, ACTIVE)


def read_l1_tables(source: Source, tables: L1Tables) -> L1Entries:
    """The entries of *tables*, which may be of one disk or of many."""
    table, index, word = words_of_tables(source, tables.offset, tables.size)
    return L1Entries(tables.snapshot[table], index, word, tables.offset[table] + index * 8)


@dataclass(frozen=True, slots=True)
class L2Tables:
    """The distinct L2 tables, ascending by ``offset`` (host offset, bytes).

    ``weight``: L1 entries that lead there. ``active``: those of the active L1 among them.
    ``copied``: those of them that QEMU's COPIED pass follows. ``snapshot``,
    ``l1_index``: the first entry that leads there. ``sibling``: another table stands at the same L1
    index, in another snapshot. ``l1_position``: for each L1 entry its table, shape of `L1Entries`.
    """

    offset: I64
    weight: I64
    active: I64
    copied: I64
    snapshot: I32
    l1_index: I64
    sibling: Mask
    l1_position: I64

    def __len__(self) -> int:
        return len(self.offset)

    def classes(self, which: I64) -> list[Batch]:
        """The tables at positions *which*, those that count alike together, each in file order."""
        columns = (self.weight, self.active, self.copied, self.sibling)
        keys = np.stack([column[which] for column in columns])
        kinds, inverse = distinct_columns(keys.astype(np.int64))
        return [
            Batch(which[inverse == number], weight, active, copied, bool(sibling))
            for number, (weight, active, copied, sibling) in enumerate(kinds.T.tolist())
        ]


@dataclass(frozen=True, slots=True)
class Batch:
    """L2 tables that count alike: their positions, and what one entry in them counts."""

    ids: I64
    weight: int
    active: int
    copied: int
    sibling: bool

    def positions(self, flat: I64, width: int) -> I64:
        """*flat* positions in these tables of *width* entries, as positions in all tables."""
        return self.ids[flat // width] * width + flat % width


def distinct_l2_tables(l1: L1Entries, copied: Mask) -> L2Tables:
    """Group L1 entries by the L2 table that they lead to.

    *copied*: which entries QEMU's COPIED pass follows, bool, shape of *l1*.
    """
    offset, first, inverse, weight = np.unique(
        l1.offset, return_index=True, return_inverse=True, return_counts=True
    )
    inverse = inverse.reshape(-1)
    active = np.bincount(inverse, weights=l1.active, minlength=len(offset)).astype(np.int64)
    followed = np.bincount(inverse, weights=copied, minlength=len(offset)).astype(np.int64)
    l1_index = l1.l1_index[first]
    _, slot, crowd = np.unique(l1_index, return_inverse=True, return_counts=True)
    return L2Tables(
        offset=offset,
        weight=weight.astype(np.int64),
        active=active,
        copied=followed,
        snapshot=l1.snapshot[first],
        l1_index=l1_index,
        sibling=crowd[slot] > 1 if len(offset) else np.zeros(0, dtype=np.bool_),
        l1_position=inverse,
    )


@dataclass(frozen=True, slots=True)
class TableParts:
    """The parts of L2 tables that may say anything: whole tables, or of large ones that are holes
    for the most part the pieces that are there.

    ``table``: numbers among those at ``offsets``, ascending. ``inside``: where each part begins in
    its table, bytes. ``size``: of a part, bytes.
    """

    offsets: I64
    table: I64
    inside: I64
    size: int

    @classmethod
    def of(cls, source: Source, offsets: I64, table_bytes: int) -> TableParts:
        """Of the tables at ascending *offsets*, of *table_bytes* each."""
        if table_bytes >= LARGE_TABLE and len(offsets):
            table, inside = pieces_of_tables(source, offsets, table_bytes, HOLE)
            if 2 * len(table) * HOLE <= len(offsets) * table_bytes:
                return cls(offsets, table, inside, HOLE)
        return cls(offsets, np.arange(len(offsets)), np.zeros_like(offsets), table_bytes)

    def read(self, source: Source) -> Iterator[tuple[slice, U8]]:
        """Which of the parts, and their bytes, uint8 (parts, size), until the next; those of one
        table together."""
        ends = np.append(np.flatnonzero(np.diff(self.table)) + 1, len(self.table))
        batches, start, most = list[slice](), 0, max(1, BATCH_BYTES // self.size)
        while start < len(self.table):
            first, next_one = np.searchsorted(ends, (start, start + most), side="right")
            end = int(ends[max(first, next_one - 1)])
            batches.append(slice(start, end))
            start = end
        return read_parts(source, self.offsets[self.table] + self.inside, self.size, batches)

    def whole(self, part: slice, rows: U8, which: I64, table_bytes: int) -> Iterator[U8]:
        """The tables *which* of those that have *rows*, the bytes of the parts *part*: all of
        each, with zeros for what is not there; uint8 (tables, table bytes), some at a time.
        """
        table, number = self.table[part], self.inside[part] // self.size
        step = max(1, BATCH_BYTES // table_bytes)
        for start in range(0, len(which), step):
            some = which[start : start + step]
            at = np.flatnonzero(is_among(table, some))
            tables = np.zeros((len(some), table_bytes // self.size, self.size), dtype=np.uint8)
            tables[np.searchsorted(some, table[at]), number[at]] = rows[at]
            yield tables.reshape(len(some), -1)

    def positions(self, part: slice, flat: I64, geometry: Geometry) -> I64:
        """*flat* positions of entries in the parts *part*, as positions in the tables."""
        row, within = np.divmod(flat, self.size // geometry.l2_entry_size)
        first = self.table[part] * geometry.l2_entries
        first += self.inside[part] // geometry.l2_entry_size
        result: I64 = first[row] + within
        return result


def referenced_clusters(rows: U8, layout: Layout) -> I64:
    """Every cluster inside the file that the entries of L2 tables refer to, with repeats.

    *rows*: the tables, uint8 (tables, bytes).
    """
    return np.concatenate(data_and_compressed(rows, layout))


def data_and_compressed(rows: U8, layout: Layout) -> tuple[I64, I64]:
    """The same, apart: clusters of data, and those with compressed data."""
    words, _ = entries.split_entries(entries.decode_words(rows), layout.geometry.extended_l2)
    return clusters_of_entries(words[words != 0], layout)


def clusters_of_entries(words: U64, layout: Layout) -> tuple[I64, I64]:
    """The same, of single L2 entries."""
    types = entries.cluster_types(words, layout.geometry)
    data = entries.l2_offsets(words[entries.has_host_cluster(types)])
    packed = words[types == ClusterType.COMPRESSED]
    return (
        _clusters_inside(data, layout.geometry.cluster_size, layout),
        _clusters_inside(*entries.compressed_ranges(packed, layout.geometry), layout),
    )


def _clusters_inside(offset: I64, size: I64 | int, layout: Layout) -> I64:
    """The clusters of those ranges that are not past the end of the file."""
    inside, bits = ~layout.is_past_end(offset, size), layout.geometry.cluster_bits
    return expand_ranges(offset[inside] >> bits, (offset + size - 1)[inside] >> bits)
