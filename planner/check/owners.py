"""Who uses a cluster: a second walk that answers for the clusters that findings are about.

The census counts; only for clusters that look wrong is it worth knowing every user.
"""

from __future__ import annotations

import numpy as np

from planner.arrays import I64, U64, Mask, expand_ranges, rows_in_order
from planner.findings.kinds import NONE, OWNER_DTYPES, Owners, Structure
from planner.metadata.cluster_counters import ClusterIndex
from planner.metadata.mapping_tables import L1Entries, L2Tables, TableParts
from planner.metadata.regions import Regions
from planner.metadata.work_limits import LIMITS
from planner.progress import Meter
from planner.qcow2 import entries
from planner.qcow2.entries import ClusterType
from planner.qcow2.geometry import Geometry
from planner.source import Source


class OwnersFinder:
    """Collects the owners of the clusters whose slot is true in *wanted*; no more than *most*."""

    def __init__(
        self,
        geometry: Geometry,
        index: ClusterIndex,
        wanted: Mask,
        l1: L1Entries,
        tables: L2Tables,
        *,
        most: int = LIMITS.owners,
    ) -> None:
        self._most = most
        self._geometry, self._index, self._wanted = geometry, index, wanted
        self._l1, self._tables = l1, tables
        order = np.argsort(tables.l1_position, kind="stable")
        self._referrers = order
        self._referrer_start = np.searchsorted(
            tables.l1_position[order], np.arange(len(tables) + 1)
        )
        self._rows: list[tuple[np.ndarray, ...]] = []
        self._found = 0
        self.truncated = False

    def add_regions(self, regions: Regions) -> None:
        """Owners that are metadata."""
        bits = self._geometry.cluster_bits
        first, last = regions.first(bits), regions.last(bits)
        clusters = expand_ranges(first, last) if len(first) else first
        which = np.repeat(np.arange(len(first)), last - first + 1)
        hit = self._hits(clusters)
        clusters, which = clusters[hit], which[hit]
        l2 = regions.structure[which] == Structure.L2_TABLE
        chosen = regions.select(which[~l2])
        self._keep(
            clusters[~l2],
            chosen.structure,
            chosen.snapshot,
            chosen.l1_index,
            np.full(len(chosen.offset), NONE),
            chosen.index,
        )
        tables = np.searchsorted(self._tables.offset, regions.offset[which[l2]])
        at, referrer = self._expand(tables)
        self._keep(
            clusters[l2][at],
            np.full(len(at), Structure.L2_TABLE),
            self._l1.snapshot[referrer],
            self._l1.l1_index[referrer],
            np.full(len(at), NONE),
            np.full(len(at), NONE),
        )

    def add_entries(self, source: Source, which: I64, meter: Meter) -> None:
        """Owners that are guest clusters, from the L2 tables at positions *which*."""
        parts = TableParts.of(source, self._tables.offset[which], self._geometry.cluster_size)
        first = parts.inside // self._geometry.l2_entry_size
        for part, rows in parts.read(source):
            if self.truncated:
                return
            words, _ = entries.split_entries(entries.decode_words(rows), self._geometry.extended_l2)
            self._add_batch(which[parts.table[part]], first[part], words)
            meter.advance(rows.size)

    def _add_batch(self, ids: I64, first_entry: I64, rows: U64) -> None:
        """Those in parts of the tables *ids*: the words of these, from their *first_entry* on."""
        if self._geometry.external_data:
            return
        words, width = rows.reshape(-1), rows.shape[1]
        positions = self._may_hit(words)
        word = words[positions]
        types = entries.cluster_types(word, self._geometry)
        packed = types == ClusterType.COMPRESSED
        offset, size = entries.host_ranges(word, types, self._geometry)
        keep = np.flatnonzero(size)
        bits = self._geometry.cluster_bits
        first, last = offset[keep] >> bits, (offset[keep] + size[keep] - 1) >> bits
        entry = np.repeat(keep, last - first + 1)
        clusters = expand_ranges(first, last) if len(first) else first
        hit = self._hits(clusters)
        clusters, entry = clusters[hit], entry[hit]
        row = positions[entry] // width
        at, referrer = self._expand(ids[row])
        entry, row = entry[at], row[at]
        self._keep(
            clusters[at],
            np.where(packed[entry], Structure.COMPRESSED, Structure.DATA),
            self._l1.snapshot[referrer],
            self._l1.l1_index[referrer],
            first_entry[row] + positions[entry] % width,
            np.full(len(at), NONE),
        )

    def _may_hit(self, words: U64) -> I64:
        """Positions of entries that may refer to a wanted cluster: few of many millions."""
        slots, known = self._index.find(entries.l2_offsets(words) >> self._geometry.cluster_bits)
        wanted = self._wanted[slots]
        wanted &= known
        # These reach into more clusters than the one that they begin in.
        inside = entries.L2_OFFSET & (self._geometry.cluster_size - 1)
        wanted |= (words & np.uint64(entries.COMPRESSED | inside)) != 0
        return np.flatnonzero(wanted)

    def _hits(self, clusters: I64) -> I64:
        slots, known = self._index.find(clusters)
        return np.flatnonzero(known & self._wanted[slots])

    def _expand(self, tables: I64) -> tuple[I64, I64]:
        """Every L1 entry that leads to each table: (positions in *tables*, in `L1Entries`)."""
        start, end = self._referrer_start[tables], self._referrer_start[tables + 1]
        if not len(tables):
            return tables, tables
        # One more than there is room for, so that it is known to be too many.
        room = self._most - self._found + 1
        enough = int(np.searchsorted(np.cumsum(end - start), room)) + 1
        start, end = start[:enough], end[:enough]
        at = np.repeat(np.arange(len(start)), end - start)[:room]
        return at, self._referrers[expand_ranges(start, end - 1)[:room]]

    def _keep(self, *columns: np.ndarray) -> None:
        room = self._most - self._found
        if len(columns[0]) > room:
            self.truncated = True
        self._rows.append(tuple(
            column[:room].astype(dtype) for column, dtype in zip(columns, OWNER_DTYPES, strict=True)
        ))  # fmt: skip
        self._found += len(self._rows[-1][0])

    def result(self) -> Owners:
        """All owners found, by cluster."""
        # One column after the other: of a quarter of a million owners each takes two megabytes.
        parts = [list(each) for each in zip(*self._rows, strict=True)]
        self._rows = []
        columns = [np.concatenate(parts.pop(0)) for _ in range(len(parts))]
        # Those of one structure mostly came one after the other.
        order = np.lexsort((columns[1], columns[0]))
        columns = [columns.pop(0)[order] for _ in range(len(columns))]
        within, _ = rows_in_order(*columns[:5])
        cluster, structure, snapshot, l1_index, l2_index, index = (
            columns.pop(0)[within] for _ in range(len(columns))
        )
        return Owners(cluster, structure, snapshot, l1_index, l2_index, index, self.truncated)


def contested_clusters(owners: Owners, width: int) -> tuple[I64, I64]:
    """Clusters with owners that cannot both be right, and how many different owners each has.

    The same guest cluster in several snapshots is one owner; any number of compressed clusters may
    share a host cluster. *width*: entries of an L2 table.
    """
    if not len(owners.cluster):
        return owners.cluster, owners.cluster
    guest = np.isin(owners.structure, (Structure.DATA, Structure.COMPRESSED))
    position = np.where(guest, owners.l1_index * width + owners.l2_index, owners.l1_index)
    own_snapshot = owners.structure == Structure.L1_TABLE
    snapshot = np.where(own_snapshot, owners.snapshot, 0)
    order, new = rows_in_order(owners.cluster, owners.structure, position, snapshot, owners.index)
    cluster, structure = owners.cluster[order][new], owners.structure[order][new]
    start = np.flatnonzero(np.diff(cluster, prepend=NONE))
    number = np.diff(start, append=len(cluster))
    plain = np.logical_or.reduceat(structure != Structure.COMPRESSED, start)
    contested = (number > 1) & plain
    return cluster[start][contested], number[contested]


def first_guest_owners(owners: Owners, clusters: I64, width: int) -> I64:
    """The guest cluster that the first guest owner of each cluster is; `NONE` where none is one.

    *width*: entries of an L2 table.
    """
    result = np.full(len(clusters), NONE)
    guest = np.flatnonzero(np.isin(owners.structure, (Structure.DATA, Structure.COMPRESSED)))
    owned = owners.cluster[guest]
    first = np.searchsorted(owned, clusters)
    known = first < len(owned)
    known[known] = owned[first[known]] == clusters[known]
    at = guest[first[known]]
    result[known] = owners.l1_index[at] * width + owners.l2_index[at]
    return result
