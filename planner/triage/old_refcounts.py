"""Refcount tables and blocks that the image had before, and that leak: no guest's data was there.

A cluster that looks like a table is told from an L2 table by what it leads to: at each index the
block that is still in use there, or a leaked one whose refcounts are of clusters that are in use.
That goes for refcounts of any width, narrow ones look like anything on their own.
"""

from __future__ import annotations

import numpy as np

from planner.arrays import I64, U64, Mask, distinct, is_among
from planner.check.refcount_comparison import CHUNK, Mismatches
from planner.metadata.refcounts import Reftable
from planner.qcow2 import entries
from planner.qcow2.layout import Layout
from planner.qcow2.refcounts import unpack_refcounts
from planner.source import HOLE, Source, present_pieces, read_filled, read_tables

MAX_OLD_TABLES = 256
"""Leaked clusters that are weighed."""

_KNOWN_OF = 8
"""All but one in so many of a block's refcounts are of clusters that are in use, or it is none."""

_COUNTED_OF = 2
"""Of the clusters that are in use it counts one in so many, or more: it is not that much older."""


_REFCOUNTS, _TIMES = 1 << 24, 2
"""So many refcounts of old blocks are weighed, at most, and those of all clusters so often: when a
table was left for a longer one, both of them counted what there was.
"""


class OldRefcounts:
    """Tells them among the *leaked* clusters, ascending, of an image."""

    def __init__(self, source: Source, layout: Layout, mismatches: Mismatches, leaked: I64) -> None:
        self._source, self._leaked, self._mismatches = source, leaked, mismatches
        self._layout, self._geometry = layout, layout.geometry
        self._table = Reftable(source, layout)
        self._left = _REFCOUNTS + _TIMES * mismatches.index.slots

    def find(self, candidates: I64) -> tuple[I64, I64]:
        """Those of the leaked clusters *candidates*, ascending, that are parts of an old table; and
        the leaked blocks that they lead to.
        """
        bits, per_cluster = self._geometry.cluster_bits, self._geometry.cluster_size // 8
        chosen = candidates[:MAX_OLD_TABLES]
        tables, blocks = [candidates[:0]], [candidates[:0]]
        before, base = -2, 0
        for filled in read_filled(self._source, chosen << bits, self._geometry.cluster_size):
            position = filled.words()
            for words, cluster in zip(
                entries.decode_words(filled.rows), chosen[filled.part].tolist(), strict=True
            ):
                first, is_word = base + per_cluster if cluster == before + 1 else 0, words != 0
                found = self._blocks_of(cluster, position[is_word], words[is_word], first)
                if found is not None:
                    tables.append(np.array([cluster], dtype=np.int64))
                    blocks.append(found)
                    before, base = cluster, first
        return np.concatenate(tables), np.unique(np.concatenate(blocks))

    def _blocks_of(self, cluster: int, index: I64, words: U64, first: int) -> I64 | None:
        """The leaked blocks that the *words* of a cluster lead to that are not zero, each with its
        *index*, entries from *first* on; None if it is no table.

        One word that is that of the table in use proves nothing: a disk may hold an image. But a
        table that was left for a later one is in use nowhere else.
        """
        misaligned = np.uint64(~entries.REFTABLE_OFFSET & (1 << 64) - 1)
        misaligned |= np.uint64(entries.REFTABLE_OFFSET & (self._geometry.cluster_size - 1))
        if not len(words) or (words & misaligned).any():
            return None
        places = words.astype(np.int64)
        is_current = self._are_in_use(index + first, places)
        moved = cluster << self._geometry.cluster_bits < self._layout.header.refcount_table_offset
        blocks = places[~is_current] >> self._geometry.cluster_bits
        if not is_among(blocks, self._leaked).all():
            return None
        if len(words) == 1 and is_current.all() and not moved:
            return None
        if not self._are_blocks(index[~is_current] + first, blocks):
            return None
        return blocks

    def _are_in_use(self, index: I64, places: I64) -> Mask:
        """Which entries the table in use has too."""
        table = self._table
        if not len(table.index):
            return np.zeros(len(index), dtype=np.bool_)
        at = np.minimum(np.searchsorted(table.index, index), len(table.index) - 1)
        same: Mask = (table.index[at] == index) & (table.offset[at] == places)
        return same

    def _are_blocks(self, index: I64, blocks: I64) -> bool:
        """Whether all these clusters may have been the refcount blocks of these indices.

        A table leads to each block once, and none is all zeros. What is there of them is looked at
        in pieces, of a file that is a few refcounts and many holes no more than that.
        """
        order = np.argsort(blocks, kind="stable")
        places = blocks[order] << self._geometry.cluster_bits
        if not np.diff(places).all():
            return False
        size = self._geometry.cluster_size
        piece = min(size, HOLE)
        offset = present_pieces(self._source, places, size, piece)
        which = np.searchsorted(places, offset, side="right") - 1
        self._left -= len(offset) * (piece << 3 >> self._geometry.refcount_order)
        if self._left < 0 or len(distinct(which)) < len(places):
            return False
        first = index[order] * self._geometry.refblock_entries
        return self._may_count(first, which, offset - places[which], offset)

    def _may_count(self, first: I64, which: I64, inside: I64, offset: I64) -> bool:
        """Whether blocks may have counted the clusters from *first* on, one a block, as they once
        were. Their pieces: *which* block, how far *inside* it, and at which *offset* of the file.
        """
        order, mismatches = self._geometry.refcount_order, self._mismatches
        count, unknown, both = (np.zeros(len(first), dtype=np.int64) for _ in range(3))
        piece = min(self._geometry.cluster_size, HOLE)
        for part, rows in read_tables(self._source, offset, piece, CHUNK << order >> 3):
            row, at = np.nonzero(unpack_refcounts(rows, order))
            block = which[part][row]
            cluster = first[block] + (inside[part][row] << 3 >> order) + at
            slots, has_slot = mismatches.index.find(cluster)
            is_used, is_known = np.zeros((2, len(cluster)), dtype=np.bool_)
            is_used[has_slot] = mismatches.counted[slots[has_slot]] != 0
            is_known[has_slot] = mismatches.stored[slots[has_slot]] != 0
            is_known |= is_used | is_among(cluster, self._leaked)
            count += np.bincount(block, minlength=len(first))
            unknown += np.bincount(block[~is_known], minlength=len(first))
            both += np.bincount(block[is_used], minlength=len(first))
        used = np.zeros(len(first), dtype=np.int64)
        ends = first + self._geometry.refblock_entries
        low, high = (mismatches.index.count_before(at).tolist() for at in (first, ends))
        for number, slots_of in enumerate(map(slice, low, high)):
            used[number] = np.count_nonzero(mismatches.counted[slots_of])
        is_recent = (count > 0) & (both * _COUNTED_OF >= used)
        return bool((is_recent & (unknown * _KNOWN_OF <= count)).all())
