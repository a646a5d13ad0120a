"""One pass over a file of which nothing is known: which sectors could be part of a table, and which
say something of themselves.

A table of qcow2, whichever it is, is a row of big-endian words that lead to sectors of the same
file. What is kept of a sector are a few bytes, so that memory is bounded by the tables there are,
and by what looks like one. Whoever looks at the file later, with a header and the size of clusters
known, reads again what is named here and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from planner.arrays import I64, U8, U64, Mask, distinct
from planner.check.classify import DAMAGED_PART
from planner.progress import Meter, Progress, tell_nobody
from planner.qcow2 import entries
from planner.qcow2.header import CLUSTER_BITS
from planner.rescue.placing.claims import MAX_CLAIMS, Collector, Piece
from planner.rescue.placing.solve import MARKS, SPOTTERS
from planner.rescue.scanned import (
    CLAIMS,
    PIECE_BYTES,
    TABLES,
    Said,
    Scanned,
    Section,
    reach_of,
    whole_end,
)
from planner.source import SECTOR, Source, present_bytes, present_pieces, read_tables

_WORDS = SECTOR // 8
_OFFSET = np.uint64(0x00FF_FFFF_FFFF_FE00)
_COPIED = np.uint64(1 << 63)
_ZERO = np.uint64(1)
# Neither a flag of an entry, nor part of its offset: 0 in every table that makes sense.
_RESERVED = np.uint64(0x7F00_0000_0000_01FE)


# Of a snapshot's entry: QEMU's own limits, and an identity that is a number.
_MAX_L1_ENTRIES, _MAX_ID, _MAX_EXTRA = (32 << 20) // 8, 127, 1024
_ID_SIZE = np.uint64(0xFFFF << 32)
"""Of the second word of one, as it lies in the file."""


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


SCAN_BYTES = 4 << 20
"""Of the file that are looked at together: most of them only in few places."""

AT_ONCE = 4 << 30
"""Bytes of the file of which it is asked at a time where the holes are."""


def find_tables(
    source: Source, meter: Meter | None = None, scanned: Scanned | None = None
) -> Sectors:
    """All of *source* that is no hole, read once, in order. *meter*: of the bytes read.

    *scanned*: how far this had come before; what lies before that is not read again. What it comes
    to is kept there.
    """
    meter, scanned = meter or Meter(), scanned or Scanned()
    found = _Found(source.size, *(scanned.known(name, source.size, SECTOR) for name in _NAMES))
    for part, rows in read_tables(source, found.again, SECTOR):
        found.look_for_tables(found.again[part], rows)
    meter.advance(_present(source, found.done))
    start = found.done // PIECE_BYTES * PIECE_BYTES
    for pieces in _pieces(source, start):
        for part, rows in read_tables(source, pieces, PIECE_BYTES, SCAN_BYTES):
            found.look(pieces[part], rows)
            for name, section in zip(_NAMES, found.sections, strict=True):
                scanned.keep(name, section)
            meter.advance(rows.size)
    found.done = whole_end(source.size)
    for name, section in zip(_NAMES, found.sections, strict=True):
        scanned.keep(name, section)
    scanned.gathered()
    scanned.said = found.said(start)
    return found.sectors()


_NAMES = TABLES, CLAIMS


def _present(source: Source, end: int) -> int:
    return sum(high - low for low, high in source.data_extents(0, end)) if end else 0


def _pieces(source: Source, start: int) -> Iterator[I64]:
    """Where the pieces of *source* from *start* on are that are no holes, some at a time."""
    while start < source.size:
        first = next(iter(source.data_extents(start, source.size - start)), None)
        if first is None:
            return
        start = first[0] // PIECE_BYTES * PIECE_BYTES
        yield present_pieces(source, np.array([start]), AT_ONCE, PIECE_BYTES)
        start += AT_ONCE


class _Found:
    """What was found before ``done`` in a file of *end* bytes, part by part.

    *tables*, *claims*: what of it was known before.
    """

    def __init__(self, end: int, tables: Section, claims: Section) -> None:
        if tables.done != claims.done:
            tables = claims = Section()
        self.done = tables.done
        self.again = tables.again
        self._end, self._words = np.uint64(end), _Words.of(reach_of(whole_end(end)))
        self._parts: list[Sectors] = []
        self._tables, self._claims = [tables.again], [claims.again]
        self._ends, self._filled = [claims.ends], [claims.filled]
        self._room = MAX_CLAIMS - len(claims.ends)
        self._said: list[tuple[U8, I64, I64, I64]] = []
        self._room_to_say = MAX_CLAIMS

    def look(self, pieces: I64, rows: U8) -> None:
        """Some *pieces* of the file, ascending, and their bytes."""
        self.done = int(pieces[-1]) + rows.shape[1]
        words = rows.view(np.uint64)
        # Only what has no word at the beginning of a sector may be zeros all through.
        empty = np.flatnonzero(~words[:, ::_WORDS].any(axis=1))
        empty = empty[~words[empty].any(axis=1)]
        if len(empty):
            pieces, rows = np.delete(pieces, empty), np.delete(rows, empty, axis=0)
        if len(rows):
            self._tables.append(self.look_for_tables(pieces, rows))
            self._look_for_claims(pieces, rows)

    def look_for_tables(self, places: I64, rows: U8) -> I64:
        """The sectors that may be part of any table, or begin one of snapshots; bytes, ascending.

        *rows*: of a sector or more each, at *places* in the file.
        """
        raw = rows.reshape(-1).view("<u8").reshape(-1, _WORDS)
        likely, words = self._words.likely(raw)
        leads = _leads(words, self._end).all(axis=1)
        snapshots = _snapshots(raw, self._end)
        offsets = np.bitwise_or.reduce(words[leads] & _OFFSET, axis=1)
        tables, snapshots, likely = (
            _places(places, at, rows.shape[1]) for at in (likely[leads], snapshots, likely)
        )
        if len(tables) or len(snapshots):
            part = tables // SECTOR, offsets, _flags(words[leads]), snapshots // SECTOR
            self._parts.append(Sectors(*part))
        return distinct(np.concatenate((likely, snapshots)))

    def _look_for_claims(self, pieces: I64, rows: U8) -> None:
        collector = Collector(SPOTTERS, rows.shape[1].bit_length() - 1)
        collector.look(pieces, rows)
        claims, ends, filled = collector.since(0)
        self._note_said(collector)
        piece = Piece(rows.reshape(-1), rows.shape[1])
        marked = np.concatenate([piece.marked(*mark) for mark in MARKS]) // SECTOR
        found = np.concatenate((claims, _places(pieces, marked, rows.shape[1])))
        if len(found):
            self._claims.append(distinct(found // SECTOR * SECTOR))
        if len(ends) and self._room > 0:
            self._ends.append(ends[: self._room])
            self._filled.append(filled[: self._room])
            self._room -= len(ends)

    def _note_said(self, collector: Collector) -> None:
        some = collector.others()
        self._room_to_say -= sum(len(part[0]) for part in some)
        if self._room_to_say < 0:
            self._said = []
        elif some:
            sort, place, key, aux = map(np.concatenate, zip(*some, strict=True))
            self._said.append((sort, place, key, aux))

    def said(self, start: int) -> Said | None:
        """What was heard, of all from *start* on; None: it was more than is kept."""
        if self._room_to_say < 0:
            return None
        none = np.zeros(0, dtype=np.int64)
        columns = zip((none.astype(np.uint8), none, none, none), *self._said, strict=True)
        sort, place, key, aux = map(np.concatenate, columns)
        self._said = []
        return Said(start, sort, place, key, aux)

    def sectors(self) -> Sectors:
        """All of them."""
        none = np.zeros(0, dtype=np.int64)
        empty = Sectors(none, none.astype(np.uint64), none.astype(np.uint8), none)
        columns = zip(
            *((e.number, e.offsets, e.flags, e.snapshots) for e in [empty, *self._parts]),
            strict=True,
        )
        self._parts = [Sectors(*map(np.concatenate, columns))]
        return self._parts[0]

    @property
    def sections(self) -> tuple[Callable[[], Section], Callable[[], Section]]:
        """How far this is: of tables, and of claims."""
        return self._of_tables, self._of_claims

    def _of_tables(self) -> Section:
        self._tables = [distinct(np.concatenate(self._tables))]
        return Section(self.done, self._tables[0])

    def _of_claims(self) -> Section:
        columns = self._claims, self._ends, self._filled
        self._claims, self._ends, self._filled = ([np.concatenate(each)] for each in columns)
        return Section(self.done, self._claims[0], self._ends[0], self._filled[0])


def _places(pieces: I64, sector: I64, size: int) -> I64:
    """Where in the file those sectors of *pieces* of *size* bytes are."""
    each = size // SECTOR
    return pieces[sector // each] + sector % each * SECTOR


@dataclass(frozen=True, slots=True)
class _Words:
    """Which words can be entries of no table, whatever the header says: bits of words as they lie
    in the file, little-endian. ``plain``: one that an entry has not which is not ``packed``;
    ``far``: one that one has not which is.
    """

    plain: int
    packed: int
    far: int

    @classmethod
    def of(cls, reach: int) -> _Words:
        """Of a file in which nothing leads beyond *reach*, a power of two."""
        beyond = entries.L2_OFFSET & -reach
        # Of packed data the offset is the longer the smaller clusters are.
        far = ((1 << entries.LEAST_PACKED_BITS) - 1) & -reach
        plain = entries.COMPRESSED | entries.L2_RESERVED | beyond
        return cls(*(_swapped(mask, 8) for mask in (plain, entries.COMPRESSED, far)))

    def likely(self, raw: U64) -> tuple[I64, U64]:
        """Which sectors could be part of a table, of which one word in `DAMAGED_PART` may be
        overwritten, and their words, native; *raw*: as they lie in the file, (n, 64).

        Every other word is an entry, of extended tables too: more than `_MOST_BAD` that are none
        are too many of 64.
        """
        halves = raw.view("<u4").reshape(-1, 2, _WORDS)[:, :, ::4]
        # First four at the beginning of either half: memory is touched in as few places as can be.
        possible = self._possible(np.ascontiguousarray(halves[:, :, :4]), np.uint32)
        possible = possible.reshape(-1).view(np.uint64)
        # Bytes that are 0 or 1: two of them are 1.
        at = np.flatnonzero(possible & (possible - np.uint64(1)))
        bad = np.count_nonzero(~self._possible(halves[at], np.uint32), axis=(1, 2))
        at = at[bad <= _MOST_BAD]
        at = at[np.bitwise_or.reduce(raw[at], axis=1) != 0]
        words = raw[at]
        wrong, filled = ~self._possible(words, np.uint64), words != 0
        kept = np.zeros(len(at), dtype=np.bool_)
        for step in (1, 2):
            number = np.count_nonzero(filled[:, ::step], axis=1)
            bad = np.count_nonzero(wrong[:, ::step], axis=1)
            kept |= (number > 0) & (bad * DAMAGED_PART <= number)
        return at[kept], words[kept].byteswap()

    def _possible(self, words: U64, kind: type[np.unsignedinteger[Any]]) -> Mask:
        """Which *words*, or first halves of them, may be entries."""
        size = np.dtype(kind).itemsize
        plain, packed, far = (
            kind(each & (1 << 8 * size) - 1) for each in (self.plain, self.packed, self.far)
        )
        possible: Mask = ((words & plain) == 0) | ((words & (packed | far)) == packed)
        return possible


_MOST_BAD = _WORDS // DAMAGED_PART


def _swapped(mask: int, size: int) -> int:
    return int.from_bytes(mask.to_bytes(size, "big"), "little")


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


def _snapshots(raw: U64, end: np.uint64) -> I64:
    """Which sectors begin with a snapshot's L1 table, sizes of its strings, a date, extra data."""
    # The size of its ID is no zero, and the first byte of where its table lies nearly always one.
    most = min(int(end) >> 56, 0xFF)
    likely = (raw[:, 0].astype(np.uint8) <= most) & ((raw[:, 1] & _ID_SIZE) != 0)
    at = np.flatnonzero(likely)
    words = raw[at, :5].byteswap()
    offset, sizes, date, _, rest = (words[:, number] for number in range(5))
    begins: Mask = (offset < end) & (offset % np.uint64(SECTOR) == 0)
    begins &= (sizes >> np.uint64(32)) <= np.uint64(_MAX_L1_ENTRIES)
    begins &= ((sizes >> np.uint64(16)) & np.uint64(0xFFFF)) <= np.uint64(_MAX_ID)
    begins &= ((sizes >> np.uint64(16)) & np.uint64(0xFFFF)) != 0
    begins &= (date & np.uint64(0xFFFF_FFFF)) < np.uint64(1_000_000_000)
    begins &= (date >> np.uint64(32)) != 0
    begins &= (rest & np.uint64(0xFFFF_FFFF)) <= np.uint64(_MAX_EXTRA)
    return at[begins]


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
