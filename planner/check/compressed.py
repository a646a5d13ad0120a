"""Compressed clusters of an image's disks: what is to be unpacked, and who needs what cannot be.

A check of the metadata does not look into them. Here is which stored ranges there are, each once
however many entries of however many snapshots lead to it, and what follows for the guest from those
that are not sound. They are read and unpacked elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from planner.arrays import I64, U64, Mask, without_repeats
from planner.check.ending import CutOff
from planner.check.report import Report
from planner.errors import ImageError, as_value
from planner.findings.grouped import FindingsBuilder
from planner.findings.kinds import ACTIVE, FindingKind, Structure
from planner.metadata.mapping_tables import L2Tables, TableParts
from planner.progress import Meter
from planner.qcow2 import entries
from planner.qcow2.geometry import SECTOR, Geometry
from planner.source import Source, present_tables

SPAN_BYTES = 1 << 20
"""Ranges that lie near to each other are read together, about so much at a time."""

NEAR_BYTES = 1 << 14
"""What lies no further behind the one before is read with it: a request costs more."""

MAX_OVER_BYTES = 32 << 20
"""So much is unpacked of ranges that lie over others: no program has written them so."""

ZEROS_OF_NO_STREAM = 5
"""A stored block of deflate has the length 0 there, and not its complement; no frame of zstd."""

_LEAST = {0: 1040, 1: 1 << 15}
"""By compression type, zlib and zstd: no cluster becomes smaller than its size through that."""

_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class Packed:
    """The distinct stored ranges, ascending by where they begin.

    ``keys``: int64, the host offset above the number of more sectors: so they sort by offset.
    """

    keys: I64
    geometry: Geometry

    def __len__(self) -> int:
        return len(self.keys)

    def ranges(self, part: slice) -> tuple[I64, I64]:
        """Offsets and lengths of some, bytes; as `entries.compressed_ranges` has them."""
        offset, more = np.divmod(self.keys[part], 1 << _sector_bits(self.geometry))
        return offset, (more + 1) * SECTOR - offset % SECTOR

    def sorted_out(self, source: Source, compression_type: int) -> tuple[Packed, I64, int]:
        """What of it to unpack; keys of what is none, for a hole begins no stream; how many more.

        What is there bounds the work: ranges that no program can have written where they are, as
        they begin before the end of the ones in front, are looked at up to `MAX_OVER_BYTES`.
        """
        offset, length = self.ranges(slice(None))
        is_there = present_tables(source, offset, ZEROS_OF_NO_STREAM, anyway=0)
        offset, length = offset[is_there], length[is_there]
        size = self.geometry.cluster_size
        # The last byte is somewhere in the last sector, in which the next one may begin.
        least = max(1, size // _LEAST.get(compression_type, size))
        end = np.maximum.accumulate(offset + np.maximum(length - SECTOR, least))
        over = np.zeros(len(offset), dtype=np.bool_)
        over[1:] = offset[1:] < end[:-1]
        chosen = ~over | (np.cumsum(np.where(over, size + length, 0)) <= MAX_OVER_BYTES)
        keys = self.keys[is_there]
        left = len(keys) - int(np.count_nonzero(chosen))
        return replace(self, keys=keys[chosen]), self.keys[~is_there], left

    def spans(self) -> Iterator[slice]:
        """Which of them to read together, all of them in their order."""
        for start in range(0, len(self), _CHUNK):
            part = slice(start, min(start + _CHUNK, len(self)))
            offset, length = self.ranges(part)
            reach = np.maximum.accumulate(offset + length)
            new = np.ones(len(offset), dtype=np.bool_)
            new[1:] = offset[1:] > reach[:-1] + NEAR_BYTES
            first = np.maximum.accumulate(np.where(new, offset, 0))
            stretch = (offset - first) // SPAN_BYTES
            new[1:] |= stretch[1:] != stretch[:-1]
            bounds = [*np.flatnonzero(new).tolist(), len(offset)]
            for low, high in pairwise(bounds):
                yield slice(start + low, start + high)


def find_packed(source: Source, report: Report, meter: Meter) -> Packed:
    """All compressed clusters that a guest can read. *meter*: bytes of tables read."""
    found = [np.zeros(0, dtype=np.int64)]
    found += [without_repeats(np.sort(keys)) for _, keys in _walk(source, report, meter)]
    keys = np.concatenate(found)
    keys.sort()
    return Packed(without_repeats(keys), report.geometry)


def report_unreadable(
    source: Source, report: Report, bad: I64, packed: Packed, left: int = 0
) -> Report:
    """*report* of a check for which all of *packed* but *left* was unpacked, not the keys *bad*."""
    report = replace(report, compressed_looked_at=not left, cut_off=_cut(report, bad, packed))
    report = _stopped(report, left) if left else report
    if not len(bad) or report.entries is None:
        return report
    parts = [(at, keys) for at, keys in _matching(source, report, np.sort(bad))]
    position, key = (np.concatenate(each) for each in zip(*parts, strict=True))
    offset = (key >> _sector_bits(packed.geometry)).astype(np.uint64)
    held = report.entries.with_kind(
        FindingKind.COMPRESSED_UNREADABLE, Structure.COMPRESSED, position, offset
    )
    return replace(report, entries=held)


def _stopped(report: Report, left: int) -> Report:
    """*report* that says that *left* clusters more were not looked at."""
    error = ImageError("compressed clusters", left, f"{left} more lie over others: not unpacked")
    findings = FindingsBuilder()
    findings.add(FindingKind.CHECK_STOPPED, structure=Structure.COMPRESSED, found=np.uint64(left))
    return replace(
        report,
        findings=report.findings.joined(findings.build()),
        stopped=(*report.stopped, as_value(error)),
        counters=replace(report.counters, check_errors=report.counters.check_errors + 1),
    )


def _cut(report: Report, bad: I64, packed: Packed) -> CutOff | None:
    """Where the file should end; of the last sector of a compressed cluster only this shows it."""
    size = report.layout.file_size if report.layout else 0
    offset, length = Packed(bad, packed.geometry).ranges(slice(None))
    ends = (offset + length)[offset < size]
    if report.cut_off is not None or int(ends.max(initial=0)) <= size:
        return report.cut_off
    return CutOff(size, int(ends.max()))


def _matching(source: Source, report: Report, bad: I64) -> Iterator[tuple[I64, I64]]:
    """The entries, by position in `L2Tables`, that lead to one of *bad* (ascending)."""
    for position, keys in _walk(source, report, Meter()):
        at = np.minimum(np.searchsorted(bad, keys), len(bad) - 1)
        hit = bad[at] == keys
        yield position[hit], keys[hit]


def _walk(source: Source, report: Report, meter: Meter) -> Iterator[tuple[I64, I64]]:
    """Of all compressed entries that a guest can read, batch by batch: position and key."""
    geometry = report.geometry
    if report.entries is None or geometry.external_data:
        return
    tables, size = report.entries.tables, geometry.cluster_size
    which = np.flatnonzero(tables.offset % size == 0)
    which = which[present_tables(source, tables.offset[which], size)]
    parts = TableParts.of(source, tables.offset[which], size)
    for part, rows in parts.read(source):
        words, _ = entries.split_entries(entries.decode_words(rows), geometry.extended_l2)
        words = words.reshape(-1)
        at = np.flatnonzero(words & np.uint64(entries.COMPRESSED))
        table, inside = np.divmod(parts.positions(part, at, geometry), geometry.l2_entries)
        position = which[table] * geometry.l2_entries + inside
        seen = _within_disk(tables, geometry, position)
        yield position[seen], _keys(words[at][seen], geometry)
        meter.advance(rows.size)


def _within_disk(tables: L2Tables, geometry: Geometry, position: I64) -> Mask:
    """Which entries are not beyond the end of the disk; of those of snapshots all."""
    table, inside = np.divmod(position, geometry.l2_entries)
    guest = (tables.l1_index[table] * geometry.l2_entries + inside) << geometry.cluster_bits
    alone = (tables.snapshot[table] == ACTIVE) & (tables.weight[table] == tables.active[table])
    within: Mask = (guest < geometry.virtual_size) | ~alone
    return within


def _keys(words: U64, geometry: Geometry) -> I64:
    offset, length = entries.compressed_ranges(words, geometry)
    return offset << _sector_bits(geometry) | (offset % SECTOR + length) // SECTOR - 1


def _sector_bits(geometry: Geometry) -> int:
    """Bits of a descriptor that count sectors."""
    return 62 - geometry.compressed_shift
