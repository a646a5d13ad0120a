"""L1 and L2 entries whose right value the entry itself determines.

A misaligned entry that reads as zeros becomes plain zero, as QEMU makes it: what it referred to is
free then, so that this comes first, and a check after it. COPIED goes from compressed entries, and
what they refer to stays the same. Reserved bits go where nothing else is wrong with what the entry
points at: they come last, when refcounts say what they should, and flags are drafted that do.
"""

from __future__ import annotations

import numpy as np

from planner.arrays import I64, U64, Mask, distinct, expand_ranges, is_among
from planner.check.claims import places_of_entries
from planner.check.entry_rules import expected
from planner.findings.kinds import FindingKind, Owners, Structure
from planner.qcow2 import entries
from planner.repair.marked import MarkedTables, marked_tables
from planner.repair.scope import Scope
from planner.repair.words import draft_words, read_words

_OF_L1_ENTRIES = (FindingKind.L1_ENTRY_RESERVED, FindingKind.L1_COPIED)

_OWNERS_WEIGHED = 64
"""Owners of a cluster that are looked at; one with more is not written to."""


def make_plain_zero(scope: Scope) -> None:
    """Take the cluster from entries that read as zeros; fix_l2_entry_by_zero in QEMU.

    It becomes free, which refcounts that must not be written could not say: then they stay.
    """
    if scope.refcounts_must_stay:
        return
    for tables in marked_tables(scope, FindingKind.ZERO_MISALIGNED):
        chosen = tables.without_contested()
        shared = tables.select(~chosen.marks)
        if shared.marks.any():
            chosen = tables.select(chosen.marks | _shared_with_zeros_alone(shared))
        at = chosen.marks
        if scope.geometry.extended_l2:
            bitmap = chosen.bitmaps[at].astype(np.uint64)
            zero = (bitmap | bitmap << np.uint64(32)) & np.uint64(entries.SUBCLUSTERS_ZERO)
            chosen.words[at], chosen.bitmaps[at] = 0, zero
        else:
            chosen.words[at] = entries.ZERO
        chosen.draft()


def clear_copied_of_compressed(scope: Scope) -> None:
    """Draft compressed entries without the COPIED flag, which none has."""
    for tables in marked_tables(scope, FindingKind.COMPRESSED_COPIED):
        chosen = tables.without_contested()
        _correct(chosen)
        chosen.draft()


def clear_reserved_bits(scope: Scope) -> None:
    """Draft the entries in which nothing but reserved bits is wrong, without them.

    Nor is the COPIED flag by now: where an entry may be written, it was drafted.
    """
    others = distinct(_other_findings(scope))
    for tables in marked_tables(scope, FindingKind.L2_ENTRY_RESERVED):
        chosen = tables.without_contested()
        chosen = chosen.select(_is_otherwise_right(chosen, others))
        _correct(chosen)
        chosen.draft()
    wrong = scope.report.findings.of(FindingKind.L1_ENTRY_RESERVED)
    free = scope.is_writable(wrong.host_offset >> scope.geometry.cluster_bits)
    alone = ~is_among(wrong.host_offset, others)
    right = free & alone & _leads_to_what_agrees(scope, wrong.expected)
    place = wrong.host_offset[right]
    if not len(place):
        return
    words = expected(FindingKind.L1_ENTRY_RESERVED, read_words(scope.drafted, place))
    draft_words(scope, FindingKind.L1_ENTRY_RESERVED, place, words)


def _correct(tables: MarkedTables) -> None:
    """Make the marked entries what the rule that they break expects."""
    found = tables.words[tables.marks].astype(np.uint64)
    tables.words[tables.marks] = expected(tables.kind, found)


def _shared_with_zeros_alone(tables: MarkedTables) -> Mask:
    """Whether all owners but one of the cluster that an entry lies in are such entries themselves.

    Those have nothing there, and their claim goes with this very repair. Where a table reaches past
    the end of the file, not every owner is known.
    """
    scope, marks = tables.scope, tables.marks.copy()
    if FindingKind.PAST_END in scope.report.counts():
        marks[:] = False
        return marks
    places = tables.host_offsets() >> scope.geometry.cluster_bits
    clusters, owners = distinct(places), scope.report.owners
    low, high = (np.searchsorted(owners.cluster, clusters, side=side) for side in ("left", "right"))
    few = high - low < _OWNERS_WEIGHED
    low, high = low[few], high[few]
    rows, number = expand_ranges(low, high - 1), np.repeat(np.flatnonzero(few), high - low)
    zeros = distinct(scope.entries.of(tables.kind).host_offset)
    real = owners.structure[rows] != Structure.DATA
    data = owners.select(rows[~real])
    real[~real] = ~is_among(places_of_entries(scope.source, scope.report, data), zeros)
    alone = _are_one_owner(owners.select(rows[real]), number[real], len(clusters))
    marks[marks] = alone[np.searchsorted(clusters, places)]
    return marks


def _are_one_owner(owners: Owners, number: I64, count: int) -> Mask:
    """Which of *count* groups of *owners* is one: the group of each is its *number*, ascending."""
    first = np.searchsorted(number, number)
    # Snapshots that have the table in common are one owner of it.
    is_same = owners.structure == owners.structure[first]
    is_same &= owners.l1_index == owners.l1_index[first]
    for column in (owners.snapshot, owners.l2_index, owners.index):
        is_same &= (column == column[first]) | (owners.structure == Structure.L2_TABLE)
    one: Mask = np.zeros(count, dtype=np.bool_)
    one[number] = True
    one[number[~is_same]] = False
    return one


def _is_otherwise_right(tables: MarkedTables, others: I64) -> Mask:
    """Whether, without its reserved bits, an entry is exactly what the census needs.

    Nothing else may be found at the entry, and the cluster it points at must be there, have as many
    users as its refcount says, and none that contradicts this one. *others*: where there is
    anything but reserved bits, ascending.
    """
    scope, at = tables.scope, tables
    for kind in set(scope.entries.counts()) - {tables.kind, FindingKind.L2_COPIED}:
        at = at.without(scope.entries, kind)
    right = at.marks.copy()
    alone = ~is_among(at.host_offsets(), others)
    right[right] = alone & _leads_to_what_agrees(scope, at.words[right].astype(np.uint64))
    return right


def _other_findings(scope: Scope) -> I64:
    """Where there is anything but reserved bits and wrong flags."""
    groups = scope.report.findings.groups
    others = [kind for kind in groups if kind[0] not in _OF_L1_ENTRIES]
    return np.concatenate([np.zeros(0, dtype=np.int64), *(groups[k].host_offset for k in others)])


def _leads_to_what_agrees(scope: Scope, words: U64) -> Mask:
    """Which entries point at a cluster in the file whose refcount and owners are as they say."""
    offset = (words & np.uint64(entries.L2_OFFSET)).astype(np.int64)
    cluster = offset >> scope.geometry.cluster_bits
    inside: Mask = (offset != 0) & (cluster < scope.layout.host_clusters)
    return inside & ~scope.contested(cluster) & scope.mismatches.agree(cluster)
