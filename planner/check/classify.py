"""What clusters look like that nothing refers to: tables, refcounts, a snapshot table, data, zeros.

Many clusters a call, by their content alone. What that means for an image is
`planner.triage.triage`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial

import numpy as np

from planner.arrays import I64, U8, U64, Mask
from planner.check.signatures import NAMES, TEXT, recognise
from planner.qcow2 import entries
from planner.qcow2.header import MAX_REFCOUNT_ORDER
from planner.qcow2.layout import MAX_L1_BYTES, Layout
from planner.qcow2.refcounts import unpack_refcounts
from planner.qcow2.snapshots import MAX_EXTRA_DATA
from planner.source import HOLE, SECTOR

SAMPLED_WORDS = 64
"""Words of a cluster that show whether it is worth a closer look."""

DAMAGED_PART = 10
"""A table of whose words one in so many is overwritten is still one."""

MAX_REFCOUNT = 8
"""What a refcount block holds is seldom more than the snapshots that there are, and this."""

MAX_NAME_BYTES = 1024


class Look(IntEnum):
    """What a leaked cluster looks like. An L1 table is told from an L2 table by its targets, an old
    refcount block from what only looks like refcounts by the old refcount table that leads to it.
    """

    UNREAD = 0
    ZEROS = 1
    DATA = 2
    L2_TABLE = 3
    L1_TABLE = 4
    REFBLOCK = 5
    SNAPSHOT_TABLE = 6
    IN_USE = 7
    BITMAP = 8
    REFTABLE = 9
    OLD_REFBLOCK = 10

    @property
    def label(self) -> str:
        return _LABELS[self]


_LABELS = {
    Look.UNREAD: "not looked at",
    Look.ZEROS: "zeros",
    Look.DATA: "data",
    Look.L2_TABLE: "L2 table",
    Look.L1_TABLE: "L1 table",
    Look.REFBLOCK: "refcount block",
    Look.SNAPSHOT_TABLE: "snapshot table",
    Look.IN_USE: "in use, counted too high",
    Look.BITMAP: "bitmap",
    Look.REFTABLE: "refcount table",
    Look.OLD_REFBLOCK: "old refcount block",
}


_SIGNATURE_BITS = 8
_A_TABLE = {
    Look.L2_TABLE: "an L2 table",
    Look.L1_TABLE: "an L1 table",
    Look.REFBLOCK: "a refcount block",
    Look.SNAPSHOT_TABLE: "a snapshot table",
}


def content_name(code: int) -> str:
    """What `Looker.contents` has seen, in words."""
    look, signature = Look(code >> _SIGNATURE_BITS), NAMES[code & (1 << _SIGNATURE_BITS) - 1]
    if look is Look.DATA and signature:
        return signature if signature == TEXT else f"data ({signature})"
    return _A_TABLE.get(look, look.label)


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """What speaks for clusters, or for parts of them, to be L2 tables. One row each.

    ``bad``, ``filled``: how many words could not be entries, and how many are not zero. ``points``:
    whether one leads to a cluster that there is; ``zeros``: whether all say zeros, where that hides
    what a backing file has.
    """

    bad: I64
    filled: I64
    points: Mask
    zeros: Mask

    @classmethod
    def none(cls) -> Parts:
        """No rows."""
        no, nothing = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.bool_)
        return cls(no, no, nothing, nothing)

    @classmethod
    def concatenate(cls, parts: Sequence[Parts]) -> Parts:
        """One after the other; of one at least."""
        return cls(
            np.concatenate([each.bad for each in parts]),
            np.concatenate([each.filled for each in parts]),
            np.concatenate([each.points for each in parts]),
            np.concatenate([each.zeros for each in parts]),
        )

    def joined(self, of: I64, count: int) -> Parts:
        """Of *count* whole clusters; *of*: which of them each row is a part of.

        What of them has no row is zeros.
        """
        bad, filled, points, others = (
            np.bincount(of, column, count).astype(np.int64)
            for column in (self.bad, self.filled, self.points, ~self.zeros)
        )
        return Parts(bad, filled, points > 0, others == 0)

    def are_tables(self) -> Mask:
        """Which hold words that could be entries, and at least one that points, or hides."""
        result: Mask = (self.filled > 0) & (self.points | self.zeros)
        result &= self.bad * DAMAGED_PART <= self.filled
        return result


def filled_columns(words: U64) -> U64:
    """Rows of *words* without the columns that hold zeros alone, where that leaves much fewer."""
    filled = np.flatnonzero(words.any(axis=0))
    return words[:, filled] if 2 * len(filled) < words.shape[1] else words


def filled_blocks(rows: U8) -> tuple[I64, int]:
    """Which blocks hold more than zeros in any of *rows*, and how many bytes a block is.

    *rows*: uint8 (n, bytes), where the bytes are a power of two.
    """
    size = min(HOLE, rows.shape[1])
    blocks = rows.view(np.uint64).reshape(len(rows), -1, size // 8)
    return np.flatnonzero(np.bitwise_or.reduce(blocks, axis=2).any(axis=0)), size


def without_holes(rows: U8) -> U8:
    """*rows* without the blocks that are zeros in all of them, where that leaves much fewer.

    Entries keep their subcluster bitmaps.
    """
    filled, size = filled_blocks(rows)
    if 2 * len(filled) * size >= rows.shape[1]:
        return rows
    return rows.reshape(len(rows), -1, size)[:, filled].reshape(len(rows), -1)


class Looker:
    """Judges clusters of an image of that *layout*, with so many *snapshots*.

    *counted_end*: behind the last cluster that has a refcount, where that is past the file's end.
    A table may lead there still, if the file was cut off.
    """

    def __init__(self, layout: Layout, snapshots: int, counted_end: int = 0) -> None:
        self._geometry = layout.geometry
        self._end, self._clusters = layout.file_size, layout.host_clusters
        self.reach = max(self._end, counted_end << layout.geometry.cluster_bits)
        # Without it nothing is lost with a table of zeros, which looks like refcounts as well.
        self._has_backing = bool(layout.header.backing_file_offset)
        self._max_refcount = MAX_REFCOUNT + snapshots

    def contents(self, rows: U8) -> I64:
        """What is in clusters, or in the first sectors of something; see `content_name`, (n,)."""
        look, signature = self.look(np.ascontiguousarray(rows))
        return look.astype(np.int64) << _SIGNATURE_BITS | signature

    def look(self, rows: U8, positions: I64 | None = None) -> tuple[U8, U8]:
        """The `Look` of clusters, and which of `signatures.NAMES` their data begins with, uint8.

        *rows*: whole clusters, uint8 (n, cluster size); or of each the words at these *positions*,
        ascending, among them all up to `signatures.REACH`, where the others are zeros.
        """
        look = np.full(len(rows), Look.DATA, dtype=np.uint8)
        signature = np.zeros(len(rows), dtype=np.uint8)
        look[~rows.view(np.uint64).any(axis=1)] = Look.ZEROS
        for sort, is_one in (
            (Look.L2_TABLE, partial(self._are_tables, positions=positions)),
            (Look.REFBLOCK, self._are_refblocks),
            (Look.SNAPSHOT_TABLE, self._are_snapshot_tables),
        ):
            at = np.flatnonzero(look == Look.DATA)
            look[at[is_one(rows, at)]] = sort
        at = np.flatnonzero(look == Look.DATA)
        if len(at):
            signature[at] = recognise(rows if len(at) == len(rows) else rows[at])
        return look, signature

    def may_be_tables(self, sectors: U8) -> Mask:
        """Which clusters are worth reading, by their first sectors, uint8 (n, 512)."""
        words = entries.decode_words(sectors)[:, :: 2 if self._geometry.extended_l2 else 1]
        return self._mostly_plausible(words) & words.any(axis=1)

    def parts(self, rows: U8) -> Parts:
        """What speaks for each to be an L2 table, or a part of one, and nothing more is asked.

        *rows*: whole clusters or parts of them, uint8 (n, bytes).
        """
        return self._parts(rows, np.flatnonzero(rows.view(np.uint64).any(axis=1)))

    def table_words(self, rows: U8) -> U64:
        """The entries of tables, uint64 (n, cluster size / 8); zero where subcluster bitmaps are.

        An L1 table has no bitmaps, whatever the L2 tables have.
        """
        words = entries.decode_words(rows)
        if self._geometry.extended_l2:
            misaligned = entries.L1_OFFSET & (self._geometry.cluster_size - 1)
            is_l1 = ((words & np.uint64(entries.L1_RESERVED | misaligned)) == 0).all(axis=1)
            words[~is_l1, 1::2] = 0
        return words

    def plausible(self, words: U64) -> Mask:
        """Which words could be entries: what they lead to is counted. Shape of *words*."""
        geometry = self._geometry
        unusual = entries.L2_RESERVED | entries.L2_OFFSET & (geometry.cluster_size - 1)
        whole = (words & np.uint64(unusual)) == 0
        whole &= entries.l2_offsets(words) < self.reach
        packed = (words & np.uint64(entries.COMPRESSED)) != 0
        if packed.any():
            start, length = entries.compressed_ranges(words, geometry)
            whole = np.where(packed, start + length < self.reach + geometry.cluster_size, whole)
        result: Mask = whole
        return result

    def are_own(self, words: U64, plausible: Mask) -> Mask:
        """Which of *plausible* words lead to a cluster that is their disk's alone: COPIED."""
        own: Mask = plausible & (words >= np.uint64(entries.COPIED))
        own &= (words & np.uint64(entries.COMPRESSED)) == 0
        return own

    def targets(self, words: U64, plausible: Mask) -> I64:
        """The cluster that each *plausible* word points at, int64, shape of *words*; 0: none that
        the file has.
        """
        offset = entries.l2_offsets(words)
        packed = (words & np.uint64(entries.COMPRESSED)) != 0
        if packed.any():
            start, _ = entries.compressed_ranges(words, self._geometry)
            offset = np.where(packed, start, offset)
        offset >>= self._geometry.cluster_bits
        offset[~plausible | (offset >= self._clusters)] = 0
        return offset

    def _are_tables(self, rows: U8, at: I64, positions: I64 | None) -> Mask:
        """Which of the rows *at* look like L2 tables."""
        return self._parts(rows, at, positions).are_tables()[at]

    def _parts(self, rows: U8, at: I64, positions: I64 | None = None) -> Parts:
        """What speaks for the rows *at*; of the others it is as if they were zeros."""
        count, words = len(rows), rows.view(">u8")
        bad, filled = np.zeros((2, count), dtype=np.int64)
        points, zeros = np.zeros(count, dtype=np.bool_), np.ones(count, dtype=np.bool_)
        if positions is None:
            sample = words[:, :: max(1, words.shape[1] // SAMPLED_WORDS)]
        else:  # the same words, but for those that are zeros
            step = max(1, self._geometry.cluster_size // 8 // SAMPLED_WORDS)
            sample = words[:, positions % step == 0]
        likely = self._mostly_plausible(sample[at].astype(np.uint64))
        bad[at[~likely]] = filled[at[~likely]] = words.shape[1]
        zeros[at] = False
        at = at[likely]
        if len(at):
            rows = without_holes(rows if len(at) == count else rows[at])
            words = filled_columns(self.table_words(rows))
            plausible = self.plausible(words)
            bad[at] = np.count_nonzero(~plausible, axis=1)
            filled[at] = np.count_nonzero(words, axis=1)
            points[at] = self.targets(words, plausible).any(axis=1)
            if self._has_backing:
                zeros[at] = self._say_zeros(rows)
        return Parts(bad, filled, points, zeros)

    def _say_zeros(self, rows: U8) -> Mask:
        """Which hold nothing but entries that say zeros, without a cluster; and some of these."""
        words = entries.decode_words(rows)
        allowed = entries.ZERO
        if self._geometry.extended_l2:
            words, bitmaps = words[:, 0::2], words[:, 1::2]
            words, allowed = words | bitmaps, entries.SUBCLUSTERS_ZERO
        elif self._geometry.refcount_order == MAX_REFCOUNT_ORDER:
            return np.zeros(len(rows), dtype=np.bool_)  # They look like refcounts all through.
        zeros: Mask = ((words & ~np.uint64(allowed)) == 0).all(axis=1)
        return zeros

    def _mostly_plausible(self, sample: U64) -> Mask:
        bad = np.count_nonzero(~self.plausible(sample), axis=1)
        mostly: Mask = bad * 2 <= np.count_nonzero(sample, axis=1)
        return mostly

    def _are_refblocks(self, rows: U8, at: I64) -> Mask:
        """Which hold small numbers only. Refcounts narrower than a byte look like anything."""
        result = np.zeros(len(at), dtype=np.bool_)
        order = self._geometry.refcount_order
        if order < 3 or not len(at):
            return result
        for part in (rows[at, :SECTOR], None):
            values = unpack_refcounts(rows[at] if part is None else part, order)
            result = np.logical_and.reduce(values <= self._max_refcount, axis=1)
            if not result.any():
                break
        return result

    def _are_snapshot_tables(self, rows: U8, at: I64) -> Mask:
        """Which begin with an entry of a snapshot table. Source: qcow2.txt, "Snapshots"."""
        head = entries.decode_words(np.ascontiguousarray(rows[at, :40]))
        offset, sizes, extra = head[:, 0], head[:, 1], head[:, 4] & np.uint64(0xFFFF_FFFF)
        l1_size, id_size = sizes >> np.uint64(32), sizes >> np.uint64(16) & np.uint64(0xFFFF)
        good: Mask = (offset != 0) & (offset < self._end)
        good &= (offset & np.uint64(self._geometry.cluster_size - 1)) == 0
        good &= (l1_size != 0) & (l1_size <= MAX_L1_BYTES // 8)
        good &= (id_size != 0) & (id_size <= MAX_NAME_BYTES)
        good &= (sizes & np.uint64(0xFFFF) <= MAX_NAME_BYTES) & (extra <= MAX_EXTRA_DATA)
        return good
