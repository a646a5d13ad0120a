"""The L2 tables of a disk: those that have a place, those that lost it, and the places left.

A table that nothing leads to is one of the disk's own if one of its entries has the COPIED flag, or
leads to what is compressed: those of snapshots have none, nor have old refcounts and bitmaps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planner.arrays import I32, I64, U8, U64, Mask, distinct, is_among
from planner.check.classify import Look
from planner.check.refcount_comparison import Mismatches
from planner.check.report import Report
from planner.findings.kinds import ACTIVE, FindingKind, Structure
from planner.metadata.gone_tables import GoneTables
from planner.progress import Meter
from planner.qcow2 import entries
from planner.qcow2.entries import ClusterType
from planner.qcow2.geometry import Geometry
from planner.qcow2.header import Header
from planner.qcow2.layout import Layout
from planner.source import Source, nonzero_words, present_tables, read_tables
from planner.triage.triage import looker_of

NOWHERE, ZEROS, PACKED = 0, -1, -2
"""Instead of a cluster: nothing is allocated, zeros, compressed data."""

NO_WINDOW, A_SNAPSHOTS = -1, -2
"""Instead of a window: it is not known; it is a snapshot's, and perhaps the disk's too."""

MAX_TABLES = 1 << 16
"""That are looked at, of an image: 32 TiB of the usual ones."""


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """L2 tables in columns, ascending by ``offset``, their place in the file.

    ``clusters``: of each entry the cluster of the file, or `NOWHERE`, `ZEROS`, `PACKED`; int32
    (tables, entries). ``own``: which have the COPIED flag, of the same shape. ``window``: the L1
    index that leads there; `NO_WINDOW` or `A_SNAPSHOTS` for those that lost theirs. ``windows``:
    how many the disk has. ``hints``: (table, window) of lost ones whose place a snapshot shows;
    ``late``: of those that are a snapshot's, and the disk's too if nothing else belongs there.
    """

    geometry: Geometry
    offset: I64
    clusters: I32
    own: Mask
    window: I64
    windows: int
    hints: tuple[tuple[int, int], ...] = ()
    late: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.offset)

    @property
    def lost(self) -> I64:
        """Which have no place."""
        return np.flatnonzero(self.window < 0)


# ---- the L1 table as it stands ----


@dataclass(frozen=True, slots=True, eq=False)
class L1Table:
    """The disk's L1 table: its words, and which of them lead to a table; both of all indices."""

    offset: int
    words: U64
    leads: Mask


def read_l1(source: Source, header: Header, report: Report) -> L1Table:
    """Which entries are sound: of those that are not nothing is believed."""
    geometry = header.geometry
    words = np.zeros(header.l1_size, dtype=np.uint64)
    index, found = nonzero_words(source, header.l1_table_offset, header.l1_size)
    words[index] = found
    leads = np.zeros(len(words), dtype=np.bool_)
    leads[index] = _are_sound(source, found, geometry, report)
    return L1Table(header.l1_table_offset, words, leads)


def _are_sound(source: Source, words: U64, geometry: Geometry, report: Report) -> Mask:
    offset = entries.l1_offsets(words)
    sound: Mask = ((words & np.uint64(entries.L1_RESERVED)) == 0) & (offset > 0)
    sound &= (offset & (geometry.cluster_size - 1) == 0) & (offset < source.size)
    # No two lead to the same.
    _, first, count = np.unique(offset, return_index=True, return_counts=True)
    alone = np.zeros(len(words), dtype=np.bool_)
    alone[first[count == 1]] = True
    sound &= alone
    at = np.flatnonzero(sound)
    at = at[np.argsort(offset[at])]
    looker, gone = looker_of(source, report), GoneTables(geometry, source.size)
    for part, rows in read_tables(source, offset[at], geometry.cluster_size):
        look, _ = looker.look(rows)
        _, whole = gone.sectors(rows)
        sound[at[part]] = np.isin(look, (Look.L2_TABLE, Look.ZEROS)) & ~whole
    return sound


# ---- what nothing leads to ----


def unused_clusters(source: Source, report: Report, *, free: bool = False) -> I64:
    """Clusters that are counted as in use and that nothing leads to; those whose refcounts are
    lost, too. With *free* those that are counted as free as well. Ascending.
    """
    mismatches = report.mismatches
    if mismatches is None:
        return np.zeros(0, dtype=np.int64)
    leaked = mismatches.clusters(FindingKind.LEAK, report.totals.get(FindingKind.LEAK, 0))
    if not (free or report.needs_rebuild or _LOST & report.counts().keys()):
        return _unreferenced(leaked, mismatches)
    # Where refcounts are lost nothing tells what was free: all that is there.
    bits, found = report.geometry.cluster_bits, [leaked]
    for low, high in source.data_extents(0, source.size):
        found.append(np.arange(low >> bits, min(-(-high >> bits), source.size >> bits)))
    return _unreferenced(distinct(np.concatenate(found)), mismatches)


def _unreferenced(clusters: I64, mismatches: Mismatches) -> I64:
    unused: I64 = clusters[mismatches.count_references(clusters) == 0]
    return unused


_LOST = {FindingKind.REFCOUNT_MISSING, FindingKind.REFCOUNT_UNREADABLE}


def batches(source: Source, clusters: I64, size: int, meter: Meter) -> Iterator[tuple[I64, U8]]:
    """Clusters of the file that are no holes, and their bytes, some at a time."""
    clusters = clusters[present_tables(source, clusters * size, size, anyway=0)]
    offsets = clusters * size
    for part, rows in read_tables(source, offsets, size):
        meter.advance(rows.size)
        yield clusters[part], rows


def snapshot_hints(
    source: Source, report: Report, offset: I64, clusters: I32, vacant: I64
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """What the L1 tables of snapshots show of vacant windows of the disk: (table, window), of the
    table its offset.

    Tables that the disk had in common with a snapshot, which are counted once too often, at the
    index that they have there. Of tables at *offset* that wait, those that lead to the same
    clusters as a snapshot's at one index. And apart from these tables of which that is not known,
    since their refcounts are lost.
    """
    mismatches, layout = report.mismatches, report.layout
    if mismatches is None or layout is None or not len(report.snapshots) or not len(vacant):
        return [], []
    geometry, regions = report.geometry, report.regions
    theirs = regions.select(
        (regions.structure == Structure.L2_TABLE) & (regions.snapshot != ACTIVE)
    )
    table, index = theirs.offset, theirs.l1_index
    kept = is_among(index, vacant)
    table, index = table[kept], index[kept]
    cluster = table >> geometry.cluster_bits
    slots, known = mismatches.index.find(cluster)
    over = known & (mismatches.stored[slots] > mismatches.counted[slots])
    hints = list(zip(table[over].tolist(), index[over].tolist(), strict=True))
    hints += _with_common_clusters(source, geometry, (offset, clusters), (table, index))
    unknown = ~known | (mismatches.stored[slots] == 0)
    # Of several snapshots the last is the nearest to the disk.
    order = np.argsort(theirs.snapshot[kept][unknown], kind="stable")
    late = dict(zip(index[unknown][order].tolist(), table[unknown][order].tolist(), strict=True))
    return hints, [(each, window) for window, each in late.items()]


def _with_common_clusters(
    source: Source, geometry: Geometry, mine: tuple[I64, I32], theirs: tuple[I64, I64]
) -> list[tuple[int, int]]:
    """Tables that lead to a cluster at the same entry as a snapshot's: no other place has it."""
    offset, clusters = mine
    order = np.argsort(theirs[0], kind="stable")
    table, index = theirs[0][order], theirs[1][order]
    there = present_tables(source, table, geometry.cluster_size, anyway=0)
    table, index = table[there], index[there]
    flat = clusters.reshape(-1)
    filled = np.flatnonzero(flat > 0)
    filled = filled[np.argsort(flat[filled], kind="stable")]
    leads, found = flat[filled], set()
    for part, rows in read_tables(source, table, geometry.cluster_size):
        words, _ = entries.split_entries(entries.decode_words(rows), geometry.extended_l2)
        types = entries.cluster_types(words, geometry)
        host = (entries.l2_offsets(words) >> geometry.cluster_bits).astype(np.int32)
        host[types != ClusterType.NORMAL] = 0
        at, entry = np.nonzero(host)
        wanted = host[at, entry]
        place = np.minimum(np.searchsorted(leads, wanted), max(0, len(leads) - 1))
        hit = (leads[place] == wanted) if len(leads) else np.zeros(len(wanted), dtype=np.bool_)
        own, own_entry = np.divmod(filled[place[hit]], clusters.shape[1])
        same = own_entry == entry[hit]
        pair = np.unique(np.stack((own[same], index[part][at[hit][same]])), axis=1)
        found |= set(zip(offset[pair[0]].tolist(), pair[1].tolist(), strict=True))
    return sorted(found)


class Finder:
    """Tells the L2 tables of the disk among clusters that nothing leads to."""

    def __init__(self, source: Source, report: Report, layout: Layout) -> None:
        self._source, self._geometry = source, layout.geometry
        self._looker = looker_of(source, report)
        self._found: list[int] = []

    def look(self, clusters: I64, rows: U8) -> None:
        """Note those among some clusters that are tables."""
        at = np.flatnonzero(self._looker.are_tables(rows))
        if len(at) and len(self._found) < MAX_TABLES:
            self._found += clusters[at[_are_own(rows[at], self._geometry)]].tolist()

    def tables(self) -> tuple[I64, bool]:
        """Their offsets in the file, ascending; without those that lead to tables themselves, and
        whether there are any of these.
        """
        found = np.array(sorted(self._found), dtype=np.int64)
        bits = self._geometry.cluster_bits
        if not len(found):
            return found, False
        is_l1 = np.zeros(len(found), dtype=np.bool_)
        for part, rows in read_tables(self._source, found << bits, 1 << bits):
            words = entries.decode_words(rows)
            targets = entries.l1_offsets(words) >> bits
            hits = is_among(targets.reshape(-1), found).reshape(targets.shape) & (targets > 0)
            filled = np.count_nonzero(words, axis=1)
            is_l1[part] = hits.sum(axis=1) * 2 > filled
        return found[~is_l1] << bits, bool(is_l1.any())


def _are_own(rows: U8, geometry: Geometry) -> Mask:
    words, _ = entries.split_entries(entries.decode_words(rows), geometry.extended_l2)
    types = entries.cluster_types(words, geometry)
    copied = (words >= np.uint64(entries.COPIED)) & entries.has_host_cluster(types)
    packed = types == ClusterType.COMPRESSED
    result: Mask = np.logical_or(copied, packed).any(axis=1)
    return result


def read_clusters(source: Source, offsets: I64, geometry: Geometry) -> tuple[I32, Mask]:
    """Of each entry of the tables at *offsets* what ``clusters`` and ``own`` of `Tables` say."""
    result = np.zeros((len(offsets), geometry.l2_entries), dtype=np.int32)
    own = np.zeros(result.shape, dtype=np.bool_)
    for part, rows in read_tables(source, offsets, geometry.cluster_size):
        words, bitmaps = entries.split_entries(entries.decode_words(rows), geometry.extended_l2)
        types = entries.cluster_types(words, geometry)
        host = entries.l2_offsets(words) >> geometry.cluster_bits
        host[host << geometry.cluster_bits >= source.size] = 0
        if bitmaps is not None:
            host[(bitmaps & np.uint64(entries.SUBCLUSTERS_ALLOCATED)) == 0] = 0
        found = np.where(types == ClusterType.NORMAL, host, NOWHERE)
        found[entries.reads_as_zeros(types)] = ZEROS
        found[types == ClusterType.COMPRESSED] = PACKED
        result[part], own[part] = found, words >= np.uint64(entries.COPIED)
    return result, own
