"""COPIED flags of the active L1 and its L2 tables, made to say what the refcounts say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from planner.arrays import I64, U64, Mask, distinct, expand_ranges
from planner.check.report import Report
from planner.findings.kinds import FindingKind, Findings, Structure
from planner.qcow2 import entries
from planner.repair.marked import MarkedTables, marked_tables
from planner.repair.plan import StageKind
from planner.repair.scope import Scope
from planner.repair.words import draft_words, read_words
from planner.source import Source

Check = Callable[[Source, I64], Report]


def update_copied_flags_for_l1(scope: Scope, *, settled: bool = False) -> None:
    """Correct the flags that the report finds wrong.

    *settled*: only of entries that lead to a cluster whose refcount is the number of its
    references: such a flag stays right whatever else is mended. The census must be complete.
    """
    wrong = scope.report.findings.of(FindingKind.L1_COPIED)
    wrong = wrong.select(scope.is_writable(wrong.host_offset >> scope.geometry.cluster_bits))
    words = read_words(scope.source, wrong.host_offset)
    if settled:
        right = _leads_to_settled(scope, words)
        wrong, words = wrong.select(right), words[right]
    flipped = words ^ np.uint64(entries.COPIED)
    draft_words(scope, FindingKind.L1_COPIED, wrong.host_offset, flipped)
    for tables in marked_tables(scope, FindingKind.L2_COPIED):
        chosen = tables.without_contested()
        if settled and not scope.layout.header.external_data:
            marks = chosen.marks.copy()
            marks[marks] = _leads_to_settled(scope, chosen.words[marks].astype(np.uint64))
            chosen = chosen.select(marks)
        chosen.words[chosen.marks] ^= np.uint64(entries.COPIED)
        chosen.draft()


def _leads_to_settled(scope: Scope, words: U64) -> Mask:
    """Which entries lead into the file, to a cluster whose refcount and references agree."""
    cluster = entries.l2_offsets(words) >> scope.geometry.cluster_bits
    inside: Mask = cluster < scope.layout.host_clusters
    return inside & scope.mismatches.agree(cluster)


def unfollowed_targets(before: Report, scope: Scope) -> I64:
    """Clusters whose refcount must stay: a flag would have to follow, and cannot be written.

    Those are the targets of entries whose flag is wrong now and was not *before*.
    """
    if scope.report is before:
        return np.zeros(0, dtype=np.int64)
    wrong = scope.report.findings.of(FindingKind.L1_COPIED)
    words = read_words(scope.source, wrong.host_offset[~_was_wrong(wrong, before)])
    targets = [distinct(entries.l2_offsets(words))]
    for tables in marked_tables(scope, FindingKind.L2_COPIED):
        chosen = _new_among(tables, before)
        offset = entries.l2_offsets(chosen.words[chosen.marks].astype(np.uint64))
        targets.append(distinct(offset))
    return distinct(np.concatenate(targets) >> scope.geometry.cluster_bits)


def stuck_targets(before: Report, scope: Scope, check: Check) -> I64:
    """Those of them that are known once refcounts are drafted: to which nothing can be written.

    It takes no more than a *check* of the tables that cannot be written, each given by its host
    offset. Where refcounts are made anew it may be others: then nothing is told.
    """
    nothing = np.zeros(0, dtype=np.int64)
    if scope.draft.revision == scope.revision or scope.draft.has(StageKind.SWITCH):
        return nothing
    image, bits = scope.draft.overlay(), scope.geometry.cluster_bits
    regions = scope.report.regions
    tables = distinct(regions.offset[regions.structure == Structure.L2_TABLE])
    ends = np.stack((tables, tables + scope.geometry.cluster_size - 1)) >> bits
    fixed = tables[~scope.is_writable(ends).all(axis=0)]
    leading = regions.select(regions.structure == Structure.L1_TABLE)
    places = expand_ranges(leading.first(bits), leading.last(bits))
    if not len(fixed) and scope.is_writable(places).all():
        return nothing
    report = check(image, fixed)
    wrong = report.findings.of(FindingKind.L1_COPIED)
    is_stuck = ~scope.is_writable(wrong.host_offset >> bits) & ~_was_wrong(wrong, before)
    targets = [entries.l2_offsets(read_words(image, wrong.host_offset[is_stuck]))]
    there = replace(scope, source=image, report=report, revision=scope.draft.revision)
    for found in marked_tables(there, FindingKind.L2_COPIED):
        is_writable = replace(found, scope=scope).without_contested().marks
        stuck = _new_among(found, before).select(~is_writable)
        targets.append(entries.l2_offsets(stuck.words[stuck.marks].astype(np.uint64)))
    return distinct(np.concatenate([nothing, *targets]) >> bits)


def _was_wrong(wrong: Findings, before: Report) -> np.ndarray:
    """Which L1 entries were wrong *before* too."""
    return np.isin(wrong.host_offset, before.findings.of(FindingKind.L1_COPIED).host_offset)


def _new_among(tables: MarkedTables, before: Report) -> MarkedTables:
    """Of the marked L2 entries those whose flag was not wrong *before*."""
    if before.entries is None:
        return tables
    return tables.without(before.entries, tables.kind)
