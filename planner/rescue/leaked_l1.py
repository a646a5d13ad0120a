"""Whether there can be an L1 table among what leaked, by what a scan has named.

Asked before the triage that would find it, which looks at all that leaked.
"""

from __future__ import annotations

import numpy as np

from planner.arrays import I64, distinct, is_among
from planner.check.classify import Looker
from planner.check.report import Report
from planner.findings.kinds import Structure
from planner.metadata.work_limits import LIMITS
from planner.qcow2.geometry import Geometry
from planner.rescue.placing.tables import read_pieces, unused_clusters
from planner.rescue.scanned import Scanned
from planner.source import Source, read_tables
from planner.triage.triage import looker_of


def may_have_lost_l1(source: Source, report: Report, scanned: Scanned) -> bool:
    """Whether a triage could find a lost L1 table: one that leads to tables for the most.

    By what was *scanned*; it could where the whole file was not, or very much is like tables.
    """
    looker, bits = looker_of(source, report), report.geometry.cluster_bits
    unused = unused_clusters(source, report)
    unused = unused[unused < -(-source.size >> bits)]
    end, reach = int(unused[-1] + 1) << bits if len(unused) else 0, looker.reach + (1 << bits)
    whole = scanned.whole(source.size, end, reach)
    if whole is None:
        return True
    likely = distinct(whole[0].again >> bits)
    likely = _mostly_entries(source, report.geometry, looker, likely[is_among(likely, unused)])
    regions = report.regions
    known = regions.select(regions.structure == Structure.L2_TABLE).first(bits)
    tables = distinct(np.concatenate((known, likely)))
    if len(likely) << bits > LIMITS.triaged_bytes:
        return True
    for _, rows in read_tables(source, likely << bits, 1 << bits):
        words = looker.table_words(rows)
        targets = np.sort(looker.targets(words, looker.plausible(words)), axis=1)
        is_new = np.diff(targets, axis=1, prepend=0) != 0
        leads = is_among(targets.reshape(-1), tables).reshape(targets.shape) & is_new
        if (2 * leads.sum(axis=1) > is_new.sum(axis=1)).any():
            return True
    return False


def _mostly_entries(source: Source, geometry: Geometry, looker: Looker, clusters: I64) -> I64:
    """Of *clusters* those that may be tables: what is judged in pieces, by more than is asked."""
    bad, filled = np.zeros((2, len(clusters)), dtype=np.int64)
    for pieces, rows in read_pieces(source, clusters << geometry.cluster_bits, geometry):
        parts, of = looker.parts(rows), np.searchsorted(clusters, pieces >> geometry.cluster_bits)
        np.add.at(bad, of, parts.bad)
        np.add.at(filled, of, parts.filled)
    return clusters[(filled > 0) & (bad * 2 <= filled)]
