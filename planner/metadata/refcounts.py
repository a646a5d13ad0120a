"""The refcounts that the image stores: refcount table, refcount blocks, and looking them up.

Source: docs/interop/qcow2.txt, "Host cluster management"; qcow2_get_refcount for what a lookup in a
damaged structure does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from planner.arrays import I64, U64, Counts, Mask
from planner.metadata.cluster_counters import ClusterIndex, fill_rows
from planner.qcow2 import entries
from planner.qcow2.layout import Layout
from planner.qcow2.refcounts import unpack_refcounts
from planner.source import READABLE_END, Source, nonzero_words, present_tables, read_tables


class Reftable:
    """The refcount table's non-zero entries.

    ``index``, ``word``: position and raw word, ascending. ``offset``: of the refcount block, bytes.
    ``reserved``, ``misaligned``: what is wrong with the entry. ``unreadable``: no refcount can be
    looked up through it.
    """

    def __init__(self, source: Source, layout: Layout) -> None:
        geometry = layout.geometry
        self.entries_per_block = geometry.refblock_entries
        self.index, self.word = nonzero_words(
            source, layout.header.refcount_table_offset, layout.reftable_entries
        )
        masked = self.word & np.uint64(entries.REFTABLE_OFFSET)
        self.reserved: Mask = (self.word & np.uint64(entries.REFTABLE_RESERVED)) != 0
        self.misaligned: Mask = (masked & np.uint64(geometry.cluster_size - 1)) != 0
        self.too_far: Mask = masked > np.uint64(READABLE_END - geometry.cluster_size)
        self.unreadable: Mask = self.misaligned | self.too_far
        self.offset = np.where(self.too_far, np.uint64(READABLE_END), masked).astype(np.int64)

    def blocks(self) -> I64:
        """Positions (in ``index``) of entries that lead to a block that can be read."""
        return np.flatnonzero(~self.unreadable & (self.offset != 0))


class StoredRefcounts:
    """The stored refcount of every slot of a `ClusterIndex`, and of any other cluster on demand."""

    def __init__(self, source: Source, layout: Layout, reftable: Reftable) -> None:
        self._source = source
        self._layout = layout
        self.reftable = reftable
        self.entries_per_block = reftable.entries_per_block
        self.index = ClusterIndex(0)
        self.values: Counts = np.zeros(0, dtype=np.uint8)
        self._unreadable_blocks = reftable.index[reftable.unreadable]

    def load_dense(self, clusters: int, tick: Callable[[int], None]) -> None:
        """Read the refcounts of clusters 0..clusters-1. *tick* is told of the bytes read."""
        per_block = self.entries_per_block
        values: Counts = np.zeros((-(-clusters // per_block), per_block), dtype=np.uint8)
        for rows, part in self._read_blocks(len(values), tick):
            values = fill_rows(values, rows, part)
        self.values = values.reshape(-1)[:clusters]
        self.index = ClusterIndex(clusters)

    def nonzero_sparse(self, clusters: int, tick: Callable[[int], None]) -> tuple[I64, Counts]:
        """(cluster, refcount) of all clusters below *clusters* that have one; ascending.

        For files far larger than their metadata. A block that several refcount table entries share
        is taken for the first of them only, and the others count as unreadable: otherwise one block
        would stand for as many clusters as a table claims.
        """
        found: list[I64] = []
        refcounts: list[Counts] = []
        for rows, part in self._read_blocks(
            -(-clusters // self.entries_per_block), tick, once=True
        ):
            at, inside = np.nonzero(part)
            found.append(rows[at] * self.entries_per_block + inside)
            refcounts.append(part[at, inside])
        if not found:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint8)
        cluster, refcount = np.concatenate(found), np.concatenate(refcounts)
        inside = np.flatnonzero(cluster < clusters)
        order = inside[np.argsort(cluster[inside])]
        return cluster[order], refcount[order]

    def in_use(self, clusters: int) -> int:
        """How many of the clusters below *clusters* have a refcount."""
        count = 0
        below = -(-clusters // self.entries_per_block)
        for rows, part in self._read_blocks(below, lambda _: None):
            inside = np.arange(self.entries_per_block) < clusters - rows[:, None] * part.shape[1]
            count += int(np.count_nonzero((part != 0) & inside))
        return count

    def counted_end(self, clusters: int) -> int:
        """Behind the last cluster from *clusters* on that has a refcount; 0 where none has."""
        table, per_block = self.reftable, self.entries_per_block
        which = table.blocks()
        which = which[table.index[which] >= clusters // per_block][::-1]
        # Of the entries that lead to one block, the last is the one that reaches furthest.
        offsets, first = np.unique(table.offset[which], return_index=True)
        present = present_tables(self._source, offsets, self._layout.geometry.cluster_size)
        offsets, which = offsets[present], which[first[present]]
        end = 0
        for part, rows in read_tables(self._source, offsets, self._layout.geometry.cluster_size):
            used = unpack_refcounts(rows, self._layout.geometry.refcount_order) != 0
            past = per_block - np.argmax(used[:, ::-1], axis=1)
            ends = table.index[which[part]] * per_block + past
            end = max(end, int(ends[used.any(axis=1)].max(initial=0)))
        return end if end > clusters else 0

    def set_sparse(self, index: ClusterIndex, cluster: I64, refcount: Counts) -> None:
        """Take over what `nonzero_sparse` found; every *cluster* has a slot in *index*."""
        self.index = index
        self.values = np.zeros(index.slots, dtype=refcount.dtype)
        self.values[index.slots_of(cluster)] = refcount

    def _read_blocks(
        self, below: int, tick: Callable[[int], None], once: bool = False
    ) -> Iterator[tuple[I64, Counts]]:
        """Refcount table indices, and the refcounts of their blocks, shape (blocks, entries)."""
        table, geometry = self.reftable, self._layout.geometry
        which = table.blocks()
        which = which[table.index[which] < below]
        which = which[np.argsort(table.offset[which], kind="stable")]
        if once:
            again = np.flatnonzero(np.diff(table.offset[which]) == 0) + 1
            shared = table.index[which[again]]
            self._unreadable_blocks = np.union1d(self._unreadable_blocks, shared)
            which = np.delete(which, again)
        size = geometry.cluster_size
        which = which[present_tables(self._source, table.offset[which], size)]
        for part, rows in read_tables(self._source, table.offset[which], size):
            yield table.index[which[part]], unpack_refcounts(rows, geometry.refcount_order)
            tick(rows.size)

    @property
    def unreadable_blocks(self) -> I64:
        """Refcount table indices through which no refcount can be looked up; ascending."""
        return self._unreadable_blocks

    def unreadable(self, clusters: I64) -> Mask | None:
        """Which lookups fail; None where none does."""
        if not len(self._unreadable_blocks):
            return None
        return np.isin(clusters // self.entries_per_block, self._unreadable_blocks)

    def is_one(self, clusters: I64) -> Mask:
        """Whether the stored refcount is 1, for any clusters."""
        slots, known = self.index.find(clusters)
        result: Mask = np.zeros(len(clusters), dtype=np.bool_)
        if self.index.slots:
            result = self.values[slots] == 1
        if known.all():
            return result
        beyond = np.flatnonzero(~known)
        result[beyond] = self._look_up(clusters[beyond]) == 1
        return result

    def _look_up(self, clusters: I64) -> U64:
        """Refcounts of clusters that have no slot: mostly past the end of the file."""
        refcounts = np.zeros(len(clusters), dtype=np.uint64)
        blocks = clusters // self.entries_per_block
        readable = self.reftable.blocks()
        at = np.searchsorted(self.reftable.index[readable], blocks)
        hit = np.flatnonzero(at < len(readable))
        hit = hit[self.reftable.index[readable[at[hit]]] == blocks[hit]]
        size = self._layout.geometry.cluster_size
        offsets, which = np.unique(self.reftable.offset[readable[at[hit]]], return_inverse=True)
        present = present_tables(self._source, offsets, size)
        order = self._layout.geometry.refcount_order
        kept = np.flatnonzero(present)
        for part, rows in read_tables(self._source, offsets[kept], size):
            values = unpack_refcounts(rows, order)
            row_of = np.full(len(offsets), -1)
            row_of[kept[part]] = np.arange(len(rows))
            mine = hit[row_of[which] >= 0]
            refcounts[mine] = values[
                row_of[which[row_of[which] >= 0]], clusters[mine] % self.entries_per_block
            ]
        return refcounts
