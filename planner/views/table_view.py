"""The active L1 table, and any one L2 table of it, as they stand: read when somebody looks at them.

No check is needed: each entry is judged by itself, see `planner.check.entry_rules`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.arrays import I64, U64
from planner.check.entry_rules import judge_l1, judge_l2
from planner.findings.kinds import FindingKind
from planner.metadata.refcounts import Reftable, StoredRefcounts
from planner.qcow2 import entries
from planner.qcow2.layout import Layout
from planner.source import Source, nonzero_words, read_bytes


@dataclass(frozen=True, slots=True)
class L1Page:
    """The words of the active L1 table that are not zero, in columns; ``index`` ascends.

    ``findings``: bits of `FindingKind`, one number a word.
    """

    layout: Layout
    index: I64
    words: U64
    findings: U64

    @property
    def offset(self) -> I64:
        """Host offsets of the L2 tables."""
        return entries.l1_offsets(self.words)

    @property
    def in_use(self) -> I64:
        """The L1 indices that lead to an L2 table."""
        used: I64 = self.index[self.offset != 0]
        return used

    def leads(self, index: int) -> bool:
        """Whether an L1 index leads to an L2 table."""
        at = int(np.searchsorted(self.index, index))
        there = at < len(self.index) and self.index[at] == index
        return bool(there and self.words[at] & np.uint64(entries.L1_OFFSET))


@dataclass(frozen=True, slots=True)
class L2Page:
    """All entries of the L2 table that an L1 entry leads to; without one, they are zeros.

    ``l1_word``, ``l1_findings``: that entry. ``words``, ``findings``: uint64, one an entry.
    ``bitmaps``: of extended L2 entries, else None.
    """

    layout: Layout
    l1_index: int
    l1_word: int
    l1_findings: int
    words: U64
    bitmaps: U64 | None
    findings: U64

    @property
    def offset(self) -> int:
        """Host offset of the table; 0: there is none."""
        return self.l1_word & entries.L1_OFFSET


def read_l1_page(source: Source) -> L1Page:
    """The active L1 table. Raises `ImageError` where the header does not say where it is."""
    layout = Layout.read(source)
    index, words = nonzero_words(source, layout.header.l1_table_offset, layout.header.l1_size)
    findings = judge_l1(words, layout, _stored(source, layout))
    offset = entries.l1_offsets(words)
    _, which, times = np.unique(offset, return_inverse=True, return_counts=True)
    shared = (times[which.reshape(-1)] > 1) & (offset != 0)
    findings[shared] |= np.uint64(1 << FindingKind.MULTIPLE_OWNERS)
    return L1Page(layout, index, words, findings)


def read_l2_page(source: Source, l1_index: int) -> L2Page:
    """The L2 table at an index of the active L1 table. Raises `ImageError` as `read_l1_page`."""
    layout = Layout.read(source)
    geometry, stored = layout.geometry, _stored(source, layout)
    word = np.zeros(1, dtype=np.uint64)
    if l1_index < layout.header.l1_size:
        raw = read_bytes(source, layout.header.l1_table_offset + 8 * l1_index, 8)
        word[0] = int.from_bytes(raw, "big")
    offset = int(word[0]) & entries.L1_OFFSET
    table = read_bytes(source, offset, geometry.cluster_size) if offset else b""
    rows = np.frombuffer(table.ljust(geometry.cluster_size, b"\0"), dtype=np.uint8)
    words, bitmaps = entries.split_entries(
        entries.decode_words(rows.reshape(1, -1)), geometry.extended_l2
    )
    bitmap = None if bitmaps is None else bitmaps[0]
    return L2Page(
        layout=layout,
        l1_index=l1_index,
        l1_word=int(word[0]),
        l1_findings=int(judge_l1(word, layout, stored)[0]),
        words=words[0],
        bitmaps=bitmap,
        findings=judge_l2(words[0], bitmap, layout, stored),
    )


def _stored(source: Source, layout: Layout) -> StoredRefcounts:
    """Stored refcounts that are looked up one by one."""
    return StoredRefcounts(source, layout, Reftable(source, layout))
