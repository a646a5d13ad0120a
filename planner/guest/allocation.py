"""How much of a disk an image maps, and how much of it lies in the backing file.

Counted, not mapped: a table that many L1 entries lead to is read once, one in a hole not at all.
What a word means to a reader is `planner.guest.mapping`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planner.arrays import I64, U8, U64
from planner.guest.mapping import Flaw, RunKind, Runs, runs_of_entries
from planner.qcow2 import entries
from planner.qcow2.geometry import SECTOR, SUBCLUSTERS_PER_CLUSTER, Geometry
from planner.qcow2.layout import Layout
from planner.source import Source, nonzero_words, present_pieces, read_tables

_RUNS = 1 << 18
_PIECE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Allocation:
    """Guest bytes, by what the tables say of them.

    ``unallocated``: nothing, so that they are read from the backing file, or are zeros without one.
    ``zero``: zeros. ``mapped``: all others, whether they can be read or not.
    """

    unallocated: int
    zero: int
    mapped: int


def disk_allocation(source: Source, layout: Layout) -> Allocation:
    """Of the active disk. Raises whatever *source* raises."""
    header = layout.header
    l1 = nonzero_words(source, header.l1_table_offset, header.l1_size)
    size = header.size // SECTOR * SECTOR
    return allocation(source, layout.geometry, l1, 0, size)


def bytes_in_backing_file(source: Source, layout: Layout) -> int | None:
    """Guest bytes of the active disk that are read from the backing file that the image names.

    None where it names none. What lies past the end of a smaller backing disk is among them: how
    large that is, only the file itself tells.
    """
    return disk_allocation(source, layout).unallocated if layout.backing_file else None


def bytes_in_data_file(source: Source, layout: Layout) -> int | None:
    """Guest bytes of the active disk that are read from the data file; None where none is used."""
    return disk_allocation(source, layout).mapped if layout.geometry.external_data else None


def allocation(
    source: Source, geometry: Geometry, l1: tuple[I64, U64], low: int, high: int
) -> Allocation:
    """Of the guest bytes from *low* to *high*; *l1*: indices and words of an L1 table's entries."""
    coverage = geometry.l2_coverage
    start = np.maximum(l1[0] * coverage, low)
    covered = np.minimum((l1[0] + 1) * coverage, high) - start
    offset = (l1[1] & np.uint64(entries.L1_OFFSET)).astype(np.int64)
    inside = (covered > 0) & (offset != 0)
    start, covered, offset = start[inside], covered[inside], offset[inside]
    misaligned = offset & (geometry.cluster_size - 1) != 0
    totals = np.zeros(len(RunKind), dtype=np.int64)
    totals[RunKind.DAMAGED] = covered[misaligned].sum()
    whole = ~misaligned & (covered == coverage)
    totals += _whole_tables(source, geometry, offset[whole])
    for at in np.flatnonzero(~misaligned & ~whole).tolist():  # the first and the last at most
        first = int(start[at]) % coverage
        for pieces, rows in _read(source, offset[at : at + 1], geometry):
            begin = (pieces - offset[at]) // geometry.l2_entry_size << geometry.cluster_bits
            for skip, piece in zip((first - begin).tolist(), rows, strict=True):
                runs = _runs(piece, geometry).cut(max(0, skip), max(0, skip + int(covered[at])))
                totals += np.bincount(runs.kind, runs.length, len(RunKind)).astype(np.int64)
    zero, accounted = int(totals[RunKind.ZERO]), int(totals.sum())
    unallocated = high - low - accounted + int(totals[RunKind.UNALLOCATED])
    return Allocation(unallocated, zero, high - low - unallocated - zero)


def _whole_tables(source: Source, geometry: Geometry, offset: I64) -> I64:
    """Bytes by `RunKind` that the tables at *offset* map, all of each, as often as it is there.

    Tables in holes are left out: all that they map is unallocated.
    """
    totals = np.zeros(len(RunKind), dtype=np.int64)
    if not len(offset):
        return totals
    ordered = np.sort(offset)
    first = np.flatnonzero(np.diff(ordered, prepend=-1))
    distinct, weight = ordered[first], np.diff(first, append=len(ordered))
    for pieces, rows in _read(source, distinct, geometry):
        runs = _runs(rows, geometry)
        coverage = rows.shape[1] // geometry.l2_entry_size << geometry.cluster_bits
        place = runs.guest // coverage * len(RunKind) + runs.kind
        each = np.bincount(place, runs.length, len(rows) * len(RunKind)).astype(np.int64)
        times = weight[np.searchsorted(distinct, pieces, side="right") - 1]
        totals += times @ each.reshape(len(rows), len(RunKind))
    return totals


def _read(source: Source, tables: I64, geometry: Geometry) -> Iterator[tuple[I64, U8]]:
    """The pieces that are there of *tables*, ascending offsets: where they are, and their bytes.

    So many at a time that no more than `_RUNS` come of them: of an extended entry as many as it has
    subclusters.
    """
    size = min(_PIECE_BYTES, geometry.cluster_size)
    of_entry = SUBCLUSTERS_PER_CLUSTER if geometry.extended_l2 else 1
    pieces = present_pieces(source, tables, geometry.cluster_size, size)
    for part, rows in read_tables(source, pieces, size, _RUNS // of_entry * geometry.l2_entry_size):
        yield pieces[part], rows


def _runs(rows: U8, geometry: Geometry) -> Runs:
    """What pieces of L2 tables (rows) map, as if they mapped the first guest clusters."""
    words = rows.view(">u8").astype(np.uint64).reshape(-1)
    bitmaps = None
    if geometry.extended_l2:
        words, bitmaps = words[0::2], words[1::2]
    guest = np.arange(len(words), dtype=np.int64) << geometry.cluster_bits
    sound = np.full(len(words), Flaw.NONE, dtype=np.uint8)
    return runs_of_entries(guest, words, bitmaps, geometry, sound)
