"""Which leaked clusters are those of bitmaps: no guest's data was there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planner.arrays import (
    I64,
    U64,
    Mask,
    distinct,
    distinct_columns,
    expand_ranges,
    is_among,
)
from planner.check.report import Report
from planner.errors import ImageError
from planner.findings.kinds import FindingKind
from planner.metadata.work_limits import followed_tables
from planner.qcow2 import entries
from planner.qcow2.bitmaps import list_bitmaps
from planner.qcow2.extensions import BITMAPS, decode_bitmaps
from planner.source import Source, words_of_tables


@dataclass(frozen=True, slots=True)
class _Table:
    """A bitmap table of ``size`` entries at ``offset``, bytes, and those that are not zero."""

    offset: int
    size: int
    index: I64
    word: U64


@dataclass(frozen=True, slots=True)
class Bitmaps:
    """What the header's extension leads to. ``spans``: offset and length of directory and tables.
    ``is_whole``: whether the directory can be read to its end.
    """

    spans: tuple[tuple[int, int], ...] = ()
    tables: tuple[_Table, ...] = ()
    is_whole: bool = True


def bitmaps_of(source: Source, report: Report) -> Bitmaps:
    """What there is of them."""
    layout = report.layout
    if layout is None:
        return Bitmaps()
    raw = [each for each in layout.extensions.all if each.magic == BITMAPS]
    if not raw:
        return Bitmaps()
    try:
        pointer = decode_bitmaps(raw[-1].data, layout.header)
    except ImageError:
        return Bitmaps(is_whole=False)
    listed = list_bitmaps(source, pointer, report.geometry)
    offset, size = listed.entries.select(listed.is_sound).tables()
    spans = [(pointer.bitmap_directory_offset, pointer.bitmap_directory_size)]
    spans += zip(offset.tolist(), (size * 8).tolist(), strict=True)
    some = followed_tables(offset, size, source.size) & (offset < source.size)
    # Tables of several bitmaps may be one.
    places, _ = distinct_columns(np.stack((offset[some].astype(np.int64), size[some])))
    table, index, word = words_of_tables(source, *places)
    bounds = np.searchsorted(table, np.arange(places.shape[1] + 1)).tolist()
    tables = tuple(
        _Table(at, count, index[low:high], word[low:high])
        for (at, count), low, high in zip(places.T.tolist(), bounds, bounds[1:], strict=False)
    )
    is_whole = listed.error is None and bool(listed.is_sound.all())
    return Bitmaps(tuple(spans), tables, is_whole)


def bitmap_clusters(report: Report, end: int, found: Bitmaps) -> tuple[I64, bool]:
    """The clusters of the bitmaps that the header names, vouched for or not, ascending; and whether
    their directory can be read to its end. *end*: of the file.

    A program that knows nothing of bitmaps leaves them behind like that.
    """
    bits = report.geometry.cluster_bits
    clusters = [np.zeros(0, dtype=np.int64)]
    clusters += [_hosts(table) >> bits for table in found.tables]
    for offset, length in found.spans:
        stop = min(offset + length, end)
        clusters.append(np.arange(offset >> bits, max(offset, stop + (1 << bits) - 1) >> bits))
    return distinct(np.concatenate(clusters)), found.is_whole


def lost_bitmap_clusters(report: Report, end: int, bitmaps: Bitmaps, leaked: I64) -> I64:
    """Those of *leaked*, ascending, that entries of bitmap tables led to before they were damaged.

    QEMU stores a bitmap as it goes, cluster behind cluster, and its table behind them: so the
    neighbours of an entry say where it led to.
    """
    found = [np.zeros(0, dtype=np.int64)]
    contested = distinct(report.findings.of(FindingKind.MULTIPLE_OWNERS).host_offset)
    for table in bitmaps.tables:
        found += _led_to(table, _are_sound(table, report, end, contested), report, leaked)
    clusters = distinct(np.concatenate(found))
    return clusters[is_among(clusters, leaked)]


def _led_to(table: _Table, are_sound: Mask, report: Report, leaked: I64) -> Iterator[I64]:
    """Where the damaged entries of a table led to, and those that are zero between two others."""
    bits = report.geometry.cluster_bits
    has_cluster = table.word > np.uint64(entries.BITMAP_ALL_ONES)
    # Behind the last entry is the table itself.
    index = np.append(table.index[has_cluster], table.size)
    cluster = np.append(_hosts(table)[has_cluster], table.offset) >> bits
    sound = np.flatnonzero(np.append(are_sound[has_cluster], True))
    damaged = np.setdiff1d(np.arange(len(index)), sound)
    after = np.searchsorted(sound, damaged)
    following = sound[after]
    yield cluster[following] - (following - damaged)
    has_before = after > 0
    before = sound[after[has_before] - 1]
    yield cluster[before] + (damaged[has_before] - before)
    # What fits exactly between two, and has an entry there that says nothing.
    low, high = sound[:-1], sound[1:]
    gap = cluster[high] - cluster[low] - 1
    fits = (high - low == 1) & (gap > 0) & (gap < index[high] - index[low])
    first, last = (
        np.searchsorted(leaked, places[fits]) for places in (cluster[low] + 1, cluster[high])
    )
    whole = last - first == gap[fits]
    yield leaked[expand_ranges(first[whole], last[whole] - 1)]


def _hosts(table: _Table) -> I64:
    return (table.word & np.uint64(entries.BITMAP_OFFSET)).astype(np.int64)


def _are_sound(table: _Table, report: Report, end: int, contested: I64) -> Mask:
    """Which entries lead to a cluster that may be the bitmap's, and no other's."""
    host = _hosts(table)
    sound: Mask = ~entries.bad_bitmap_entries(table.word, report.geometry)
    sound &= (host != 0) & (host < end) & ~is_among(host, contested)
    return sound
