"""L1 tables, and the distinct L2 tables that they lead to.

An L2 table that many L1 entries share (snapshots) is walked once and counted as often as QEMU
would walk it. Source: docs/interop/qcow2.txt, "Cluster mapping"; check_refcounts_l1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.arrays import I32, I64, U8, U64, Mask, distinct_columns, expand_ranges
from planner.findings.kinds import ACTIVE
from planner.qcow2 import entries
from planner.qcow2.entries import ClusterType
from planner.qcow2.layout import Layout
from planner.source import Source, words_of_tables


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


def read_l1_tables(source: Source, tables: list[tuple[int, int, int]]) -> L1Entries:
    """Read the L1 tables given as (snapshot, offset, number of entries)."""
    snapshots, indices, words, positions = [], [], [], []
    read = words_of_tables(source, [(offset, size) for _, offset, size in tables])
    for (snapshot, offset, _), (index, word) in zip(tables, read, strict=True):
        if not len(index):
            continue
        snapshots.append(np.full(len(index), snapshot, dtype=np.int32))
        indices.append(index)
        words.append(word)
        positions.append(offset + index * 8)
    return L1Entries(
        np.concatenate(snapshots) if snapshots else np.zeros(0, dtype=np.int32),
        np.concatenate(indices) if indices else np.zeros(0, dtype=np.int64),
        np.concatenate(words) if words else np.zeros(0, dtype=np.uint64),
        np.concatenate(positions) if positions else np.zeros(0, dtype=np.int64),
    )


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
