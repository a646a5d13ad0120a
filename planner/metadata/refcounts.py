"""The refcounts that the image stores: refcount table, refcount blocks, and looking them up.

Source: docs/interop/qcow2.txt, "Host cluster management"; qcow2_get_refcount for what a lookup in a
damaged structure does.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from planner.arrays import I64, U8, U64, Counts, Mask, distinct, is_among
from planner.metadata.cluster_counters import (
    PAGE_BITS,
    ClusterIndex,
    NearOne,
    PagedIndex,
    beside_one,
    fill_rows,
)
from planner.progress import Meter
from planner.qcow2 import entries
from planner.qcow2.layout import Layout
from planner.qcow2.refcounts import pack_refcounts, read_refcount_in_block, unpack_refcounts
from planner.source import (
    HOLE,
    READABLE_END,
    Source,
    nonzero_words,
    present_pieces,
    present_tables,
    read_tables,
)

_PAGE = 1 << PAGE_BITS

_WORD_BITS = 64
"""As many refcounts as are in words of 64 bits, whatever their width."""


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
        self.values = NearOne(np.zeros(0, dtype=np.uint8))
        self._unreadable_blocks = reftable.index[reftable.unreadable]

    def load_dense(self, clusters: int, meter: Meter) -> None:
        """Read the refcounts of clusters 0..clusters-1. *meter* is told of the bytes read."""
        per_block = self.entries_per_block
        difference: Counts = np.zeros((-(-clusters // per_block), per_block), dtype=np.uint8)
        is_known = np.zeros(len(difference), dtype=np.bool_)
        for which, rows in self._read_blocks(len(difference), meter):
            is_known[which] = True
            # Of most blocks all refcounts are 1.
            others = np.flatnonzero(~self._are_ones(rows))
            part = unpack_refcounts(rows[others], self._layout.geometry.refcount_order)
            difference = fill_rows(difference, which[others], beside_one(part))
        difference[~is_known] = 1
        self.values = NearOne(difference.reshape(-1)[:clusters])
        self.index = ClusterIndex(clusters)

    def metadata_present(self) -> int:
        """How many refcounts there are in the parts of blocks that are more than holes."""
        offset = self.reftable.offset[self.reftable.blocks()]
        size = self._layout.geometry.cluster_size
        pieces = present_pieces(self._source, distinct(offset), size, self._piece_bytes)
        return len(pieces) * self._piece_entries

    def read_pages(self, clusters: int, meter: Meter) -> tuple[I64, Counts]:
        """Pages of clusters below *clusters* of which one has a refcount, and all refcounts there.

        Ascending, of shape (pages,) and (pages, clusters of a page). For files far larger than
        their metadata. A block that several refcount table entries share is taken for the first of
        them only, and the others count as unreadable: otherwise one block would stand for as many
        clusters as a table claims.
        """
        found = list(self._used_pages(clusters, meter))
        page = np.concatenate([np.zeros(0, dtype=np.int64), *(page for page, _ in found)])
        refcount: Counts = np.concatenate(
            [np.zeros((0, _PAGE), dtype=np.uint8), *(refcount for _, refcount in found)]
        )
        del found  # There may be as much as the image has: so not three times, in order too.
        order = np.argsort(page)
        order = order[page[order] << PAGE_BITS < clusters]
        if not np.array_equal(order, np.arange(len(page))):
            page, refcount = page[order], refcount[order]
        if len(page):
            refcount[-1, max(0, clusters - (int(page[-1]) << PAGE_BITS)) :] = 0
        return page, refcount

    def _used_pages(self, clusters: int, meter: Meter) -> Iterator[tuple[I64, Counts]]:
        """The same pages in file order, in batches, and a few of clusters behind those."""
        pages_a_piece = self._piece_entries >> PAGE_BITS
        first, offset = self._pieces(-(-clusters // self.entries_per_block))
        for part, rows in read_tables(self._source, offset, self._piece_bytes):
            values = unpack_refcounts(rows, self._layout.geometry.refcount_order)
            values = values.reshape(-1, _PAGE)
            used = np.flatnonzero(values.any(axis=1))
            row, inside = np.divmod(used, pages_a_piece)
            yield (first[part][row] >> PAGE_BITS) + inside, values[used]
            meter.advance(rows.size)

    @property
    def _piece_bytes(self) -> int:
        return min(self._layout.geometry.cluster_size, HOLE)

    @property
    def _piece_entries(self) -> int:
        return (self._piece_bytes << 3) >> self._layout.geometry.refcount_order

    def _pieces(self, below: int) -> tuple[I64, I64]:
        """Of the blocks that entries *below* that one lead to, the parts that are more than holes.

        Each once, in file order: the cluster that its first refcount is for, and its host offset.
        """
        table, size = self.reftable, self._layout.geometry.cluster_size
        which = table.blocks()
        which = which[table.index[which] < below]
        which = which[np.argsort(table.offset[which], kind="stable")]
        again = np.flatnonzero(np.diff(table.offset[which]) == 0) + 1
        shared = table.index[which[again]]
        self._unreadable_blocks = np.union1d(self._unreadable_blocks, shared)
        which = np.delete(which, again)
        offset = present_pieces(self._source, table.offset[which], size, self._piece_bytes)
        block, inside = np.divmod(offset, size)
        which = which[np.searchsorted(table.offset[which], block * size)]
        first = table.index[which] * self.entries_per_block
        return first + (inside << 3 >> self._layout.geometry.refcount_order), offset

    def in_use(self, clusters: int) -> int:
        """How many of the clusters below *clusters* have a refcount."""
        table, geometry = self.reftable, self._layout.geometry
        size, per_block = geometry.cluster_size, self.entries_per_block
        which = table.blocks()
        which = which[table.index[which] < -(-clusters // per_block)]
        # However many entries lead to a block, it is read once.
        offsets, times = np.unique(table.offset[which], return_counts=True)
        cut = table.offset[which[table.index[which] == clusters // per_block]]
        present = present_tables(self._source, offsets, size, anyway=0)
        offsets, times, count = offsets[present], times[present], 0
        for part, rows in read_tables(self._source, offsets, size):
            used = unpack_refcounts(rows, geometry.refcount_order) != 0
            count += int(np.count_nonzero(used, axis=1) @ times[part])
            past = used[np.isin(offsets[part], cut), clusters % per_block :]
            count -= int(np.count_nonzero(past))
        return count

    def counted_end(self, clusters: int) -> int:
        """Behind the last cluster from *clusters* on that has a refcount; 0 where none has."""
        end, order = 0, self._layout.geometry.refcount_order
        for first, pieces in self._raw_pieces_past(clusters, np.zeros(0, dtype=np.int64)):
            # No two count the same clusters, so that the last one decides.
            last = int(np.argmax(first))
            used = np.flatnonzero(unpack_refcounts(pieces[last], order))
            end = max(end, int(first[last]) + int(used[-1]) + 1)
        return end if end > clusters else 0

    def pieces_past(self, clusters: int, known: I64) -> Iterator[tuple[I64, Counts]]:
        """Of the blocks that count clusters from *clusters* on the pieces that are not all zeros,
        in batches: the first cluster of each, and its refcounts. A block that several entries lead
        to stands where it reaches furthest, but for those at host offsets *known*: these reach no
        further than the block of *clusters*.
        """
        for first, pieces in self._raw_pieces_past(clusters, known):
            yield first, unpack_refcounts(pieces, self._layout.geometry.refcount_order)

    def _raw_pieces_past(self, clusters: int, known: I64) -> Iterator[tuple[I64, U8]]:
        table, per_block = self.reftable, self.entries_per_block
        which = table.blocks()
        which = which[table.index[which] >= clusters // per_block][::-1]
        is_known = np.isin(table.offset[which], known)
        which = which[~is_known | (table.index[which] == clusters // per_block)]
        # Of the entries that lead to one block, the last is the one that reaches furthest.
        blocks, at = np.unique(table.offset[which], return_index=True)
        which = which[at]
        size, piece = self._layout.geometry.cluster_size, self._piece_bytes
        offset = present_pieces(self._source, blocks, size, piece, anyway=None)
        which = which[np.searchsorted(blocks, offset, side="right") - 1]
        first = table.index[which] * per_block + offset % size // piece * self._piece_entries
        for part, rows in read_tables(self._source, offset, piece):
            some = np.flatnonzero(rows.view(np.uint64).any(axis=1))
            if len(some):
                yield first[part][some], rows[some]

    def set_pages(self, index: PagedIndex, page: I64, refcount: Counts) -> None:
        """Take over what `read_pages` found; every *page* has slots in *index*."""
        self.index = index
        values: Counts = np.zeros((index.slots >> PAGE_BITS, _PAGE), dtype=refcount.dtype)
        values[index.slots_of(page << PAGE_BITS) >> PAGE_BITS] = refcount
        np.bitwise_xor(values, 1, out=values)  # as `beside_one` does, in its place
        self.values = NearOne(values.reshape(-1))

    def _are_ones(self, blocks: U8) -> Mask:
        """Of which blocks, uint8 (blocks, bytes), all refcounts are 1."""
        ones = np.ones(_WORD_BITS, dtype=np.uint8)
        word = pack_refcounts(ones, self._layout.geometry.refcount_order).view(np.uint64)[0]
        are_ones: Mask = (blocks.view(np.uint64) == word).all(axis=1)
        return are_ones

    def _read_blocks(self, below: int, meter: Meter) -> Iterator[tuple[I64, U8]]:
        """Refcount table indices, and their blocks, uint8 (blocks, bytes), until the next."""
        table, geometry = self.reftable, self._layout.geometry
        which = table.blocks()
        which = which[table.index[which] < below]
        which = which[np.argsort(table.offset[which], kind="stable")]
        size = geometry.cluster_size
        which = which[present_tables(self._source, table.offset[which], size)]
        for part, rows in read_tables(self._source, table.offset[which], size):
            yield table.index[which[part]], rows
            meter.advance(rows.size)

    @property
    def unreadable_blocks(self) -> I64:
        """Refcount table indices through which no refcount can be looked up; ascending."""
        return self._unreadable_blocks

    def unreadable(self, clusters: I64) -> Mask | None:
        """Which lookups fail; None where none does."""
        if not len(self._unreadable_blocks):
            return None
        return is_among(clusters // self.entries_per_block, self._unreadable_blocks)

    def unreadable_slots(self, slots: I64) -> Mask | None:
        """The same, of clusters with these slots."""
        if not len(self._unreadable_blocks):
            return None
        return self.unreadable(self.index.clusters_of(slots))

    def is_one(self, clusters: I64) -> Mask:
        """Whether the stored refcount is 1, for any clusters."""
        slots, known = self.index.find(clusters)
        result: Mask = np.zeros(len(clusters), dtype=np.bool_)
        if self.index.slots:
            result = self.values.are_one(slots)
        if known.all():
            return result
        beyond = np.flatnonzero(~known)
        result[beyond] = self.look_up(clusters[beyond]) == 1
        return result

    def look_up(self, clusters: I64) -> U64:
        """Refcounts read one by one: of clusters without slots, mostly past the end of the file."""
        refcounts = np.zeros(len(clusters), dtype=np.uint64)
        blocks = clusters // self.entries_per_block
        readable = self.reftable.blocks()
        at = np.searchsorted(self.reftable.index[readable], blocks)
        hit = np.flatnonzero(at < len(readable))
        hit = hit[self.reftable.index[readable[at[hit]]] == blocks[hit]]
        order, piece = self._layout.geometry.refcount_order, self._piece_bytes
        row, inside = np.divmod(clusters[hit] % self.entries_per_block, self._piece_entries)
        offsets, which = np.unique(
            self.reftable.offset[readable[at[hit]]] + row * piece, return_inverse=True
        )
        kept = np.flatnonzero(present_tables(self._source, offsets, piece))
        row_of = np.full(len(offsets), -1)
        for part, rows in read_tables(self._source, offsets[kept], piece):
            row_of[kept[part]] = np.arange(len(rows))
            mine = np.flatnonzero(row_of[which] >= 0)
            wanted = row_of[which[mine]] * self._piece_entries + inside[mine]
            refcounts[hit[mine]] = read_refcount_in_block(rows.reshape(-1), wanted, order)
            row_of[kept[part]] = -1
        return refcounts
