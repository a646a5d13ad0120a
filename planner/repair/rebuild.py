"""A new refcount structure, past the end of the file, for an image whose own is damaged.

Refcounts come from the census alone. The old table and blocks are left as they are and become
free. Follows rebuild_refcount_structure in what it computes, not in where it writes: QEMU takes the
first free clusters, which may be evidence. On a block device, which does not grow, it goes behind
all that is used.
"""

from __future__ import annotations

import struct

import numpy as np

from planner.arrays import I64, U8, U64
from planner.errors import UnsupportedRepair
from planner.findings import FindingKind, Structure
from planner.plan import StageKind
from planner.qcow2.layout import MAX_REFTABLE_BYTES
from planner.qcow2.refcounts import pack_refcounts
from planner.repair.scope import Scope
from planner.source import READABLE_END

REFTABLE_OFFSET_AT = 48
"""Where the header holds refcount_table_offset, and after it refcount_table_clusters."""


def rebuild_refcount_structure(scope: Scope, stay: I64) -> None:
    """Draft a new refcount table and its blocks; clusters that *stay* keep their refcount."""
    if not scope.may_grow:
        raise UnsupportedRepair(
            "new refcounts would make the file grow over offsets past its end that the image"
            " refers to: what is lost would look as if it were there",
            "copy the disk out with qemu-img convert",
            FindingKind.PAST_END.label,
        )
    cluster, refcount = _wanted_refcounts(scope, stay)
    size, per_block = scope.geometry.cluster_size, scope.geometry.refblock_entries
    first = scope.first_new_cluster
    used = np.unique(cluster // per_block)
    blocks, table_clusters = _allocate(used, first, size, per_block)
    new = np.arange(first, first + len(blocks) + table_clusters)
    cluster = np.concatenate((cluster, new))
    refcount = np.concatenate((refcount, np.ones(len(new), dtype=np.uint64)))
    offsets = (first + np.arange(len(blocks))) * size
    table_offset = (first + len(blocks)) * size
    if not scope.make_room((first + len(new)) * size):
        raise UnsupportedRepair(
            f"new refcounts would reach up to {(first + len(new)) * size}, and a block device of"
            f" {scope.draft.size} bytes does not grow",
            "make the device larger, or copy the disk out with qemu-img convert",
        )
    _draft_blocks(scope, blocks, offsets, cluster, refcount)
    words = np.zeros(table_clusters * size // 8, dtype=">u8")
    words[blocks] = offsets
    rows = words.view(np.uint8).reshape(1, -1)
    scope.draft.write_tables(StageKind.PREPARE, np.array([table_offset]), rows)
    pointer = struct.pack(">QI", table_offset, table_clusters)
    scope.draft.write(StageKind.SWITCH, REFTABLE_OFFSET_AT, pointer)
    _explain(scope, offsets, table_offset, rows.size)


def _wanted_refcounts(scope: Scope, stay: I64) -> tuple[I64, U64]:
    """The refcount of every cluster that has one, without the old refcount structure."""
    mismatches, report = scope.mismatches, scope.report
    counted = mismatches.counted.astype(np.uint64)
    stored = mismatches.stored.astype(np.uint64)
    over = report.findings.of(FindingKind.REFCOUNT_OVERFLOW)
    slots, _ = mismatches.index.find(over.host_offset >> scope.geometry.cluster_bits)
    counted[slots] += over.count.astype(np.uint64)
    bits = scope.geometry.cluster_bits
    old = np.isin(report.regions.structure, (Structure.REFTABLE, Structure.REFBLOCK))
    regions = report.regions.select(old)
    for first, last in zip(regions.first(bits).tolist(), regions.last(bits).tolist(), strict=True):
        slot = mismatches.index.slots_before(first)
        counted[slot : slot + last - first + 1] -= np.uint64(1)
        stored[slot : slot + last - first + 1] = 0
    slots, known = mismatches.index.find(stay)
    counted[slots[known]] = stored[slots[known]]
    # A cluster with more references than the width can count stays full, and stays named.
    np.minimum(counted, np.uint64(scope.geometry.refcount_max), out=counted)
    at = np.flatnonzero(counted)
    return mismatches.index.clusters_of(at), counted[at]


def _allocate(used: I64, first: int, size: int, per_block: int) -> tuple[I64, int]:
    """Which blocks a new table has, and its clusters, when all go to *first* and what follows.

    The new clusters need refcounts too: repeated until table and blocks cover themselves.
    """
    blocks, table_clusters = used, 1
    while True:
        end = first + len(blocks) + table_clusters
        own = np.arange(first // per_block, (end - 1) // per_block + 1)
        more = np.union1d(used, own)
        needed = -(-(int(more[-1]) + 1) * 8 // size)
        if needed * size > MAX_REFTABLE_BYTES or end * size > READABLE_END:
            raise UnsupportedRepair(
                f"a refcount table of {needed * size} bytes would be needed;"
                f" QEMU allows {MAX_REFTABLE_BYTES}",
                "copy the disk out with qemu-img convert",
            )
        if len(more) == len(blocks) and needed == table_clusters:
            return more, needed
        blocks, table_clusters = more, needed


def _draft_blocks(scope: Scope, blocks: I64, offsets: I64, cluster: I64, refcount: U64) -> None:
    """Fill the new blocks, some at a time."""
    per_block, order = scope.geometry.refblock_entries, scope.geometry.refcount_order
    batch = max(1, (8 << 20) // (per_block * 8))
    for low in range(0, len(blocks), batch):
        part = blocks[low : low + batch]
        start, end = np.searchsorted(cluster, [part[0] * per_block, (part[-1] + 1) * per_block])
        values = np.zeros((len(part), per_block), dtype=np.uint64)
        row = np.searchsorted(part, cluster[start:end] // per_block)
        values[row, cluster[start:end] % per_block] = refcount[start:end]
        rows: U8 = pack_refcounts(values, order)
        scope.draft.write_tables(StageKind.PREPARE, offsets[low : low + batch], rows)


def _explain(scope: Scope, offsets: I64, table_offset: int, table_bytes: int) -> None:
    """A rebuild answers whatever is wrong with the old structure; the worst of it is named."""
    counts = scope.report.counts()
    reasons = (
        FindingKind.REFBLOCK_MISALIGNED,
        FindingKind.REFTABLE_ENTRY_RESERVED,
        FindingKind.REFBLOCK_PAST_END,
        FindingKind.REFBLOCK_SHARED,
        FindingKind.REFCOUNT_UNREADABLE,
        FindingKind.PAST_END,
        FindingKind.REFCOUNT_MISSING,
        FindingKind.REFCOUNT_LOW,
    )
    kind = next(each for each in reasons if each in counts)
    size = scope.geometry.cluster_size
    blocks = [(offset, size, 1) for offset in offsets.tolist()]
    scope.explain(StageKind.PREPARE, Structure.REFBLOCK, kind, blocks)
    table = [(table_offset, table_bytes, 1)]
    scope.explain(StageKind.PREPARE, Structure.REFTABLE, kind, table)
    pointer = [(REFTABLE_OFFSET_AT, 12, 1)]
    scope.explain(StageKind.SWITCH, Structure.HEADER, kind, pointer)
