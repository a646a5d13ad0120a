"""Refcounts corrected in place, in the refcount blocks that are sound.

Raising comes in an earlier stage than lowering: at no moment is a cluster in use protected less
than before. Which clusters, and to what, the report's comparison says.
"""

from __future__ import annotations

import numpy as np

from planner.arrays import I64, U8, Counts, is_among
from planner.errors import RefcountExhausted
from planner.findings.kinds import FindingKind, Structure
from planner.metadata.refcounts import Reftable
from planner.qcow2.geometry import Geometry
from planner.qcow2.refcounts import pack_refcounts, unpack_refcounts
from planner.repair.draft import equal_rows
from planner.repair.plan import StageKind
from planner.repair.scope import Scope
from planner.source import SECTOR, read_tables

RAISED = (FindingKind.REFCOUNT_MISSING, FindingKind.REFCOUNT_LOW)

DAMAGED_STRUCTURE = (
    FindingKind.REFTABLE_ENTRY_RESERVED,
    FindingKind.REFBLOCK_MISALIGNED,
    FindingKind.REFBLOCK_SHARED,
    FindingKind.REFBLOCK_PAST_END,
    FindingKind.REFCOUNT_UNREADABLE,
)
"""What is wrong with the structure that holds refcounts, rather than with one of them."""


def reclaim_leaks_in_refblocks(scope: Scope, stay: I64) -> None:
    """Lower the refcount of every leaked cluster to its references, but for those that *stay*."""
    _Corrector(scope, (FindingKind.LEAK,), stay, kept=stay[:0]).run()


def correct_refcounts_in_refblocks(scope: Scope, stay: I64, kept: I64) -> None:
    """Set every wrong refcount to the number of references, but for the clusters that *stay*.

    Those in *kept*, which nothing refers to, are counted once.
    """
    _Corrector(scope, (*RAISED, FindingKind.LEAK), stay, kept).run()


def must_rebuild(scope: Scope, stay: I64) -> bool:
    """Whether the refcount structure is damaged, or a wrong cluster that does not *stay* has none.

    Then refcounts cannot be corrected in place.
    """
    damaged = any(kind in scope.report.counts() for kind in DAMAGED_STRUCTURE)
    lost = scope.report.findings.of(FindingKind.PAST_END, Structure.REFTABLE)
    return damaged or len(lost) > 0 or not _refblocks_cover(scope, stay)


def _refblocks_cover(scope: Scope, stay: I64) -> bool:
    """Whether all wrong clusters but those that *stay* have a block that may be written."""
    per_block = scope.geometry.refblock_entries
    blocks = scope.mismatches.blocks(per_block, *RAISED, FindingKind.LEAK)
    writable = writable_refblocks(scope, blocks)[0]
    for block in np.setdiff1d(blocks, writable, assume_unique=True).tolist():
        wrong = scope.mismatches.between(block * per_block, (block + 1) * per_block)[0]
        if not is_among(wrong, stay).all():
            return False
    return True


def writable_refblocks(scope: Scope, blocks: I64) -> tuple[I64, I64]:
    """Those of *blocks* (refcount table indices) that may be written, and their host offsets.

    A block may be written that can be read, lies in the file, and has no other owner.
    """
    table = Reftable(scope.source, scope.layout)
    sound = table.blocks()
    cluster = table.offset[sound] >> scope.geometry.cluster_bits
    keep = ~table.reserved[sound] & (cluster < scope.layout.host_clusters)
    sound = sound[keep & ~scope.contested(cluster)]
    at = np.searchsorted(table.index[sound], blocks)
    there = np.flatnonzero(at < len(sound))
    there = there[table.index[sound[at[there]]] == blocks[there]]
    return blocks[there], table.offset[sound[at[there]]]


def set_refcounts_in_block(
    refcounts: Counts, indices: I64, values: Counts, geometry: Geometry
) -> None:
    """Set refcounts[indices] = values. Raises `RefcountExhausted` where one does not fit."""
    highest = int(values.max(initial=0))
    if highest > geometry.refcount_max:
        raise RefcountExhausted(
            f"a cluster has {highest} references, and the refcounts of this image end at"
            f" {geometry.refcount_max}",
            "export the disk, and make an image with wider ones of it",
        )
    refcounts[indices] = values.astype(refcounts.dtype)


class _Corrector:
    """Drafts new contents of refcount blocks for the wrong clusters of some kinds."""

    def __init__(self, scope: Scope, kinds: tuple[FindingKind, ...], stay: I64, kept: I64) -> None:
        self._scope, self._kinds, self._stay, self._kept = scope, kinds, stay, kept
        self._order = scope.geometry.refcount_order
        self._per_block = scope.geometry.refblock_entries

    def run(self) -> None:
        wanted = self._scope.mismatches.blocks(self._per_block, *self._kinds)
        blocks, offsets = writable_refblocks(self._scope, wanted)
        order = np.argsort(offsets)
        blocks, offsets = blocks[order], offsets[order]
        size = self._scope.geometry.cluster_size
        for part, rows in read_tables(self._scope.source, offsets, size):
            self._correct(blocks[part], offsets[part], rows)

    def _correct(self, blocks: I64, offsets: I64, rows: U8) -> None:
        """Draft the blocks of one batch: first only what rises, then everything."""
        refcounts = unpack_refcounts(rows, self._order).copy()
        final, geometry = refcounts.copy(), self._scope.geometry
        touched = np.zeros(len(blocks), dtype=np.bool_)
        for row, (block, offset) in enumerate(zip(blocks.tolist(), offsets.tolist(), strict=True)):
            first = block * self._per_block
            cluster, kind, _, counted = self._scope.mismatches.between(
                first, first + self._per_block
            )
            chosen = np.isin(kind, np.array(self._kinds, dtype=np.uint8))
            chosen &= ~is_among(cluster, self._stay)
            touched[row] = chosen.any()
            index, kind, counted = cluster[chosen] - first, kind[chosen], counted[chosen]
            rising = kind != FindingKind.LEAK
            set_refcounts_in_block(refcounts[row], index[rising], counted[rising], geometry)
            set_refcounts_in_block(final[row], index, counted, geometry)
            kept = self._kept_in(first)
            refcounts[row][kept] = final[row][kept] = 1
            self._explain(offset, index, kind)
            self._explain(offset, kept, np.full(len(kept), FindingKind.LEAK, dtype=np.uint8))
        if not touched.any():
            return
        was, raised, final = (
            blocks.reshape(-1, SECTOR)
            for blocks in (
                rows[touched],
                pack_refcounts(refcounts[touched], self._order),
                pack_refcounts(final[touched], self._order),
            )
        )
        draft = self._scope.draft
        offset = (offsets[touched][:, None] + np.arange(0, rows.shape[1], SECTOR)).reshape(-1)
        rises, falls = ~equal_rows(was, raised), ~equal_rows(raised, final)
        # What an earlier step has drafted of a sector for the later stage would hold there.
        falls |= rises & draft.touches(StageKind.CORRECT, offset // SECTOR)
        draft.write_tables(StageKind.PREPARE, offset[rises], raised[rises])
        draft.write_tables(StageKind.CORRECT, offset[falls], final[falls])

    def _kept_in(self, first: int) -> I64:
        """Which of the kept clusters have their refcounts in the block of cluster *first*."""
        low, high = np.searchsorted(self._kept, (first, first + self._per_block))
        return self._kept[low:high] - first

    def _explain(self, offset: int, index: I64, kind: U8) -> None:
        """One edit for each run of neighbours of one kind."""
        new = np.ones(len(index), dtype=np.bool_)
        new[1:] = (np.diff(index) != 1) | (kind[1:] != kind[:-1])
        starts = np.flatnonzero(new)
        lengths = np.diff(starts, append=len(index))
        bits = 1 << self._order
        for each in self._kinds:
            runs = np.flatnonzero(kind[starts] == each)
            if not len(runs):
                continue
            first = index[starts[runs]] * bits
            last = first + lengths[runs] * bits - 1
            places = (offset + first // 8, last // 8 - first // 8 + 1, lengths[runs])
            stage = StageKind.CORRECT if each is FindingKind.LEAK else StageKind.PREPARE
            self._scope.explain_runs(stage, Structure.REFBLOCK, each, places)
