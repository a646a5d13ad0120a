"""A new refcount structure, past the end of the file, for an image whose own is damaged.

Refcounts come from the census alone. The old table and blocks are left as they are and become
free. Follows rebuild_refcount_structure in what it computes, not in where it writes: QEMU takes the
first free clusters, which may be evidence. On a block device, which does not grow, it goes behind
all that is used.
"""

from __future__ import annotations

import struct

import numpy as np

from planner.arrays import I64, U8, U64, Counts, distinct, expand_ranges, without_repeats
from planner.check.refcount_comparison import CHUNK, Mismatches
from planner.check.report import Report
from planner.errors import UnsupportedRepair
from planner.findings.kinds import FindingKind, Structure
from planner.qcow2.layout import MAX_REFTABLE_BYTES
from planner.qcow2.refcounts import pack_refcounts
from planner.repair.plan import StageKind
from planner.repair.scope import Scope
from planner.source import READABLE_END

FILLED = 1 << 18
"""Refcounts of new blocks that are filled in at a time, or those of a block that has more."""

REFTABLE_OFFSET_AT = 48
"""Where the header holds refcount_table_offset, and after it refcount_table_clusters."""


_REASONS = (
    FindingKind.REFBLOCK_MISALIGNED,
    FindingKind.REFTABLE_ENTRY_RESERVED,
    FindingKind.REFBLOCK_PAST_END,
    FindingKind.REFBLOCK_SHARED,
    FindingKind.REFCOUNT_UNREADABLE,
    FindingKind.PAST_END,
    FindingKind.REFCOUNT_MISSING,
    FindingKind.REFCOUNT_LOW,
    # Where a block that many entries lead to is all that is wrong, in refcounts of a bit.
    FindingKind.REFCOUNT_OVERFLOW,
    FindingKind.LEAK,
)
"""What is wrong with a refcount structure, the worst first."""


def what_is_wrong(report: Report) -> FindingKind:
    """The worst that is wrong with the refcount structure, of an image in which something is."""
    counts = report.counts()
    return next(each for each in _REASONS if each in counts)


def rebuild_refcount_structure(scope: Scope, stay: I64, kept: I64) -> None:
    """Draft a new refcount table and its blocks; clusters that *stay* keep their refcount.

    Those in *kept*, whose refcounts are lost and which nothing refers to, are counted once.
    """
    if not scope.may_grow_for_refcounts:
        raise UnsupportedRepair(
            "new refcounts would make the file grow over offsets past its end that the image"
            " refers to: what is lost would look as if it were there",
            "export the disk",
            FindingKind.PAST_END.label,
        )
    refcounts = _wanted_refcounts(scope, stay)
    size, per_block = scope.geometry.cluster_size, scope.geometry.refblock_entries
    first = scope.first_new_cluster
    used = distinct(np.concatenate((_blocks_in_use(scope, refcounts), kept // per_block)))
    blocks, table_clusters = _allocate(used, first, size, per_block)
    end = first + len(blocks) + table_clusters
    offsets = (first + np.arange(len(blocks))) * size
    table_offset = (first + len(blocks)) * size
    if not scope.make_room(end * size):
        raise _no_room(scope, end)
    _draft_blocks(scope, refcounts, kept, blocks, offsets, new=range(first, end))
    words = np.zeros(table_clusters * size // 8, dtype=">u8")
    words[blocks] = offsets
    rows = words.view(np.uint8).reshape(1, -1)
    scope.draft.write_tables(StageKind.PREPARE, np.array([table_offset]), rows)
    pointer = struct.pack(">QI", table_offset, table_clusters)
    scope.draft.write(StageKind.SWITCH, REFTABLE_OFFSET_AT, pointer)
    _explain(scope, offsets, table_offset, rows.size)


def _no_room(scope: Scope, end: int) -> UnsupportedRepair:
    """Why new refcounts up to cluster *end* have no room on a block device, and what makes some."""
    size, filled, there = scope.geometry.cluster_size, scope.filled_behind, scope.draft.size
    reason = f"new refcounts would reach up to {end * size}"
    wayout = f"make the device larger, by {end * size - there} bytes or more"
    if filled:
        start = (scope.first_new_cluster - filled) * size
        reason += (
            f", behind what lies behind the image from {start} on: it may be of it, and is not"
            " overwritten"
        )
        if (end - filled) * size <= there:
            wayout += f"; or save what lies there, and zero it (blkdiscard -z -o {start})"
    reason += f"; a block device of {there} bytes does not grow"
    return UnsupportedRepair(reason, f"{wayout}; or export the disk")


def _wanted_refcounts(scope: Scope, stay: I64) -> Counts:
    """The refcount of every slot, without the old refcount structure."""
    mismatches, report, bits = scope.mismatches, scope.report, scope.geometry.cluster_bits
    index, stored = mismatches.index, mismatches.stored
    # As wide as all that is put in: sixteen million of them are no more than the census had.
    counted = mismatches.counted.astype(np.result_type(mismatches.counted, stored.dtype))
    freed = np.zeros(index.slots, dtype=np.bool_)
    is_old = np.isin(report.regions.structure, (Structure.REFTABLE, Structure.REFBLOCK))
    regions = report.regions.select(is_old)
    slots, known = index.find(expand_ranges(regions.first(bits), regions.last(bits)))
    old, over = slots[known], report.findings.of(FindingKind.REFCOUNT_OVERFLOW)
    full, all_of_them = _beyond_width(mismatches, over.host_offset >> bits, over.count, old)
    np.subtract.at(counted, old, counted.dtype.type(1))
    # A cluster with more references than the width can count stays full, and stays named.
    limit = min(scope.geometry.refcount_max, int(np.iinfo(counted.dtype).max))
    counted[full] = np.minimum(all_of_them, np.uint64(limit)).astype(counted.dtype)
    freed[old] = True
    # A table that reaches past the end was not counted, and is none any more all the same.
    for lost in report.findings.of(FindingKind.PAST_END, Structure.REFTABLE).rows():
        end = lost.host_offset + lost.length
        freed[
            index.slots_before(lost.host_offset >> bits) : index.slots_before(-(-end >> bits))
        ] = True
    slots, known = index.find(stay)
    slots = slots[known]
    counted[slots] = np.where(freed[slots], counted[slots], stored[slots])
    if limit < int(np.iinfo(counted.dtype).max):
        np.minimum(counted, counted.dtype.type(limit), out=counted)
    return counted


def _beyond_width(mismatches: Mismatches, clusters: I64, more: I64, old: I64) -> tuple[I64, U64]:
    """The slots of *clusters* that are full, and all references that each has: *more* than counted,
    without those of the *old* slots. They are few, and the table of all counts stays narrow.
    """
    slots, known = mismatches.index.find(clusters)
    slots, old = slots[known], np.sort(old)
    gone = np.searchsorted(old, slots, side="right") - np.searchsorted(old, slots)
    return slots, mismatches.counted[slots].astype(np.uint64) + more[known].astype(
        np.uint64
    ) - gone.astype(np.uint64)


def _blocks_in_use(scope: Scope, refcounts: Counts) -> I64:
    """Which refcount blocks have a refcount to hold."""
    index, per_block = scope.mismatches.index, scope.geometry.refblock_entries
    found = [np.zeros(0, dtype=np.int64)]
    for first in range(0, index.slots, CHUNK):
        at = first + np.flatnonzero(refcounts[first : first + CHUNK])
        found.append(without_repeats(index.clusters_of(at) // per_block))
    return without_repeats(np.concatenate(found))


def _allocate(used: I64, first: int, size: int, per_block: int) -> tuple[I64, int]:
    """Which blocks a new table has, and its clusters, when all go to *first* and what follows.

    The new clusters need refcounts too: repeated until table and blocks cover themselves.
    """
    blocks, table_clusters = used, 1
    while True:
        end = first + len(blocks) + table_clusters
        own = np.arange(first // per_block, (end - 1) // per_block + 1)
        more = distinct(np.concatenate((used, own)))
        needed = -(-(int(more[-1]) + 1) * 8 // size)
        if needed * size > MAX_REFTABLE_BYTES or end * size > READABLE_END:
            raise UnsupportedRepair(
                f"a refcount table of {needed * size} bytes would be needed;"
                f" QEMU allows {MAX_REFTABLE_BYTES}",
                "export the disk",
            )
        if len(more) == len(blocks) and needed == table_clusters:
            return more, needed
        blocks, table_clusters = more, needed


def _draft_blocks(
    scope: Scope, refcounts: Counts, kept: I64, blocks: I64, offsets: I64, *, new: range
) -> None:
    """Fill the new blocks, some at a time; the *new* clusters, theirs too, have one reference.

    So have those in *kept*.
    """
    index, per_block = scope.mismatches.index, scope.geometry.refblock_entries
    batch = max(1, FILLED // per_block)
    for low in range(0, len(blocks), batch):
        part = blocks[low : low + batch]
        values = np.zeros(len(part) * per_block, dtype=refcounts.dtype)
        first, end = int(part[0]) * per_block, (int(part[-1]) + 1) * per_block
        start, stop = index.count_before(np.array([first, end])).tolist()
        # Whatever has a refcount has a block among these: none lies between them.
        for at in range(start, stop, CHUNK):
            slots = at + np.flatnonzero(refcounts[at : min(at + CHUNK, stop)])
            values[_places(index.clusters_of(slots), part, per_block)] = refcounts[slots]
        own = np.arange(max(new.start, first), min(new.stop, end))
        # There is a block for each of them.
        for ones in (kept[slice(*np.searchsorted(kept, (first, end)))], own):
            values[_places(ones, part, per_block)] = 1
        rows: U8 = pack_refcounts(values.reshape(len(part), -1), scope.geometry.refcount_order)
        scope.draft.write_tables(StageKind.PREPARE, offsets[low : low + batch], rows)


def _places(clusters: I64, blocks: I64, per_block: int) -> I64:
    """Where the refcounts of *clusters* are when those of *blocks* stand one after the other."""
    block = clusters // per_block
    return np.searchsorted(blocks, block) * per_block + clusters - block * per_block


def _explain(scope: Scope, offsets: I64, table_offset: int, table_bytes: int) -> None:
    """A rebuild answers whatever is wrong with the old structure; the worst of it is named."""
    kind = what_is_wrong(scope.report)
    size = scope.geometry.cluster_size
    blocks = [(offset, size, 1) for offset in offsets.tolist()]
    scope.explain(StageKind.PREPARE, Structure.REFBLOCK, kind, blocks)
    table = [(table_offset, table_bytes, 1)]
    scope.explain(StageKind.PREPARE, Structure.REFTABLE, kind, table)
    pointer = [(REFTABLE_OFFSET_AT, 12, 1)]
    scope.explain(StageKind.SWITCH, Structure.HEADER, kind, pointer)
