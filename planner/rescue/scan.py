"""One pass over a file of which nothing is known: which sectors could be part of a table.

A table of qcow2, whichever it is, is a row of big-endian words that lead to sectors of the same
file. What is kept of a sector are a few bytes, so that memory is bounded by the tables there are,
and by what looks like one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from planner.arrays import I64, U8, U64, Mask, distinct
from planner.progress import Meter, Progress, tell_nobody
from planner.qcow2.header import CLUSTER_BITS
from planner.rescue.scanned import Scanned, Section
from planner.source import BATCH_BYTES, SECTOR, Source, present_bytes, read_tables

_WORDS = SECTOR // 8
_OFFSET = np.uint64(0x00FF_FFFF_FFFF_FE00)
_COPIED = np.uint64(1 << 63)
_ZERO = np.uint64(1)
# Neither a flag of an entry, nor part of its offset: 0 in every table that makes sense.
_RESERVED = np.uint64(0x7F00_0000_0000_01FE)


# Of a snapshot's entry: QEMU's own limits, and an identity that is a number.
_MAX_L1_ENTRIES, _MAX_ID, _MAX_EXTRA = (32 << 20) // 8, 127, 1024


COPIED = 2
"""Of the flags of `Sectors`: an entry is of the disk's own."""

FEW = 50
"""One in so many sectors of tables may be aligned otherwise."""


@dataclass(frozen=True, slots=True)
class Sectors:
    """Sectors of words that lead into the file, and of nothing else; ascending, one row each.

    ``number``: which, int64. ``offsets``: all their offsets or-ed, uint64, of which the lowest set
    bit tells how they are aligned. ``flags``: whether all words that are not zero have the COPIED
    flag (bit 0), whether any has it (bit 1), whether any reads as zeros (bit 2).
    ``snapshots``: sectors that begin as an entry of a snapshot table does.
    """

    number: I64
    offsets: U64
    flags: U8
    snapshots: I64

    def __len__(self) -> int:
        return len(self.number)

    def aligned(self, bits: int) -> Mask:
        """Whose words lead to clusters of 2^*bits* bytes."""
        mask: Mask = (self.offsets & np.uint64((1 << bits) - 1)) == 0
        return mask

    @property
    def cluster_bits(self) -> int | None:
        """The least alignment that more than a few sectors of the disk's own tables have, if they
        have one that clusters have.
        """
        own = (self.flags & COPIED != 0) & (self.offsets != 0)
        offsets = self.offsets[own].astype(np.int64)
        if not len(offsets):
            return None
        lowest = np.log2(offsets & -offsets).astype(np.int64)
        likely = np.flatnonzero(np.bincount(lowest, minlength=64) * FEW > len(offsets))
        bits = int(likely[0]) if len(likely) else 0
        return bits if bits in CLUSTER_BITS else None


_NAME = "tables"


def find_tables(
    source: Source, meter: Meter | None = None, scanned: Scanned | None = None
) -> Sectors:
    """All of *source* that is no hole, read once, in order. *meter*: of the bytes read.

    *scanned*: how far this had come before; what lies before that is not read again.
    """
    meter, scanned = meter or Meter(), scanned or Scanned()
    known = scanned.known(_NAME, source.size, SECTOR)
    found = _Found(source.size, known.done)
    for part, rows in read_tables(source, known.again, SECTOR):
        found.look(known.again[part] // SECTOR, rows.view(">u8"))
    buffer = np.empty(BATCH_BYTES // 8, dtype=">u8")
    for low, high in source.data_extents(0, source.size):
        first = max(low // SECTOR * SECTOR, known.done)
        meter.advance(max(0, min(first, high) - low))
        for start in range(first, high, BATCH_BYTES):
            length = -(-(min(high, start + BATCH_BYTES) - start) // SECTOR) * SECTOR
            raw = buffer[: length // 8]
            source.read_into(start, raw.view(np.uint8).data)
            found.look(np.arange(start, start + length, SECTOR) // SECTOR, raw.reshape(-1, _WORDS))
            found.done = start + length
            scanned.keep(_NAME, found.section)
            meter.advance(length)
    return found.sectors()


class _Found:
    """What was found before ``done`` in a file of *end* bytes, part by part."""

    def __init__(self, end: int, done: int) -> None:
        none = np.zeros(0, dtype=np.int64)
        self.done = done
        self._end = np.uint64(end)
        self._parts = [Sectors(none, none.astype(np.uint64), none.astype(np.uint8), none)]

    def look(self, number: I64, words: npt.NDArray[np.void]) -> None:
        """The *words* of sectors, big-endian, and their numbers, ascending."""
        # Most sectors are data, and their first words show it.
        likely = np.flatnonzero(_leads(words[:, :4].astype(np.uint64), self._end).all(axis=1))
        rows = words[likely].astype(np.uint64)
        found = _leads(rows, self._end).all(axis=1) & (rows != 0).any(axis=1)
        rows = rows[found]
        offsets = np.bitwise_or.reduce(rows & _OFFSET, axis=1)
        snapshots = _snapshots(words[:, :5].astype(np.uint64), self._end)
        part = Sectors(number[likely[found]], offsets, _flags(rows), number[snapshots])
        self._parts.append(part)

    def sectors(self) -> Sectors:
        """All of them."""
        columns = zip(
            *((e.number, e.offsets, e.flags, e.snapshots) for e in self._parts), strict=True
        )
        self._parts = [Sectors(*map(np.concatenate, columns))]
        return self._parts[0]

    def section(self) -> Section:
        """How far this is."""
        sectors = self.sectors()
        again = distinct(np.concatenate((sectors.number, sectors.snapshots)))
        return Section(self.done, again * SECTOR)


Scan = Callable[[], Sectors]
"""What there is of a file, which is read when that is asked for first."""


def scan_once(
    source: Source, progress: Progress = tell_nobody, scanned: Scanned | None = None
) -> Scan:
    """The scan of *source*: of however many ask for it, it is read once."""

    @cache
    def scan() -> Sectors:
        return find_tables(source, Meter(progress, "scan", present_bytes(source)), scanned)

    return scan


def _snapshots(words: U64, end: np.uint64) -> I64:
    """Which sectors begin with a snapshot's L1 table, sizes of its strings, a date, extra data."""
    offset, sizes, date, _, rest = (words[:, at] for at in range(5))
    begins: Mask = (offset < end) & (offset % np.uint64(SECTOR) == 0)
    begins &= (sizes >> np.uint64(32)) <= np.uint64(_MAX_L1_ENTRIES)
    begins &= ((sizes >> np.uint64(16)) & np.uint64(0xFFFF)) <= np.uint64(_MAX_ID)
    begins &= ((sizes >> np.uint64(16)) & np.uint64(0xFFFF)) != 0
    begins &= (date & np.uint64(0xFFFF_FFFF)) < np.uint64(1_000_000_000)
    begins &= (date >> np.uint64(32)) != 0
    begins &= (rest & np.uint64(0xFFFF_FFFF)) <= np.uint64(_MAX_EXTRA)
    return np.flatnonzero(begins)


def _leads(words: U64, end: np.uint64) -> Mask:
    offset = words & _OFFSET
    # An entry of flags alone leads nowhere, and is one all the same.
    leads: Mask = ((words & _RESERVED) == 0) & (offset < end)
    return leads


def _flags(rows: U64) -> U8:
    copied = (rows & _COPIED) != 0
    flags: U8 = (copied | (rows == 0)).all(axis=1).astype(np.uint8)
    flags |= copied.any(axis=1).astype(np.uint8) << 1
    flags |= ((rows & _ZERO) != 0).any(axis=1).astype(np.uint8) << 2
    return flags
