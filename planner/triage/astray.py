"""Entries that may lead to what is another's, because the refcount there counts only the others.

An entry that was changed to lead elsewhere takes a reference from what it led to, which leaks, and
adds one where it leads now. Refcounts that are wrong on their own look the same; so there must be
no more of these than of what leaks.
"""

from __future__ import annotations

import numpy as np

from planner.arrays import I64, distinct, is_among, is_any_of
from planner.check.report import Report
from planner.findings.kinds import FindingKind, Owners, Structure
from planner.source import Source
from planner.triage.uncounted import blocks_of_nothing

_NOTHING = np.zeros(0, dtype=np.int64)


def astray_tables(source: Source, report: Report, lost: int) -> I64:
    """Clusters of L2 tables that have more users than their refcount says, where *lost* others may
    have lost one; ascending.
    """
    owners = _of_low(source, report)
    tables = distinct(owners.cluster[owners.structure == Structure.L2_TABLE])
    return tables if len(tables) <= lost else _NOTHING


def astray_data(source: Source, report: Report, tables: I64, lost: int) -> I64:
    """The same of guest clusters, but for those that are counted low since their table is one of
    *tables*.

    What is dirty says nothing by that: its refcounts are known to be out of date.
    """
    if FindingKind.DIRTY_BIT in report.counts():
        return _NOTHING
    owners = _of_low(source, report)
    is_guest = np.isin(owners.structure, (Structure.DATA, Structure.COMPRESSED))
    below = owners.l1_index[np.isin(owners.cluster, tables)]
    data = distinct(owners.cluster[is_guest & ~np.isin(owners.l1_index, below)])
    return data if len(data) <= lost else _NOTHING


def _of_low(source: Source, report: Report) -> Owners:
    """The owners of clusters whose refcount is too low, and not lost; but for those with owners
    that cannot all be right, which is said of them.

    What something else than refcounts lies in the place of is lost, whatever it says.
    """
    total = report.totals.get(FindingKind.REFCOUNT_LOW, 0)
    if report.mismatches is None or not total:
        return report.owners.select(_NOTHING)
    low = report.mismatches.clusters(FindingKind.REFCOUNT_LOW, total)
    contested = report.findings.of(FindingKind.MULTIPLE_OWNERS).host_offset
    low = low[~is_any_of(low, contested >> report.geometry.cluster_bits)]
    if not len(low):
        return report.owners.select(_NOTHING)
    low = low[~np.isin(low // report.geometry.refblock_entries, blocks_of_nothing(source, report))]
    return report.owners.select(np.flatnonzero(is_among(report.owners.cluster, low)))
