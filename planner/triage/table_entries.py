"""The entries of L2 tables that say anything, in columns.

A table may be a hole for the most part: what is looked for in it costs no more than is there.
Nothing is judged here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planner.arrays import I64, U64, Mask, distinct
from planner.metadata.mapping_tables import TableParts
from planner.qcow2 import entries
from planner.qcow2.geometry import Geometry
from planner.source import Source


@dataclass(frozen=True, slots=True)
class TableEntries:
    """Entries of the tables at ``offset``, a row each, by table and place.

    ``row``: of its table, ``at``: its number there; ``words``, and ``bitmaps`` (with extended L2
    alone). Of those that are not among them nothing is said here.
    """

    offset: I64
    row: I64
    at: I64
    words: U64
    bitmaps: U64 | None

    def select(self, which: Mask) -> TableEntries:
        """Of the same tables the entries *which*."""
        bitmaps = None if self.bitmaps is None else self.bitmaps[which]
        return TableEntries(
            self.offset, self.row[which], self.at[which], self.words[which], bitmaps
        )

    def count(self, which: Mask) -> I64:
        """How many of the entries *which* each table has."""
        return np.bincount(self.row[which], minlength=len(self.offset))


def read_entries(
    source: Source, offsets: I64, geometry: Geometry
) -> Iterator[tuple[I64, TableEntries]]:
    """All entries that are not zero of the tables at ascending *offsets*, many tables at a time.

    Which of the tables, ascending, and their entries. Tables that are not named have none.
    """
    parts = TableParts.of(source, offsets, geometry.cluster_size)
    shift = (parts.size // geometry.l2_entry_size).bit_length() - 1
    for part, rows in parts.read(source):
        words, bitmaps = entries.split_entries(entries.decode_words(rows), geometry.extended_l2)
        says_something = words != 0
        if bitmaps is not None:
            says_something |= bitmaps != 0
        which = np.flatnonzero(says_something)
        tables = distinct(parts.table[part])
        row, first = np.searchsorted(tables, parts.table[part]), parts.inside[part]
        of, inside = which >> shift, which & ((1 << shift) - 1)
        yield (
            tables,
            TableEntries(
                offsets[tables],
                row[of],
                first[of] // geometry.l2_entry_size + inside,
                words.reshape(-1)[which],
                None if bitmaps is None else bitmaps.reshape(-1)[which],
            ),
        )
