"""Refcount tables and blocks that the image had before, and that leak: no guest's data was there.

A cluster that looks like a table is told from an L2 table by what it leads to: at each index the
block that is still in use there, or a leaked one whose refcounts are of clusters that are in use.
That goes for refcounts of any width, narrow ones look like anything on their own.
"""

from __future__ import annotations

import numpy as np

from planner.arrays import I64, U64, Counts, Mask, is_among
from planner.check.refcount_comparison import Mismatches
from planner.metadata.refcounts import Reftable
from planner.qcow2 import entries
from planner.qcow2.layout import Layout
from planner.qcow2.refcounts import unpack_refcounts
from planner.source import Source, read_tables

MAX_OLD_TABLES = 256
"""Leaked clusters that are weighed."""

_KNOWN_OF = 8
"""All but one in so many of a block's refcounts are of clusters that are in use, or it is none."""

_COUNTED_OF = 2
"""Of the clusters that are in use it counts one in so many, or more: it is not that much older."""


class OldRefcounts:
    """Tells them among the *leaked* clusters, ascending, of an image."""

    def __init__(self, source: Source, layout: Layout, mismatches: Mismatches, leaked: I64) -> None:
        self._source, self._leaked, self._mismatches = source, leaked, mismatches
        self._layout, self._geometry = layout, layout.geometry
        self._table = Reftable(source, layout)

    def find(self, candidates: I64) -> tuple[I64, I64]:
        """Those of the leaked clusters *candidates*, ascending, that are parts of an old table; and
        the leaked blocks that they lead to.
        """
        bits, per_cluster = self._geometry.cluster_bits, self._geometry.cluster_size // 8
        chosen = candidates[:MAX_OLD_TABLES]
        tables, blocks = [candidates[:0]], [candidates[:0]]
        before, base = -2, 0
        for part, rows in read_tables(self._source, chosen << bits, self._geometry.cluster_size):
            for cluster, words in zip(
                chosen[part].tolist(), entries.decode_words(rows), strict=True
            ):
                first = base + per_cluster if cluster == before + 1 else 0
                found = self._blocks_of(cluster, words, first)
                if found is not None:
                    tables.append(np.array([cluster], dtype=np.int64))
                    blocks.append(found)
                    before, base = cluster, first
        return np.concatenate(tables), np.unique(np.concatenate(blocks))

    def _blocks_of(self, cluster: int, words: U64, first: int) -> I64 | None:
        """The leaked blocks that *words* lead to, entries from *first* on; None if it is no table.

        One word that is that of the table in use proves nothing: a disk may hold an image. But a
        table that was left for a later one is in use nowhere else.
        """
        index = np.flatnonzero(words)
        words = words[index]
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
        if not self._are_blocks(index[~is_current] + first, blocks).all():
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

    def _are_blocks(self, index: I64, blocks: I64) -> Mask:
        """Which clusters may have been the refcount blocks of these indices."""
        sound = np.zeros(len(blocks), dtype=np.bool_)
        per_block = self._geometry.refblock_entries
        order = np.argsort(blocks, kind="stable")
        places = blocks[order] << self._geometry.cluster_bits
        for part, rows in read_tables(self._source, places, self._geometry.cluster_size):
            refcounts = unpack_refcounts(rows, self._geometry.refcount_order)
            for at, row in zip(order[part].tolist(), refcounts, strict=True):
                sound[at] = self._is_block(int(index[at]) * per_block, row)
        return sound

    def _is_block(self, first: int, refcounts: Counts) -> bool:
        """Whether those may be *refcounts* of the clusters from *first* on, as they once were."""
        mismatches, index = self._mismatches, self._mismatches.index
        slots = np.arange(index.slots_before(first), index.slots_before(first + len(refcounts)))
        clusters = index.clusters_of(slots)
        has = refcounts[clusters - first] != 0
        is_used = mismatches.counted[slots] != 0
        is_known = is_used | (mismatches.stored[slots] != 0) | is_among(clusters, self._leaked)
        count = int(np.count_nonzero(refcounts))
        unknown = count - int(np.count_nonzero(has & is_known))
        both = int(np.count_nonzero(has & is_used))
        is_recent = count > 0 and both * _COUNTED_OF >= int(np.count_nonzero(is_used))
        return is_recent and unknown * _KNOWN_OF <= count
