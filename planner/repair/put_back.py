"""Refcount table entries put back in their place: to the blocks that they led to.

For an image that must not grow, since it refers to what lies past its end: its refcounts cannot be
made anew. Where an entry alone was damaged, its block is in the file still, nothing refers to it,
and it says of itself what it is: all that the census counts. Nothing else is taken for it.
"""

from __future__ import annotations

import numpy as np

from planner.arrays import I64, Counts, distinct, union
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
"""Bytes of clusters that nothing refers to which are looked through, for each of them."""

_DIFFERING_OF = 4
"""A refcount block says of one cluster in so many, or of fewer, something else than the census."""


def put_back_blocks(scope: Scope) -> None:
    """Draft all entries of the refcount table that lead to no block as they were; or none of them.

    One that would count nothing becomes empty.
    """
    table = Reftable(scope.source, scope.layout)
    counted = _counted(scope)
    wrong = _wrong_entries(scope, table, counted)
    if not 0 < len(wrong) <= MAX_ENTRIES:
        return
    _withdraw_claims(scope, table.offset[np.isin(table.index, wrong)], counted)
    free = _free_clusters(scope, counted)
    words: list[int] = []
    for block in wrong.tolist():
        word = _word_for(scope, block, counted, free)
        if word is None or word in filter(None, words):
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


def _counted(scope: Scope) -> I64:
    """How often each slot is referred to, also where that is more than a refcount can say."""
    counted = scope.mismatches.counted.astype(np.int64)
    over = scope.report.findings.of(FindingKind.REFCOUNT_OVERFLOW)
    slots, _ = scope.mismatches.index.find(over.host_offset >> scope.geometry.cluster_bits)
    counted[slots] += over.count
    return counted


def _wrong_entries(scope: Scope, table: Reftable, counted: I64) -> I64:
    """Of which blocks the table leads to none that may be written, or should lead to one."""
    used = scope.mismatches.index.clusters_of(np.flatnonzero(counted))
    needed = distinct(used // scope.geometry.refblock_entries)
    known = union(table.index, needed[needed < scope.layout.reftable_entries])
    wrong: I64 = np.setdiff1d(known, writable_refblocks(scope, table.index)[0])
    return wrong


def _withdraw_claims(scope: Scope, offsets: I64, counted: I64) -> None:
    """What wrong entries lead to is no block of refcounts, and not in use as one."""
    bits, regions = scope.geometry.cluster_bits, scope.report.regions
    blocks = regions.select(regions.structure == Structure.REFBLOCK).first(bits)
    slots, known = scope.mismatches.index.find(blocks[np.isin(blocks, offsets >> bits)])
    np.subtract.at(counted, slots[known], 1)


def _free_clusters(scope: Scope, counted: I64) -> I64:
    """The first clusters with data that nothing refers to, whole in the file; ascending."""
    geometry = scope.geometry
    free = scope.mismatches.index.clusters_of(np.flatnonzero(counted == 0))
    free = free[free < scope.source.size >> geometry.cluster_bits]
    is_there = present_tables(scope.source, free << geometry.cluster_bits, geometry.cluster_size)
    return free[is_there][: MAX_BYTES >> geometry.cluster_bits]


def _word_for(scope: Scope, block: int, counted: I64, free: I64) -> int | None:
    """What the entry of that *block* was; None where that cannot be told."""
    geometry, expected = scope.geometry, _expected(scope, block, counted)
    used, first = int(np.count_nonzero(expected)), block * geometry.refblock_entries
    if not used:
        return 0
    found: list[int] = []
    offsets = free << geometry.cluster_bits
    for part, rows in read_tables(scope.source, offsets, geometry.cluster_size):
        stored = unpack_refcounts(rows, geometry.refcount_order)
        differing = np.count_nonzero(stored != expected.astype(stored.dtype), axis=1)
        own = free[part] - first  # It counts itself, which nothing else does.
        row = np.flatnonzero((own >= 0) & (own < len(expected)))
        counts_itself = stored[row, own[row]] == 1
        differing[row] += np.where(counts_itself, -1, used)
        found += offsets[part][differing * _DIFFERING_OF <= used].tolist()
    return found[0] if len(found) == 1 else None


def _expected(scope: Scope, block: int, counted: I64) -> Counts:
    """The refcounts of a block as the census has them."""
    geometry, index = scope.geometry, scope.mismatches.index
    first = block * geometry.refblock_entries
    slots = np.arange(
        index.slots_before(first), index.slots_before(first + geometry.refblock_entries)
    )
    expected: Counts = np.zeros(geometry.refblock_entries, dtype=np.uint64)
    expected[index.clusters_of(slots) - first] = counted[slots]
    return np.minimum(expected, np.uint64(geometry.refcount_max))
