"""COPIED flags of the active L1 and its L2 tables, made to say what the refcounts say."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np

from planner.arrays import I64, Mask, distinct, expand_ranges
from planner.findings import FindingKind, Findings, Structure, join_findings
from planner.plan import StageKind
from planner.qcow2 import entries
from planner.repair.scope import Scope
from planner.report import Report
from planner.source import read_bytes, read_tables

COPIED_BYTE = 0x80
"""Bit 63 of a big-endian word, in its first byte."""


def update_copied_flags_for_l1(scope: Scope, known: Findings | None = None) -> None:
    """Correct the flags that the report finds wrong; those of *known* are left as they are."""
    for kind, step, flip in (
        (FindingKind.L1_COPIED, 8, _flip_l1_entries),
        (FindingKind.L2_COPIED, scope.geometry.l2_entry_size, _flip_l2_entries),
    ):
        wrong = scope.report.findings.of(kind)
        if known is not None:
            wrong = _without(wrong, known.of(kind), step)
            wrong = wrong.select(wrong.expected == 1)
        cluster = wrong.host_offset >> scope.geometry.cluster_bits
        wrong = wrong.select(~scope.contested(cluster))
        if len(wrong):
            flip(scope, wrong)


def unfollowed_targets(before: Report, scope: Scope) -> I64:
    """Clusters whose refcount must stay: a flag would have to follow, and cannot be written.

    Those are the targets of entries whose flag is wrong now and was not *before*.
    """
    wrong = _wrong_entries(scope.report)
    if not len(wrong):
        return wrong
    new = np.setdiff1d(wrong, _wrong_entries(before), assume_unique=True)
    words = [struct.unpack(">Q", read_bytes(scope.source, at, 8))[0] for at in new.tolist()]
    targets = np.array([word & entries.L2_OFFSET for word in words], dtype=np.int64)
    return distinct(targets >> scope.geometry.cluster_bits)


def _wrong_entries(report: Report) -> I64:
    """File offsets of all entries with a wrong flag."""
    l1 = report.findings.of(FindingKind.L1_COPIED).host_offset
    l2 = _entries_of(report.findings.of(FindingKind.L2_COPIED), report.geometry.l2_entry_size)
    return distinct(np.concatenate((l1, l2)))


def _entries_of(runs: Findings, step: int) -> I64:
    """File offsets of the entries of *runs*, each of *step* bytes, run by run."""
    if not len(runs):
        return np.zeros(0, dtype=np.int64)
    first = runs.host_offset // step
    return expand_ranges(first, first + runs.length // step - 1) * step


def _without(wrong: Findings, known: Findings, step: int) -> Findings:
    """The runs without the entries that were *known* to be wrong before.

    A run may have grown around one: what is new of it is told entry by entry.
    """
    new = _is_new(wrong, known)
    grown = wrong.select(~new)
    if not len(grown):
        return wrong
    entry = _entries_of(grown, step)
    each = grown.select(np.repeat(np.arange(len(grown)), grown.length // step))
    each = replace(
        each,
        host_offset=entry,
        length=np.full(len(entry), step),
        l2_index=each.l2_index + (entry - each.host_offset) // step,
    )
    return join_findings(wrong.select(new), each.select(~np.isin(entry, _entries_of(known, step))))


def _is_new(wrong: Findings, known: Findings) -> Mask:
    """Which runs contain no entry that was known to be wrong before."""
    low = np.searchsorted(np.sort(known.host_offset + known.length), wrong.host_offset, "right")
    high = np.searchsorted(np.sort(known.host_offset), wrong.host_offset + wrong.length, "left")
    return low >= high


def _flip_l1_entries(scope: Scope, wrong: Findings) -> None:
    places = []
    for offset in wrong.host_offset.tolist():
        byte = read_bytes(scope.source, offset, 1)[0] ^ COPIED_BYTE
        scope.draft.write(StageKind.CORRECT, offset, bytes([byte]))
        places.append((offset, 8, 1))
    scope.explain(StageKind.CORRECT, Structure.L1_TABLE, FindingKind.L1_COPIED, places)


def _flip_l2_entries(scope: Scope, wrong: Findings) -> None:
    size, step = scope.geometry.cluster_size, scope.geometry.l2_entry_size
    table = wrong.host_offset - wrong.l2_index.astype(np.int64) * step
    order = np.argsort(table, kind="stable")
    table, wrong = table[order], wrong.select(order)
    offsets, start = np.unique(table, return_index=True)
    end = np.append(start[1:], len(table))
    for part, rows in read_tables(scope.source, offsets, size):
        rows = rows.copy()  # noqa: PLW2901 - the buffer is reused, the draft keeps these
        low, high = int(start[part][0]), int(end[part][-1])
        runs = wrong.l2_index[low:high].astype(np.int64)
        count = wrong.length[low:high] // step
        row = np.repeat(np.searchsorted(offsets[part], table[low:high]), count)
        rows[row, expand_ranges(runs, runs + count - 1) * step] ^= COPIED_BYTE
        scope.draft.write_tables(StageKind.CORRECT, offsets[part], rows)
    places = zip(
        wrong.host_offset.tolist(),
        wrong.length.tolist(),
        (wrong.length // step).tolist(),
        strict=True,
    )
    scope.explain(StageKind.CORRECT, Structure.L2_TABLE, FindingKind.L2_COPIED, list(places))
