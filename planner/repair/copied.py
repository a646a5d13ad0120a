"""COPIED flags of the active L1 and its L2 tables, made to say what the refcounts say."""

from __future__ import annotations

import struct

import numpy as np

from planner.arrays import I64, distinct
from planner.findings import FindingKind, Findings, Structure
from planner.plan import StageKind
from planner.qcow2 import entries
from planner.repair.marked import MarkedTables, marked_tables
from planner.repair.scope import Scope
from planner.report import Report
from planner.source import read_bytes

COPIED_BYTE = 0x80
"""Bit 63 of a big-endian word, in its first byte."""


def update_copied_flags_for_l1(scope: Scope, known: Report | None = None) -> None:
    """Correct the flags that the report finds wrong; those of *known* are left as they are."""
    wrong = scope.report.findings.of(FindingKind.L1_COPIED)
    if known is not None:
        wrong = wrong.select((wrong.expected == 1) & ~_was_wrong(wrong, known))
    wrong = wrong.select(~scope.contested(wrong.host_offset >> scope.geometry.cluster_bits))
    if len(wrong):
        _flip_l1_entries(scope, wrong)
    for tables in marked_tables(scope, FindingKind.L2_COPIED):
        chosen = tables.without_contested()
        if known is not None:
            is_missing = chosen.words < np.uint64(entries.COPIED)
            chosen = _new_among(chosen, known).select(is_missing)
        chosen.words[chosen.marks] ^= np.uint64(entries.COPIED)
        chosen.draft()


def unfollowed_targets(before: Report, scope: Scope) -> I64:
    """Clusters whose refcount must stay: a flag would have to follow, and cannot be written.

    Those are the targets of entries whose flag is wrong now and was not *before*.
    """
    wrong = scope.report.findings.of(FindingKind.L1_COPIED)
    new = wrong.host_offset[~_was_wrong(wrong, before)].tolist()
    words = [struct.unpack(">Q", read_bytes(scope.source, at, 8))[0] for at in new]
    targets = [np.array([word & entries.L2_OFFSET for word in words], dtype=np.int64)]
    for tables in marked_tables(scope, FindingKind.L2_COPIED):
        chosen = _new_among(tables, before)
        offset = entries.l2_offsets(chosen.words[chosen.marks].astype(np.uint64))
        targets.append(distinct(offset))
    return distinct(np.concatenate(targets) >> scope.geometry.cluster_bits)


def _was_wrong(wrong: Findings, before: Report) -> np.ndarray:
    """Which L1 entries were wrong *before* too."""
    return np.isin(wrong.host_offset, before.findings.of(FindingKind.L1_COPIED).host_offset)


def _new_among(tables: MarkedTables, before: Report) -> MarkedTables:
    """Of the marked L2 entries those whose flag was not wrong *before*."""
    if before.entries is None:
        return tables
    return tables.select(~before.entries.marks(tables.kind, tables.offset))


def _flip_l1_entries(scope: Scope, wrong: Findings) -> None:
    places = []
    for offset in wrong.host_offset.tolist():
        byte = read_bytes(scope.source, offset, 1)[0] ^ COPIED_BYTE
        scope.draft.write(StageKind.CORRECT, offset, bytes([byte]))
        places.append((offset, 8, 1))
    scope.explain(StageKind.CORRECT, Structure.L1_TABLE, FindingKind.L1_COPIED, places)
