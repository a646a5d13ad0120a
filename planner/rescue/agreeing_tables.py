"""Tables that a header could lead to, found in a file by what they must agree on.

A refcount table's first block counts cluster 0 and the table itself, an L1 table leads to tables,
a snapshot table can be read to its end. What is wrong under a header that leads to them is for a
check to say (`planner.rescue.headers`).
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np

from planner.arrays import I64, U64, distinct
from planner.errors import ImageError
from planner.metadata.gone_tables import GoneTables
from planner.qcow2 import entries
from planner.qcow2.geometry import Geometry
from planner.qcow2.header import MAGIC, MAX_REFCOUNT_ORDER, V3_LENGTH, Header, Incompatible
from planner.qcow2.layout import MAX_L1_BYTES
from planner.qcow2.refcounts import counts_from, read_refcount_in_block
from planner.qcow2.snapshots import MAX_SNAPSHOTS, read_snapshots
from planner.rescue.scan import Sectors
from planner.source import SECTOR, Source, nonzero_words, read_bytes, read_tables

MAX_CANDIDATES = 8
"""Tables of one sort that are tried for one cluster size, the likeliest first."""

MANY_BYTES, SAMPLE, SAMPLE_BYTES, SHARE = 16 << 20, 64, 4096, 8
"""Of an L1 table that leads to so many bytes, so many clusters are looked at, no more than so many
bytes of each: one in so many has to look like a table.
"""


@dataclass(frozen=True, slots=True)
class HeaderTables:
    """Where the tables are, for clusters of 2^``bits`` bytes."""

    bits: int
    order: int
    reftable_offset: int
    reftable_clusters: int
    l1_offset: int
    l1_clusters: int
    l1_used: int
    snapshots_offset: int = 0
    snapshots: int = 0

    def header(self, extended: bool) -> Header:
        geometry = Geometry(3, self.bits, self.order, 0, extended_l2=extended)
        return Header(
            magic=MAGIC,
            version=3,
            backing_file_offset=0,
            backing_file_size=0,
            cluster_bits=self.bits,
            size=self.l1_used * geometry.l2_coverage,
            crypt_method=0,
            l1_size=self.l1_clusters << self.bits >> 3,
            l1_table_offset=self.l1_offset,
            refcount_table_offset=self.reftable_offset,
            refcount_table_clusters=self.reftable_clusters,
            nb_snapshots=self.snapshots,
            snapshots_offset=self.snapshots_offset,
            incompatible_features=int(Incompatible.EXTENDED_L2) if extended else 0,
            refcount_order=self.order,
            header_length=V3_LENGTH,
        )


def leads_to_data(source: Source, tables: HeaderTables) -> bool:
    """Whether what seems to be an L1 table leads to very many clusters, and hardly to tables.

    To check that takes as long as there is data; an L2 table is one, and what it runs on to.
    """
    _, words = nonzero_words(source, tables.l1_offset, tables.l1_clusters << tables.bits >> 3)
    leads = distinct(entries.l1_offsets(words))
    leads = leads[(leads > 0) & (leads < source.size)]
    if len(leads) << tables.bits < MANY_BYTES:
        return False
    sample = leads[:: -(-len(leads) // SAMPLE)]
    are_tables = np.zeros(len(sample), dtype=np.bool_)
    size = min(1 << tables.bits, SAMPLE_BYTES)
    for extended in (False, True):
        gone = GoneTables(tables.header(extended).geometry, source.size)
        for part, rows in read_tables(source, sample, size):
            bad, filled = gone.counts(rows)
            are_tables[part] |= bad * 2 <= filled
    return bool(np.count_nonzero(are_tables) * SHARE < len(sample))


def agreeing_tables(source: Source, sectors: Sectors, bits: int) -> Iterator[HeaderTables]:
    """Tables for clusters of 2^*bits* bytes that agree with each other, the likeliest first.

    *sectors*: of the scan of *source*.
    """
    size = 1 << bits
    aligned = sectors.number[sectors.aligned(bits)]
    clusters = np.unique(aligned * SECTOR >> bits)
    reftables = list(itertools.islice(find_reftables(source, clusters, bits), MAX_CANDIDATES))
    if not reftables:
        return
    tables = _l1_tables(source, clusters, bits)
    starts = sectors.snapshots * SECTOR
    starts = starts[starts % size == 0][:MAX_CANDIDATES].tolist()
    count_at = cache(partial(snapshots_at, source, bits))
    for (offset, order), (l1, used) in itertools.product(reftables, tables):
        plain = HeaderTables(bits, order, offset, 1, l1, max(1, -(-used * 8 // size)), used)
        for start in starts:
            count = count_at(start)
            if count:
                yield replace(plain, snapshots_offset=start, snapshots=count)
        yield plain


def find_reftables(source: Source, clusters: I64, bits: int) -> Iterator[tuple[int, int]]:
    """(offset, refcount order) of tables whose first block counts cluster 0 and the table."""
    size = 1 << bits
    for cluster in clusters.tolist():
        index, words = nonzero_words(source, cluster << bits, size // 8)
        if not len(words) or index[0] or not _leads_to_clusters(words, bits):
            continue
        block = np.frombuffer(read_bytes(source, int(words[0]), size), dtype=np.uint8)
        for order in range(MAX_REFCOUNT_ORDER + 1):
            own = int(words[0]) >> bits
            inside = np.array([at for at in (0, cluster, own) if at < size << 3 >> order])
            counts = read_refcount_in_block(block, inside, order)
            beyond = -(-source.size // size)
            if (counts == 1).all() and not counts_from(block, beyond, order):
                yield cluster << bits, order


def _leads_to_clusters(words: U64, bits: int) -> bool:
    """Whether they are offsets of clusters and nothing else, none of them twice."""
    is_plain = ((words & np.uint64((1 << bits) - 1)) == 0) & (words <= np.uint64(entries.L1_OFFSET))
    return bool(is_plain.all()) and len(np.unique(words)) == len(words)


def _l1_tables(source: Source, clusters: I64, bits: int) -> list[tuple[int, int]]:
    """(offset, entries up to the last in use) of what could be an L1 table, the likeliest first."""
    size, found = 1 << bits, []
    known = set(clusters.tolist())
    for cluster in clusters.tolist():
        index, words = nonzero_words(source, cluster << bits, size // 8)
        if not len(words) or (words & np.uint64(1)).any():
            continue
        leads = entries.l1_offsets(words) >> bits
        to_tables = sum(target in known for target in leads.tolist())
        found.append((-to_tables, len(words), cluster << bits, int(index[-1]) + 1))
    return [(offset, used) for *_, offset, used in sorted(found)[:MAX_CANDIDATES]]


def longer_tables(source: Source, tables: HeaderTables, leaked: I64) -> HeaderTables | None:
    """*tables*, of which one runs on into what is counted and nobody's; None where none does.

    *leaked*: the clusters that leak under *tables*, ascending.
    """
    first = tables.l1_offset >> tables.bits
    before, after = _run_to(leaked, first), _run_from(leaked, first + tables.l1_clusters)
    low, high = first - before, first + tables.l1_clusters + after
    low, high = _bounds(source, tables.bits, first, low, high)
    if high - low > tables.l1_clusters:
        offset = low << tables.bits
        index, _ = nonzero_words(source, offset, high - low << tables.bits >> 3)
        if not len(index):  # what is there reads as zeros under the header that was tried first
            return None
        used = int(index[-1]) + 1
        return replace(tables, l1_offset=offset, l1_clusters=high - low, l1_used=used)
    after = (tables.reftable_offset >> tables.bits) + tables.reftable_clusters
    more = _run_from(leaked, after)
    return replace(tables, reftable_clusters=tables.reftable_clusters + more) if more else None


def _bounds(source: Source, bits: int, inside: int, low: int, high: int) -> tuple[int, int]:
    """Of clusters *low* to *high* those that one L1 table can be with cluster *inside* in it.

    It ends where its own entries lead to, and at a word that is no entry.
    """
    room = MAX_L1_BYTES >> bits
    low, high = max(low, inside - room), min(high, inside + room)
    index, words = nonzero_words(source, low << bits, high - low << bits >> 3)
    at = low + (index >> bits - 3)
    target = entries.l1_offsets(words) >> bits
    is_entry = ((words & np.uint64(entries.L1_RESERVED)) == 0) & (
        (words & np.uint64((1 << bits) - 1)) == 0
    )
    behind = np.concatenate((target[is_entry & (target > at) & (target > inside)], [high]))
    behind = np.concatenate((behind, at[~is_entry & (at > inside)]))
    before = np.concatenate((target[is_entry & (target < at) & (target < inside)], [low - 1]))
    before = np.concatenate((before, at[~is_entry & (at < inside)]))
    low, high = int(before.max()) + 1, int(behind.min())
    return low, min(high, low + room)


def snapshots_at(source: Source, bits: int, offset: int) -> int:
    """How many entries of a snapshot table follow each other at *offset*."""
    header = HeaderTables(bits, 0, 0, 1, 0, 1, 1, snapshots_offset=offset).header(extended=False)
    size = header.geometry.cluster_size

    def sound(asked: int) -> int:
        """Of so many the first that are; -1 where one cannot be read."""
        tried = replace(header, nb_snapshots=asked)
        try:
            listed = read_snapshots(source, tried, tried.geometry).snapshots
        except ImageError:
            return -1
        for count, each in enumerate(listed):
            is_one = each.l1_table_offset and each.l1_table_offset % size == 0
            if not is_one or each.l1_table_offset >= source.size or not each.l1_size:
                return count
        return asked

    low, asked = 0, 1
    while (found := sound(asked)) == asked < MAX_SNAPSHOTS:
        low, asked = asked, 2 * asked
    if found >= 0:
        return found
    return low + bisect_left(range(low, asked), True, key=lambda count: sound(count + 1) <= count)


def _run_to(clusters: I64, first: int) -> int:
    """How many of ascending *clusters* follow each other up to *first*, without it."""
    end = int(np.searchsorted(clusters, first))
    return bisect_left(range(end), True, key=lambda at: clusters[end - 1 - at] + at < first - 1)


def _run_from(clusters: I64, first: int) -> int:
    """How many of ascending *clusters* follow each other from *first* on."""
    start = int(np.searchsorted(clusters, first))
    left = range(len(clusters) - start)
    return bisect_left(left, True, key=lambda at: clusters[start + at] - at > first)
