"""That every owner reads what it read, where entries lead to other places than before.

The proof of a repair that moves things: entry by entry of every table that it touches, the bytes
behind it before and after.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from planner.arrays import I64, U64, Mask, distinct_columns
from planner.check.report import Report
from planner.findings.kinds import Structure
from planner.metadata.mapping_tables import L1Entries, L1Tables, read_l1_tables
from planner.qcow2 import entries
from planner.qcow2.geometry import Geometry
from planner.source import Source, present_tables, read_tables

PIECE_BYTES = 1 << 16
"""Of large tables so much is compared at a time, where anything is."""


def differing_entry(
    sources: tuple[Source, Source], reports: tuple[Report, Report], touched: I64
) -> str | None:
    """What leads to other bytes than before, in words; None where nothing does.

    *sources*, *reports*: before, and after. *touched*: the clusters in which anything is written,
    none of which a guest has data in.
    """
    old, new = (
        _l1_entries(source, report) for source, report in zip(sources, reports, strict=True)
    )
    is_same = np.array_equal(old.snapshot, new.snapshot)
    if not is_same or not np.array_equal(old.l1_index, new.l1_index):
        return "an L1 table would have other entries"
    beside = ~np.uint64(entries.L1_OFFSET | entries.COPIED)
    if not np.array_equal(old.offset != 0, new.offset != 0):
        return "an L1 entry would lead to a table, or to none any more"
    if not np.array_equal(old.word & beside, new.word & beside):
        return "an L1 entry would say something else"
    pairs, _ = distinct_columns(np.stack((old.offset, new.offset)))
    bits = reports[0].geometry.cluster_bits
    is_touched = (pairs[0] != pairs[1]) | np.isin(pairs[1] >> bits, touched)
    for where in _differences(sources, pairs[:, is_touched], reports[0].geometry):
        return where
    return None


def _l1_entries(source: Source, report: Report) -> L1Entries:
    regions = report.regions
    tables = regions.select(regions.structure == Structure.L1_TABLE)
    order = np.argsort(tables.snapshot, kind="stable")
    columns = (tables.snapshot[order], tables.offset[order], tables.size[order] // 8)
    return read_l1_tables(source, L1Tables(*columns))


def _differences(sources: tuple[Source, Source], pairs: I64, geometry: Geometry) -> Iterator[str]:
    """The pairs of L2 tables (host offsets before, after) of which an entry reads otherwise."""
    size = geometry.cluster_size
    piece = min(size, PIECE_BYTES)
    pairs = pairs[:, _is_any_there(sources, pairs, size)]
    if piece < size:
        pairs = (pairs[:, :, None] + np.arange(0, size, piece)).reshape(2, -1)
        pairs = pairs[:, _is_any_there(sources, pairs, piece)]
    for part, rows in read_tables(sources[0], pairs[0], piece):
        before = rows.copy()
        for inner, after in read_tables(sources[1], pairs[1][part], piece):
            one = before[inner].view(">u8").astype(np.uint64)
            other = after.view(">u8").astype(np.uint64)
            if not _reads_alike(sources, one, other, geometry):
                where = int(pairs[0][part][inner][0]) // size * size
                yield f"an entry of the L2 table at {where} or behind it"


def _is_any_there(sources: tuple[Source, Source], pairs: I64, size: int) -> Mask:
    """Of which pairs of places, *size* bytes long, either may be more than a hole: two holes say
    the same, and there may be gigabytes of them."""
    found = np.zeros(pairs.shape[1], dtype=np.bool_)
    for source, offsets in zip(sources, pairs, strict=True):
        order = np.argsort(offsets, kind="stable")
        found[order] |= present_tables(source, offsets[order], size)
    return found


def _reads_alike(sources: tuple[Source, Source], one: U64, other: U64, geometry: Geometry) -> bool:
    """Whether the entries of tables (tables, words) read the same bytes."""
    (one, bitmaps), (other, more) = (
        entries.split_entries(words, geometry.extended_l2) for words in (one, other)
    )
    if bitmaps is not None and more is not None and not np.array_equal(bitmaps, more):
        return False
    differs = np.flatnonzero(((one ^ other) & ~np.uint64(entries.COPIED)).reshape(-1))
    one, other = one.reshape(-1)[differs], other.reshape(-1)[differs]
    place = np.uint64(entries.L2_OFFSET | entries.COPIED)
    placed = entries.has_host_cluster(entries.cluster_types(one, geometry))
    if not placed.all() or not np.array_equal(one & ~place, other & ~place):
        return False
    offsets = (entries.l2_offsets(words) for words in (one, other))
    was, would_be = (
        read_tables(source, offset, geometry.cluster_size)
        for source, offset in zip(sources, offsets, strict=True)
    )
    return all(
        np.array_equal(content, copy) for (_, content), (_, copy) in zip(was, would_be, strict=True)
    )
