"""Refcount table entries put back in their place: to the blocks that they led to.

For an image that must not grow, since it refers to what lies past its end: its refcounts cannot be
made anew. Where an entry alone was damaged, its block is in the file still, nothing refers to it,
and it says of itself what it is: all that the census counts. Nothing else is taken for it.
"""

from __future__ import annotations

import numpy as np

from planner.arrays import I64, Counts, union
from planner.check.refcount_comparison import CHUNK
from planner.findings.kinds import FindingKind, Structure
from planner.metadata.refcounts import Reftable
from planner.qcow2.refcounts import unpack_refcounts
from planner.repair.plan import StageKind
from planner.repair.rebuild import what_is_wrong
from planner.repair.refcounts import writable_refblocks
from planner.repair.scope import Scope
from planner.repair.words import WORD, draft_words
from planner.source import present_tables, read_tables

MAX_ENTRIES = 16
"""Entries that are put back; where more are damaged, more is."""

MAX_BYTES = 64 << 20
"""Bytes of clusters that nothing refers to which are looked through."""

_DIFFERING_OF = 4
"""A refcount block says of one cluster in so many, or of fewer, something else than the census."""


def put_back_blocks(scope: Scope) -> None:
    """Draft all entries of the refcount table that lead to no block as they were; or none of them.

    One that would count nothing becomes empty.
    """
    table = Reftable(scope.source, scope.layout)
    wrong = _wrong_entries(scope, table)
    if not 0 < len(wrong) <= MAX_ENTRIES:
        return
    counted = _counted(scope, table.offset[np.isin(table.index, wrong)])
    free = _free_clusters(scope, counted)
    # Its offset may be right: what it counts behind the end of the file tells what was there.
    reserved = table.index[table.reserved & (table.offset < scope.source.size)]
    words: list[int] = []
    for block, word in zip(wrong.tolist(), _words_for(scope, wrong, counted, free), strict=True):
        if word is None or word in filter(None, words) or (not word and block in reserved):
            return
        words.append(word)
    places = scope.layout.header.refcount_table_offset + WORD * wrong
    if not scope.is_writable(places >> scope.geometry.cluster_bits).all():
        return
    draft_words(
        scope,
        what_is_wrong(scope.report),
        places,
        np.array(words, dtype=np.uint64),
        stage=StageKind.SWITCH,
        structure=Structure.REFTABLE,
    )


def _wrong_entries(scope: Scope, table: Reftable) -> I64:
    """Of which blocks the table leads to none that may be written, or should lead to one."""
    per_block = scope.geometry.refblock_entries
    missing = scope.mismatches.blocks(per_block, FindingKind.REFCOUNT_MISSING)
    known = union(table.index, missing[missing < scope.layout.reftable_entries])
    wrong: I64 = np.setdiff1d(known, writable_refblocks(scope, table.index)[0])
    return wrong


def _counted(scope: Scope, claimed: I64) -> Counts:
    """How often each slot is referred to, also where that is more than a refcount can say.

    But for what wrong entries of the table lead to, *claimed*: that is in use as no block.
    """
    mismatches, regions, bits = scope.mismatches, scope.report.regions, scope.geometry.cluster_bits
    over = scope.report.findings.of(FindingKind.REFCOUNT_OVERFLOW)
    slots, _ = mismatches.index.find(over.host_offset >> bits)
    whole = mismatches.counted[slots] + over.count.astype(np.uint64)
    width = np.min_scalar_type(int(whole.max(initial=0)))
    counted = mismatches.counted.astype(np.promote_types(mismatches.counted.dtype, width))
    counted[slots] = whole.astype(counted.dtype)
    blocks = regions.select(regions.structure == Structure.REFBLOCK).first(bits)
    slots, known = mismatches.index.find(blocks[np.isin(blocks, claimed >> bits)])
    np.subtract.at(counted, slots[known], counted.dtype.type(1))
    return counted


def _free_clusters(scope: Scope, counted: Counts) -> I64:
    """The first clusters with data that nothing refers to, whole in the file; ascending."""
    bits, size = scope.geometry.cluster_bits, scope.geometry.cluster_size
    index, room, found = scope.mismatches.index, MAX_BYTES // size, [np.zeros(0, dtype=np.int64)]
    for first in range(0, len(counted), CHUNK):
        free = index.clusters_of(first + np.flatnonzero(counted[first : first + CHUNK] == 0))
        free = free[free < scope.source.size >> bits]
        found.append(free[present_tables(scope.source, free << bits, size)][:room])
        room -= len(found[-1])
        if not room:
            break
    return np.concatenate(found)


def _words_for(scope: Scope, wrong: I64, counted: Counts, free: I64) -> list[int | None]:
    """What the entries of *wrong* blocks were; None where that cannot be told."""
    geometry, firsts = scope.geometry, wrong * scope.geometry.refblock_entries
    expected = [_expected(scope, first, counted) for first in firsts.tolist()]
    places: list[list[int]] = [[] for _ in expected]
    offsets = free << geometry.cluster_bits
    if not any(len(place) for place, _ in expected):
        offsets = offsets[:0]
    for part, rows in read_tables(scope.source, offsets, geometry.cluster_size):
        stored = unpack_refcounts(rows, geometry.refcount_order)
        filled = np.count_nonzero(stored, axis=1)
        for (place, count), first, found in zip(expected, firsts.tolist(), places, strict=True):
            used, there = len(place), stored[:, place]
            differing = filled - np.count_nonzero(there, axis=1)
            differing += np.count_nonzero(there != count, axis=1)
            own = free[part] - first  # It counts itself, which nothing else does.
            row = np.flatnonzero((own >= 0) & (own < geometry.refblock_entries))
            counts_itself = stored[row, own[row]] == 1
            differing[row] += np.where(counts_itself, -1, used)
            found.extend(offsets[part][differing * _DIFFERING_OF <= used].tolist())
    return [
        (found[0] if len(found) == 1 else None) if len(place) else 0
        for found, (place, _) in zip(places, expected, strict=True)
    ]


def _expected(scope: Scope, first: int, counted: Counts) -> tuple[I64, Counts]:
    """The refcounts of the block that begins with the cluster *first* as the census has them: where
    they are not 0, and how much.
    """
    geometry, index = scope.geometry, scope.mismatches.index
    low = index.slots_before(first)
    slots = low + np.flatnonzero(
        counted[low : index.slots_before(first + geometry.refblock_entries)]
    )
    count = np.minimum(counted[slots], np.uint64(geometry.refcount_max))
    return index.clusters_of(slots) - first, count
