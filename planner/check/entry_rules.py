"""What can be wrong with an L1 or L2 entry, each rule once: a table of kinds and predicates.

The refcount walk reports by it, whatever shows a table entry by entry marks by it, and a repair
knows from here what an entry should be instead. A predicate looks at the entry, at where the file
ends and at the stored refcounts: what only shows when all references are counted is not here.
Source: docs/interop/qcow2.txt; check_refcounts_l1, check_refcounts_l2 and check_oflag_copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from planner.arrays import I64, U64, Mask
from planner.findings.kinds import FindingKind, Structure
from planner.metadata.refcounts import StoredRefcounts
from planner.qcow2 import entries
from planner.qcow2.entries import L2Entries
from planner.qcow2.geometry import SECTOR, SUBCLUSTERS_PER_CLUSTER
from planner.qcow2.layout import Layout

# ---- what a predicate is asked about ----


@dataclass(frozen=True)
class L1Columns:
    """Words of L1 tables, uint64, in the image that they stand in."""

    layout: Layout
    stored: StoredRefcounts
    word: U64

    @cached_property
    def offset(self) -> I64:
        """Of the L2 table that each leads to, bytes; 0: to none."""
        return entries.l1_offsets(self.word)

    @property
    def copied(self) -> Mask:
        return self.word >= np.uint64(entries.COPIED)

    @property
    def is_misaligned(self) -> Mask:
        misaligned: Mask = (self.offset & (self.layout.geometry.cluster_size - 1)) != 0
        return misaligned

    @property
    def is_past_end(self) -> Mask:
        return self.layout.is_past_end(self.offset, self.layout.geometry.cluster_size)

    @property
    def copied_is_wrong(self) -> Mask:
        """Where the COPIED flag contradicts the refcount of a table."""
        clusters = self.offset >> self.layout.geometry.cluster_bits
        is_one, unreadable = self.stored.is_one(clusters), self.stored.unreadable(clusters)
        wrong = contradicts_refcount(self.copied, is_one, unreadable)
        wrong &= self.offset != 0
        return wrong


@dataclass(frozen=True)
class L2Columns(L2Entries):
    """L2 entries in the image that they stand in."""

    layout: Layout
    stored: StoredRefcounts

    @classmethod
    def of(
        cls, word: U64, bitmap: U64 | None, layout: Layout, stored: StoredRefcounts
    ) -> L2Columns:
        """*bitmap*: None where entries are not extended."""
        return cls(layout.geometry, word, entries.bitmaps_of(word, bitmap), layout, stored)

    @cached_property
    def data(self) -> I64:
        """Positions of those that have a cluster."""
        return np.flatnonzero(self.has_cluster)

    @cached_property
    def is_counted(self) -> Mask:
        """Which refer to something in this file."""
        if self.geometry.external_data:
            return self.nowhere
        counted: Mask = self.is_compressed & (self.bitmap == 0)
        counted |= self.has_cluster
        return counted

    @cached_property
    def is_past_end(self) -> Mask:
        """Which refer to what this file has not."""
        return self.is_counted & self.layout.is_past_end(self.offset, self.size)

    @property
    def copied_is_wrong(self) -> Mask:
        """Where the COPIED flag contradicts the refcount of a data cluster."""
        if self.geometry.external_data:  # Nobody else has clusters there: their refcount is 1.
            return self.has_cluster & ~self.copied
        wrong, at = self.nowhere.copy(), self.data
        clusters = self.offset[at] >> self.geometry.cluster_bits
        is_one, unreadable = self.stored.is_one(clusters), self.stored.unreadable(clusters)
        wrong[at] = contradicts_refcount(self.copied[at], is_one, unreadable)
        return wrong

    # ---- where the file ends; how much of it is needed depends on where an entry stands ----

    @property
    def bytes_past_end(self) -> I64:
        """How much further they reach than the file; negative where it goes on."""
        return self.offset + self.size - self.layout.file_size

    @property
    def is_cut_data(self) -> Mask:
        """Data clusters that the file ends in."""
        past = self.bytes_past_end
        begins_inside = (past > 0) & (past < self.geometry.cluster_size)
        return begins_inside & self.is_counted & self.has_cluster & ~self.is_misaligned

    @property
    def is_cut_compressed(self) -> Mask:
        """Compressed clusters that the file ends in, but for the last sector that they claim.

        Their data ends somewhere in that one: QEMU's files end with the data.
        """
        cut = (self.bytes_past_end >= SECTOR) & self.is_counted
        return cut & self.is_compressed & ~self.is_past_end

    def bytes_needed(self, which: I64) -> I64:
        """How much of their clusters entries need: up to the last byte that the guest can read.

        QEMU writes data clusters whole, but of one with subclusters only those in use.
        """
        size = self.geometry.cluster_size
        if not self.geometry.extended_l2:
            return np.where(self.holds_data[which], size, 0)
        allocated = self.bitmap[which] & np.uint64(entries.SUBCLUSTERS_ALLOCATED)
        _, highest = np.frexp(allocated.astype(np.float64))
        return highest.astype(np.int64) * (size // SUBCLUSTERS_PER_CLUSTER)


def contradicts_refcount(copied: Mask, is_one: Mask, unreadable: Mask | None) -> Mask:
    """Where the COPIED flag does not say whether a refcount *is_one*, and that can be looked up."""
    wrong: Mask = is_one != copied
    return wrong if unreadable is None else wrong & ~unreadable


# ---- the rules ----

_Columns = TypeVar("_Columns")
_Found = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Rule(Generic[_Columns]):
    """``breaks``: which entries have a finding of ``kind`` about ``structure``. ``found``: what is
    told of each.
    """

    kind: FindingKind
    breaks: Callable[[_Columns], Mask]
    found: Callable[[_Columns], _Found]
    structure: Structure = Structure.L2_TABLE


def _word(columns: L1Columns | L2Columns) -> _Found:
    return columns.word


def _offset(columns: L1Columns | L2Columns) -> _Found:
    return columns.offset


def _copied(columns: L1Columns | L2Columns) -> _Found:
    return columns.copied


def _bitmap(columns: L2Columns) -> _Found:
    return columns.bitmap


L1_RULES: tuple[Rule[L1Columns], ...] = (
    Rule(
        FindingKind.L1_ENTRY_RESERVED,
        lambda entry: (entry.word & np.uint64(entries.L1_RESERVED)) != 0,
        _word,
        Structure.L1_TABLE,
    ),
    Rule(
        FindingKind.L2_TABLE_MISALIGNED,
        lambda entry: entry.is_misaligned,
        _offset,
        Structure.L1_TABLE,
    ),
    Rule(FindingKind.L1_COPIED, lambda entry: entry.copied_is_wrong, _copied, Structure.L1_TABLE),
    Rule(FindingKind.PAST_END, lambda entry: entry.is_past_end, _offset),
)
"""Of L1 entries; the COPIED flag counts in the active table alone. What lies past the end is a
table: a check tells of it once, however many entries lead there."""

L2_RULES: tuple[Rule[L2Columns], ...] = (
    Rule(FindingKind.L2_ENTRY_RESERVED, lambda entry: entry.has_reserved_bits, _word),
    Rule(FindingKind.ZERO_IN_VERSION_2, lambda entry: entry.is_zero_in_version_2, _word),
    Rule(
        FindingKind.UNALLOCATED_SUBCLUSTERS,
        lambda entry: entry.has_subclusters_without_cluster,
        _bitmap,
    ),
    Rule(FindingKind.COMPRESSED_COPIED, lambda entry: entry.is_compressed & entry.copied, _word),
    Rule(FindingKind.COMPRESSED_WITH_DATA_FILE, lambda entry: entry.is_compressed_elsewhere, _word),
    Rule(
        FindingKind.COMPRESSED_SUBCLUSTERS,
        lambda entry: entry.is_compressed & ~entry.is_counted & ~entry.is_compressed_elsewhere,
        _bitmap,
    ),
    Rule(FindingKind.SUBCLUSTER_CONFLICT, lambda entry: entry.has_subcluster_conflict, _bitmap),
    Rule(
        FindingKind.DATA_MISALIGNED, lambda entry: entry.is_misaligned & entry.holds_data, _offset
    ),
    Rule(
        FindingKind.ZERO_MISALIGNED, lambda entry: entry.is_misaligned & ~entry.holds_data, _offset
    ),
    Rule(
        FindingKind.PAST_END,
        lambda entry: entry.has_cluster & entry.is_past_end,
        _offset,
        Structure.DATA,
    ),
    Rule(
        FindingKind.PAST_END,
        lambda entry: entry.is_compressed & entry.is_past_end,
        _offset,
        Structure.COMPRESSED,
    ),
    Rule(FindingKind.L2_COPIED, lambda entry: entry.copied_is_wrong, _copied),
)
"""Of L2 entries; the COPIED flag counts in tables of the active disk alone."""

_WRONG_BITS = {
    FindingKind.L1_ENTRY_RESERVED: np.uint64(entries.L1_RESERVED),
    FindingKind.L2_ENTRY_RESERVED: np.uint64(entries.L2_RESERVED),
    FindingKind.COMPRESSED_COPIED: np.uint64(entries.COPIED),
}
"""What an entry must not have set."""


def expected(kind: FindingKind, found: _Found) -> _Found:
    """What entries with a finding of *kind* should have instead of what was *found*; 0: unknown."""
    if kind in (FindingKind.L1_COPIED, FindingKind.L2_COPIED):
        return ~found
    return found & ~_WRONG_BITS[kind] if kind in _WRONG_BITS else np.zeros_like(found)


# ---- entry by entry ----


def judge_l1(words: U64, layout: Layout, stored: StoredRefcounts) -> U64:
    """Of words of the active L1 table the bits of the kinds of their findings, uint64."""
    return _bits(L1_RULES, L1Columns(layout, stored, words), len(words))


def judge_l2(words: U64, bitmaps: U64 | None, layout: Layout, stored: StoredRefcounts) -> U64:
    """The same of L2 entries of the active disk, and their subcluster *bitmaps*."""
    return _bits(L2_RULES, L2Columns.of(words, bitmaps, layout, stored), len(words))


def _bits(rules: Iterable[Rule[_Columns]], columns: _Columns, count: int) -> U64:
    found = np.zeros(count, dtype=np.uint64)
    for rule in rules:
        found[rule.breaks(columns)] |= np.uint64(1 << rule.kind)
    return found
