"""Free clusters that look like L2 tables of the disk, and lead to free clusters with data.

Where new metadata was written over an older image (a disk made anew, a partition tool, an older
copy), nothing leaks: all of the older one is free, and its tables still lie there. A trim asks.
"""

from __future__ import annotations

import numpy as np

from planner.arrays import I64, U8, Mask, expand_ranges
from planner.check.classify import Look, Looker
from planner.check.report import Report
from planner.metadata.work_limits import LIMITS
from planner.source import SECTOR, Source, read_tables
from planner.triage.triage import looker_of


def find_free_tables(source: Source, report: Report, offset: I64, length: I64) -> I64:
    """Host offsets, bytes, of such clusters in the free runs (*offset*, *length*), bytes.

    Of very many clusters some are looked at. An image with snapshots has none: a disk that was
    taken back to a snapshot leaves its tables behind like that, and nothing is lost by it.
    """
    bits, nothing = report.geometry.cluster_bits, np.zeros(0, dtype=np.int64)
    if len(report.snapshots) or not len(offset):
        return nothing
    free = _filled_clusters(source, offset, offset + length, bits)
    looker = looker_of(source, report)
    screened = free[:: max(1, -(-len(free) // LIMITS.screened))]
    likely = np.zeros(len(screened), dtype=np.bool_)
    for part, sectors in read_tables(source, screened << bits, SECTOR):
        likely[part] = looker.may_be_tables(sectors)
    places = screened[likely][: LIMITS.former_tables] << bits
    found = np.zeros(len(places), dtype=np.bool_)
    for part, rows in read_tables(source, places, report.geometry.cluster_size):
        look, _ = looker.look(rows)
        found[part] = (look == Look.L2_TABLE) & _lead_to(rows, looker, free)
    result: I64 = places[found]
    return result


def _filled_clusters(source: Source, start: I64, end: I64, bits: int) -> I64:
    """The clusters of the runs from *start* to *end* that are no holes, ascending."""
    found = [np.zeros(0, dtype=np.int64)]
    reached = int(start[0])
    for low, high in source.data_extents(reached, int(end[-1]) - reached):
        runs = slice(np.searchsorted(end, low, side="right"), np.searchsorted(start, high))
        first = np.maximum(start[runs], low) >> bits
        last = (np.minimum(end[runs], high) - 1) >> bits
        found.append(expand_ranges(first, last))
    return np.unique(np.concatenate(found))


def _lead_to(rows: U8, looker: Looker, clusters: I64) -> Mask:
    """Which tables have an entry of the disk's own, COPIED, that leads to one of *clusters*."""
    words = looker.table_words(rows)
    is_own = looker.are_own(words, looker.plausible(words))
    targets = looker.targets(words, is_own)
    hits: Mask = (np.isin(targets, clusters) & (targets != 0)).any(axis=1)
    return hits
