"""Findings that a healthy image gives for a while: they say nothing while a program writes to it.

QEMU orders what it writes so that a crash leaves leaks and nothing worse; these are what else it
leaves, for as long as one of its operations takes, or a disk that does not answer holds it up.
Sources: qcow2_update_snapshot_refcount, qcow2_co_truncate and update_refcount_discard.
"""

from __future__ import annotations

import numpy as np

from planner.arrays import I64, U64, Mask, distinct
from planner.check.report import Report
from planner.findings.kinds import FindingKind, Structure
from planner.metadata.refcounts import Reftable, StoredRefcounts
from planner.qcow2.entries import L2_OFFSET
from planner.qcow2.layout import Layout
from planner.source import Source, read_tables

COPIED = (FindingKind.L1_COPIED, FindingKind.L2_COPIED)
"""Of these what the refcounts say of all tables has to be known."""

_PAGE = 4096


def are_believed(
    report: Report, source: Source, key: tuple[FindingKind, Structure], at: I64, found: U64
) -> Mask:
    """Which findings of a kind about a structure, *key*, that *report* has too are none of those.

    *report*: a check of *source*. *at*: host offset of the word that each is about. *found*: as
    `KINDS` says. Compressed data that is discarded is punched out of the file before its entry
    changes.
    """
    kind, structure = key
    if report.layout is None or kind is FindingKind.COMPRESSED_UNREADABLE:
        return np.zeros(len(found), dtype=np.bool_)
    if kind is FindingKind.PAST_END and structure.is_guest:
        return _are_not_shrunk(report.layout, source, found)
    if kind in COPIED:
        return _are_no_snapshots(report, source, at, found != 0)
    if kind is FindingKind.MULTIPLE_OWNERS and report.layout.header.dirty:
        return _are_of_metadata(report, at)
    return np.ones(len(found), dtype=np.bool_)


def _are_of_metadata(report: Report, at: I64) -> Mask:
    """Which clusters at host offsets *at* are not a guest's alone.

    With lazy refcounts no L2 table waits for another: of a cluster that was discarded and taken
    again, the new entry may be written before the old one is gone. Metadata is flushed first.
    """
    owners, bits = report.owners, report.geometry.cluster_bits
    guest = np.isin(owners.structure, (Structure.DATA, Structure.COMPRESSED))
    return np.isin(at >> bits, owners.cluster[~guest])


def _are_not_shrunk(layout: Layout, source: Source, offset: U64) -> Mask:
    """Of *offset* past the end of the file, to which entries lead, where no file ended before.

    A disk that is made smaller takes the end off its file, behind the last cluster that is in use
    by then, before the entries are written of what had been discarded there, whenever that was; the
    refcounts follow the entries. So it leaves whole clusters, and a refcount where such an entry
    leads.
    """
    if layout.file_size % layout.geometry.cluster_size:
        return np.ones(len(offset), dtype=np.bool_)
    if layout.header.dirty:
        return np.zeros(len(offset), dtype=np.bool_)
    stored = StoredRefcounts(source, layout, Reftable(source, layout))
    clusters = offset.astype(np.int64) >> layout.geometry.cluster_bits
    return np.equal(stored.look_up(clusters), 0)


def _are_no_snapshots(report: Report, source: Source, at: I64, is_set: Mask) -> Mask:
    """Of COPIED flags at host offsets *at* that contradict refcounts, which no snapshot explains.

    While one is made refcounts are raised first, and no table refers to it yet: the flag is set on
    what leaks. While one is deleted the flag comes last: it is not set where there is one reference
    left. Neither harms anybody.
    """
    mismatches, bits = report.mismatches, report.geometry.cluster_bits
    if mismatches is None or not mismatches.index.slots:
        return np.zeros(len(at), dtype=np.bool_)
    clusters = (_words_at(source, at) & np.uint64(L2_OFFSET)).astype(np.int64) >> bits
    slots, known = mismatches.index.find(clusters)
    stored, counted = mismatches.stored[slots], mismatches.counted[slots]
    wrong: Mask = np.where(is_set, stored <= counted, stored < counted)
    return wrong | ~known  # past the end of the file no snapshot has anything


def _words_at(source: Source, at: I64) -> U64:
    """The big-endian words at host offsets that are multiples of 8."""
    pages = distinct(at // _PAGE)
    words = np.zeros(len(at), dtype=np.uint64)
    for part, rows in read_tables(source, pages * _PAGE, _PAGE):
        row = np.searchsorted(pages[part], at // _PAGE)
        row[row == len(rows)] = 0
        mine = pages[part][row] == at // _PAGE
        words[mine] = rows.view(">u8")[row[mine], at[mine] % _PAGE // 8]
    return words
