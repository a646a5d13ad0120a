"""The L2 tables of a disk: those that have a place, those that lost it, and the places left.

A table that nothing leads to is one of the disk's own if one of its entries has the COPIED flag, or
leads to what is compressed: those of snapshots have none, nor have old refcounts and bitmaps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from planner.arrays import I64, U8, U64, Mask, distinct, distinct_columns, is_among
from planner.check.classify import DAMAGED_PART, Parts
from planner.check.refcount_comparison import Mismatches
from planner.check.report import Report
from planner.findings.kinds import ACTIVE, FindingKind, Structure
from planner.metadata.gone_tables import GoneTables
from planner.qcow2 import entries
from planner.qcow2.entries import ClusterType
from planner.qcow2.geometry import Geometry
from planner.qcow2.header import Header
from planner.qcow2.layout import Layout
from planner.rescue.placing.grid import Grid, read_grid
from planner.rescue.scanned import PIECE_BYTES
from planner.source import Source, nonzero_words, present_pieces, read_tables
from planner.triage.triage import looker_of

NO_WINDOW, A_SNAPSHOTS = -1, -2
"""Instead of a window: it is not known; it is a snapshot's, and perhaps the disk's too."""

MAX_TABLES = 1 << 16
"""That are looked at, of an image: 32 TiB of the usual ones."""


def no_hints() -> I64:
    """Of no table."""
    return np.zeros((2, 0), dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """L2 tables in columns, ascending by ``offset``, their place in the file.

    ``grid``: where their entries lead. ``window``: the L1 index that leads there; `NO_WINDOW` or
    `A_SNAPSHOTS` for those that lost theirs. ``windows``: how many the disk has. ``hints``: tables
    and windows, (2, n), of lost ones whose place a snapshot shows; ``late``: of those that are a
    snapshot's, and the disk's too if nothing else belongs there.
    """

    geometry: Geometry
    offset: I64
    grid: Grid
    window: I64
    windows: int
    hints: I64 = field(default_factory=no_hints)
    late: I64 = field(default_factory=no_hints)

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
    sound[at] = _are_zeros_or_tables(source, offset[at], geometry, report)
    return sound


def _are_zeros_or_tables(source: Source, offset: I64, geometry: Geometry, report: Report) -> Mask:
    """Which clusters at *offset*, ascending, hold tables of which enough is left, or nothing."""
    looker, gone = looker_of(source, report), GoneTables(geometry, source.size)
    found, of = [Parts.none()], [np.zeros(0, dtype=np.int64)]
    bad, filled = np.zeros((2, len(offset)), dtype=np.int64)
    for pieces, rows in read_pieces(source, offset, geometry):
        of.append(np.searchsorted(offset, pieces, side="right") - 1)
        found.append(looker.parts(rows))
        for total, count in zip((bad, filled), gone.counts(rows), strict=True):
            np.add.at(total, of[-1], count)
    parts = Parts.concatenate(found).joined(np.concatenate(of), len(offset))
    sound: Mask = (parts.filled == 0) | parts.are_tables()
    sound &= bad * 2 <= filled
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


def read_pieces(source: Source, offsets: I64, geometry: Geometry) -> Iterator[tuple[I64, U8]]:
    """What there is of the clusters at *offsets*, ascending, some at a time.

    The offsets of pieces of clusters that are no holes, and their bytes: a cluster each, or
    `PIECE_BYTES` of it.
    """
    size = min(PIECE_BYTES, geometry.cluster_size)
    pieces = present_pieces(source, offsets, geometry.cluster_size, size)
    for part, rows in read_tables(source, pieces, size):
        yield pieces[part], rows


def snapshot_hints(
    source: Source, report: Report, offset: I64, grid: Grid, is_vacant: Mask
) -> tuple[I64, I64]:
    """What the L1 tables of snapshots show of vacant windows of the disk: tables, by their offsets,
    and windows, (2, n). *is_vacant*: which of the windows are.

    Tables that the disk had in common with a snapshot, which are counted once too often, at the
    index that they have there. Of tables at *offset* that wait, those that lead to the same
    clusters as a snapshot's at one index. And apart from these tables of which that is not known,
    since their refcounts are lost.
    """
    mismatches, layout = report.mismatches, report.layout
    if mismatches is None or layout is None or not len(report.snapshots):
        return no_hints(), no_hints()
    geometry, regions = report.geometry, report.regions
    theirs = regions.select(
        (regions.structure == Structure.L2_TABLE) & (regions.snapshot != ACTIVE)
    )
    table, index = theirs.offset, theirs.l1_index
    # As of the disk's own: what is not aligned is no table. Those that are do not overlap.
    kept = (index < len(is_vacant)) & (table % geometry.cluster_size == 0)
    kept[kept] = is_vacant[index[kept]]
    table, index = table[kept], index[kept]
    cluster = table >> geometry.cluster_bits
    slots, known = mismatches.index.find(cluster)
    over = known & (mismatches.stored[slots] > mismatches.counted[slots])
    common = _with_common_clusters(source, geometry, (offset, grid), (table, index))
    hints = np.concatenate((np.stack((table[over], index[over])), common), axis=1)
    unknown = ~known | (mismatches.stored[slots] == 0)
    # Of several snapshots the last is the nearest to the disk.
    order = np.argsort(theirs.snapshot[kept][unknown], kind="stable")
    table, index = table[unknown][order], index[unknown][order]
    _, first = np.unique(index, return_index=True)
    window, last = np.unique(index[::-1], return_index=True)
    late = np.stack((table[::-1][last], window))
    return hints, late[:, np.argsort(first)]


def _with_common_clusters(
    source: Source, geometry: Geometry, mine: tuple[I64, Grid], theirs: tuple[I64, I64]
) -> I64:
    """Tables that lead to a cluster at the same entry as a snapshot's: no other place has it."""
    offset, grid = mine
    own = grid.filled(np.arange(len(offset)))
    order = np.argsort(own.cluster, kind="stable")
    leads = own.cluster[order]
    if not len(leads):
        return no_hints()
    other = read_grid(source, theirs[0], geometry).filled(np.arange(len(theirs[0])))
    place = np.minimum(np.searchsorted(leads, other.cluster), len(leads) - 1)
    hit = leads[place] == other.cluster
    at = order[place[hit]]
    same = own.entry[at] == other.entry[hit]
    pair = np.stack((offset[own.table[at[same]]], theirs[1][other.table[hit][same]]))
    return distinct_columns(pair)[0]


class Finder:
    """Tells the L2 tables of the disk among clusters that nothing leads to."""

    def __init__(self, source: Source, report: Report, layout: Layout) -> None:
        self._source, self._geometry = source, layout.geometry
        self._looker = looker_of(source, report)
        self._found: list[tuple[I64, Parts]] = []

    def look(self, pieces: I64, rows: U8) -> None:
        """Note what pieces of clusters, ascending, have of tables."""
        self._found.append((pieces, self._looker.parts(rows)))

    @property
    def reach(self) -> int:
        """How far what is taken for an entry leads at most, bytes."""
        return self._looker.reach

    @property
    def parts(self) -> int:
        """How many parts there are by now, for `since`."""
        return len(self._found)

    def since(self, parts: int) -> I64:
        """Of what came after so many *parts*, the pieces without which no cluster is a table."""
        kept = [np.zeros(0, dtype=np.int64)]
        for pieces, each in self._found[parts:]:
            kept.append(pieces[(each.filled > 0) & (each.bad * DAMAGED_PART <= each.filled)])
        return np.concatenate(kept)

    def tables(self) -> tuple[I64, bool]:
        """Their offsets in the file, ascending; without those that lead to tables themselves, and
        whether there are any of these.
        """
        size = self._geometry.cluster_size
        if not self._found:
            return np.zeros(0, dtype=np.int64), False
        cluster = np.concatenate([pieces for pieces, _ in self._found]) // size
        parts = Parts.concatenate([each for _, each in self._found])
        clusters = distinct(cluster)
        of = np.searchsorted(clusters, cluster)
        likely = clusters[parts.joined(of, len(clusters)).are_tables()]
        found = likely[self._are_own(likely)][:MAX_TABLES]
        if not len(found):
            return found, False
        is_l1 = self._are_l1(found)
        return found[~is_l1] * size, bool(is_l1.any())

    def _are_own(self, clusters: I64) -> Mask:
        """Which of *clusters*, the few that look like tables, are of the disk's own."""
        result = np.zeros(len(clusters), dtype=np.bool_)
        offsets = clusters << self._geometry.cluster_bits
        for pieces, rows in read_pieces(self._source, offsets, self._geometry):
            of = np.searchsorted(offsets, pieces, side="right") - 1
            result[of[_are_own(rows, self._geometry)]] = True
        return result

    def _are_l1(self, found: I64) -> Mask:
        """Which of the clusters *found* lead to the others, with half of their words or more."""
        bits = self._geometry.cluster_bits
        hits, filled = np.zeros((2, len(found)), dtype=np.int64)
        for pieces, rows in read_pieces(self._source, found << bits, self._geometry):
            words = entries.decode_words(rows)
            targets = entries.l1_offsets(words) >> bits
            hit = is_among(targets.reshape(-1), found).reshape(targets.shape) & (targets > 0)
            of = np.searchsorted(found, pieces >> bits)
            np.add.at(hits, of, hit.sum(axis=1))
            np.add.at(filled, of, np.count_nonzero(words, axis=1))
        is_l1: Mask = hits * 2 > filled
        return is_l1


def _are_own(rows: U8, geometry: Geometry) -> Mask:
    words, _ = entries.split_entries(entries.decode_words(rows), geometry.extended_l2)
    types = entries.cluster_types(words, geometry)
    copied = (words >= np.uint64(entries.COPIED)) & entries.has_host_cluster(types)
    packed = types == ClusterType.COMPRESSED
    result: Mask = np.logical_or(copied, packed).any(axis=1)
    return result
