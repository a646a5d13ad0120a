"""Whether the words of a table could ever have been entries: what was written over is told by it.

A damaged entry is damage of its own. Where most of what a sector of a table holds could never have
been an entry, the table is gone there: its zeros say nothing either. Words in, masks out; what the
content looks like, and what a loss means, is decided above.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.arrays import I64, U8, U64, Mask, is_any_of
from planner.qcow2 import entries
from planner.qcow2.geometry import Geometry
from planner.source import SECTOR

MIN_WILD = 4
"""So many words of a sector are no entries before it counts as overwritten."""

SLACK = 1 << 30
"""An entry may lead so far behind the image and its disk, and yet have been one: the file is cut
off, or was the file of a larger disk."""


def little_is_left(wild: I64, filled: I64) -> Mask:
    """Where so many of the *filled* words of a sector or a table are *wild* that it is gone."""
    gone: Mask = (wild >= MIN_WILD) & (wild * 2 >= filled)
    return gone


@dataclass(frozen=True, slots=True)
class GoneTables:
    """Tells the overwritten parts of tables of an image, the file of which has ``file_size`` bytes.

    Linear in the words, and on sound tables as fast as memory.
    """

    geometry: Geometry
    file_size: int

    @property
    def _limit(self) -> int:
        return 2 * (self.file_size + self.geometry.virtual_size) + SLACK

    @property
    def beyond(self) -> int:
        """Bits of an offset that are clear wherever an entry beyond doubt leads."""
        top = self._limit.bit_length() - 1
        return entries.L2_OFFSET >> top << top

    def sectors(self, rows: U8, table: I64 | None = None) -> tuple[Mask, Mask]:
        """Which sectors of L2 tables are gone, and which tables as a whole.

        *rows*: uint8 (n, bytes), whole tables; or parts of the tables numbered *table*, (n,)
        ascending, of each all that hold more than zeros. Gives bool (n, sectors), and of each row
        whether its table is gone as a whole, (n,).
        """
        count = len(rows)
        gone = np.zeros((count, rows.shape[1] // SECTOR), dtype=np.bool_)
        whole = np.zeros(count, dtype=np.bool_)
        table = np.arange(count) if table is None else table
        doubtful = np.flatnonzero(is_any_of(table, table[self._are_doubtful(rows)]))
        if len(doubtful):
            gone[doubtful], whole[doubtful] = self._sectors(rows[doubtful], table[doubtful])
        return gone, whole

    def counts(self, rows: U8) -> tuple[I64, I64]:
        """How many sectors of tables, or of parts of them, are gone, and how many hold anything.

        *rows*: uint8 (n, bytes).
        """
        gone = np.zeros(len(rows), dtype=np.int64)
        words = rows.view(np.uint64).reshape(len(rows), -1, SECTOR // 8)
        filled = np.count_nonzero(words.any(axis=2), axis=1)
        doubtful = np.flatnonzero(self._are_doubtful(rows))
        if len(doubtful):
            gone[doubtful], filled[doubtful] = (
                np.count_nonzero(each, axis=1) for each in self._gone_and_filled(rows[doubtful])
            )
        return gone, filled

    def _gone_and_filled(self, rows: U8) -> tuple[Mask, I64]:
        step = self.geometry.l2_entry_size // 8
        words = rows.view(">u8").reshape(len(rows), -1, SECTOR // 8)[:, :, ::step]
        filled = np.count_nonzero(words.view(np.uint64), axis=2)
        # Most words are entries beyond doubt: only the others are decoded.
        at = np.flatnonzero(self._in_doubt(rows.view(np.uint64)[:, ::step]))
        some = words.reshape(-1)[at].astype(np.uint64)
        sector = at[self.wild_l2(some)] // words.shape[2]
        bad = np.bincount(sector, minlength=filled.size).reshape(filled.shape)
        return little_is_left(bad, filled), filled

    def _sectors(self, rows: U8, table: I64) -> tuple[Mask, Mask]:
        gone, filled = self._gone_and_filled(rows)
        # A table of which little else is left is gone as a whole: no zero in it means anything.
        lost, all_ = (np.bincount(table, np.count_nonzero(each, axis=1)) for each in (gone, filled))
        whole: Mask = (lost * 2 > all_)[table]
        gone[whole] = True
        return gone, whole

    def wild_l1(self, words: U64) -> Mask:
        """Which of the words of L1 tables could never have been entries, nor were put there."""
        wild = self._wild(words, entries.L1_RESERVED, packed=False)
        wild &= words != np.uint64(entries.UNREADABLE)
        return wild

    def wild_l2(self, words: U64) -> Mask:
        """Which of the words of L2 tables, without bitmaps, could never have been entries."""
        return self._wild(words, entries.L2_RESERVED, packed=True)

    def is_gone_l1(self, words: U64) -> bool:
        """Whether little else is left of the L1 table that has these words, and else zeros."""
        bad = np.count_nonzero(self.wild_l1(words))
        return bool(little_is_left(np.array(bad), np.array(len(words))))

    def _wild(self, words: U64, reserved: int, *, packed: bool) -> Mask:
        """Which words could never have been entries; 0 could.

        They lead where no cluster can be, or nowhere with reserved bits set. *packed*: whether
        there are compressed ones among them.
        """
        geometry, limit = self.geometry, self._limit
        offset = entries.l2_offsets(words)
        wild: Mask = (offset & (geometry.cluster_size - 1)) != 0
        wild |= offset > limit
        wild |= (offset == 0) & ((words & np.uint64(reserved)) != 0)
        if packed:
            at = np.nonzero(words & np.uint64(entries.COMPRESSED))
            start, _ = entries.compressed_ranges(words[at], geometry)
            wild[at] = start > limit
        return wild

    def _are_doubtful(self, rows: U8) -> Mask:
        """Which L2 tables have a bit that no word has which is an entry beyond doubt."""
        step = self.geometry.l2_entry_size // 8
        words = rows.view(np.uint64)
        return self._in_doubt(
            np.bitwise_or.reduce(words if step == 1 else words[:, ::step], axis=1)
        )

    def _in_doubt(self, words: U64) -> Mask:
        """Which words, as they are in the file, have such a bit."""
        bits = self.beyond | entries.L2_RESERVED | entries.COMPRESSED
        bits |= entries.L2_OFFSET & (self.geometry.cluster_size - 1)
        in_doubt: Mask = (words & np.array(bits, dtype=">u8").view(np.uint64)) != 0
        return in_doubt
