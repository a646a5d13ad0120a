"""The MFT of NTFS: where it is, and its records, some at a time.

Its own first record says where it is, or a copy of that. Where it lies in many pieces, records that
go on that one say so, which are in pieces that are known already.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planner.arrays import I64, U8, Mask, distinct, expand_ranges
from planner.guestfs.columns import little
from planner.guestfs.ntfs.attributes import (
    ATTRIBUTE_LIST,
    BITMAP,
    DATA,
    IN_USE,
    NUMBER,
    Attributes,
    Records,
    Runs,
    attributes_of,
    decode_records,
    runs_of,
    values_of,
)
from planner.guestfs.ntfs.boot import Boot
from planner.guestfs.reading import Holes, read_blocks
from planner.source import BATCH_BYTES, present_tables

MAX_PIECES = 1 << 20
"""Of the MFT: more are not looked at."""

MAX_LIST_BYTES = 256 << 10
"""Of a list of attributes: Windows makes none that is longer."""

NONE = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Pieces:
    """Where a file is, bytes, int64, ascending by ``start``, which is within the file."""

    start: I64
    length: I64
    disk: I64

    @classmethod
    def of(cls, runs: Runs, cluster_size: int) -> Pieces:
        """*runs* of one file."""
        order = np.argsort(runs.virtual, kind="stable")
        columns = (runs.virtual[order], runs.length[order], runs.cluster[order])
        return cls(*(column * cluster_size for column in columns))

    def limited(self, size: int) -> Pieces:
        """As many of them as *size* bytes hold: no file is longer than the disk that it is on."""
        fits = np.cumsum(self.length) <= size
        return Pieces(self.start[fits], self.length[fits], self.disk[fits])

    @property
    def end(self) -> int:
        return int((self.start + self.length).max()) if len(self.start) else 0

    def places(self, offset: I64) -> I64:
        """Where bytes of the file are on the disk, -1 where they are not."""
        if not len(self.start):
            return np.full(len(offset), -1, dtype=np.int64)
        at = np.maximum(np.searchsorted(self.start, offset, side="right") - 1, 0)
        within = offset - self.start[at]
        inside = (within >= 0) & (within < self.length[at])
        return np.where(inside, self.disk[at] + within, -1)


class Table:
    """The MFT. ``from_mirror``: its first record was lost, and a copy used. ``is_guessed``: both
    were. ``broken``: records that made no sense, as far as was read.
    """

    def __init__(self, source: Holes, boot: Boot) -> None:
        self._source, self._boot = source, boot
        self.from_mirror = self.is_guessed = False
        self._unit = min(boot.record_size, boot.cluster_size)
        self.pieces, self._bitmap, self._resident_bitmap = self._find()

    # ---- where it is ----

    def _find(self) -> tuple[Pieces, Pieces, bytes]:
        boot = self._boot
        for cluster in (boot.mft, boot.mirror):
            if not 0 < cluster < boot.clusters:
                continue
            offset = np.array([cluster * boot.cluster_size], dtype=np.int64)
            raw = read_blocks(self._source, offset, boot.record_size)
            records, _ = decode_records(raw, np.zeros(1, dtype=np.int64))
            if not len(records):
                continue
            attributes = attributes_of(records)
            data = self._pieces(records, attributes, DATA)
            if len(data.start):
                self.from_mirror = cluster == boot.mirror
                data, rest = self._gone_on(records, attributes, data)
                bitmap = self._pieces(records, attributes, BITMAP)
                bitmap = bitmap if len(bitmap.start) else rest
                return data, bitmap, _resident(records, attributes, BITMAP)
        self.is_guessed = True
        return self._guess(), Pieces(NONE, NONE, NONE), b""

    def _pieces(self, records: Records, attributes: Attributes, kind: int) -> Pieces:
        wanted = (attributes.type == kind) & attributes.is_outside & (attributes.name_length == 0)
        runs, _ = runs_of(records.flat, attributes.select(wanted), self._boot.clusters)
        return Pieces.of(runs, self._boot.cluster_size).limited(self._boot.size)

    def _gone_on(
        self, records: Records, attributes: Attributes, data: Pieces
    ) -> tuple[Pieces, Pieces]:
        """*data* with what other records have of it, and the bitmap where they have that."""
        listed = _resident(records, attributes, ATTRIBUTE_LIST)
        outside = self._pieces(records, attributes, ATTRIBUTE_LIST)
        if len(outside.start):
            size = self._boot.cluster_size
            at = np.arange(0, min(outside.end, MAX_LIST_BYTES), size, dtype=np.int64)
            place = outside.places(at)
            listed = read_blocks(self._source, place[place >= 0], size).tobytes()
        wanted, bitmap = _listed_records(listed), Pieces(NONE, NONE, NONE)
        while len(wanted):
            self.pieces = data
            known = data.places(wanted * self._boot.record_size) >= 0
            if not known.any() or len(data.start) > MAX_PIECES:
                break
            found, _ = self.read(wanted[known])
            wanted = wanted[~known]
            inside = attributes_of(found)
            inside = inside.select(found.base[inside.row] == 0)
            more = self._pieces(found, inside, DATA)
            columns = zip(_columns(data), _columns(more), strict=True)
            start, length, disk = (np.concatenate(column) for column in columns)
            order = np.argsort(start, kind="stable")
            data = Pieces(start[order], length[order], disk[order]).limited(self._boot.size)
            other = self._pieces(found, inside, BITMAP)
            bitmap = other if len(other.start) else bitmap
        return data, bitmap

    def _guess(self) -> Pieces:
        """From where it begins on for as long as there are records."""
        boot, step = self._boot, 64 << 10
        begin = offset = boot.mft * boot.cluster_size
        while 0 < begin < boot.size and offset < boot.size:
            at = np.arange(offset, min(offset + step, boot.size - 3), boot.record_size)
            if not present_tables(self._source, at, boot.record_size, anyway=0).any():
                break
            raw = read_blocks(self._source, at, boot.record_size)
            if not (raw[:, :4] == np.frombuffer(b"FILE", dtype=np.uint8)).all(axis=1).any():
                break
            offset += step
        length = min(offset, boot.size) - begin
        if length <= 0:
            return Pieces(NONE, NONE, NONE)
        columns = (np.array([each], dtype=np.int64) for each in (0, length, begin))
        return Pieces(*columns)

    # ---- records ----

    def read(self, number: I64) -> tuple[Records, I64]:
        """Those of the records *number* that make sense, and their rows in *number*."""
        size = self._boot.record_size
        place = self._units(number)
        rows = np.flatnonzero((place >= 0).all(axis=1))
        units = place[rows].reshape(-1)
        order = np.argsort(units, kind="stable")
        raw = np.empty((len(units), self._unit), dtype=np.uint8)
        raw[order] = read_blocks(self._source, units[order], self._unit)
        records, sound = decode_records(raw.reshape(-1, size), number[rows])
        return records, rows[sound]

    def _units(self, number: I64) -> I64:
        """Where the parts of records are that lie in one cluster each, shape (n, parts)."""
        size = self._boot.record_size
        at = (number * size)[:, None] + np.arange(0, size, self._unit)
        return self.pieces.places(at.reshape(-1)).reshape(at.shape)

    def walk(self, broken: list[I64] | None = None) -> Iterator[Records]:
        """All records that make sense; to *broken* the numbers of those that do not are added."""
        size = self._boot.record_size
        step = max(1, BATCH_BYTES // size)
        for start, length in zip(
            self.pieces.start.tolist(), self.pieces.length.tolist(), strict=True
        ):
            first, last = -(-start // size), -(-(start + length) // size)
            for at in range(first, last, step):
                number = np.arange(at, min(at + step, last), dtype=np.int64)
                place = self.pieces.places(number * size)
                number, place = number[place >= 0], place[place >= 0]
                order = np.argsort(place, kind="stable")
                there = present_tables(self._source, place[order], size, anyway=0)
                number = np.sort(number[order][there])
                records, rows = self.read(number)
                if broken is not None:
                    broken.append(self._broken(np.delete(number, rows)))
                yield records

    def _broken(self, number: I64) -> I64:
        """Which of these records are neither holes nor never written."""
        size = self._boot.record_size
        place = self.pieces.places(number * size)
        number, place = number[place >= 0], place[place >= 0]
        is_hole = self._source.are_holes(place, size)
        number, place = number[~is_hole], place[~is_hole]
        order = np.argsort(place, kind="stable")
        raw = read_blocks(self._source, place[order], 4)
        return np.sort(number[order][raw.any(axis=1)])

    @property
    def has_holes(self) -> bool:
        """Whether any record cannot be read."""
        return self.is_guessed or bool(
            self._source.are_holes(self.pieces.disk, self.pieces.length).any()
        )

    def are_lost(self, number: I64) -> Mask:
        """Which records cannot be read, or are in no piece that is known."""
        place = self._units(number)
        lost = self._source.are_holes(np.maximum(place, 0).reshape(-1), self._unit)
        unread = (place < 0) | lost.reshape(place.shape)
        result: Mask = np.logical_or.reduce(unread, axis=1)
        return result

    def belongs(self, records: Records) -> Mask:
        """Which records are a file's, or go on one that still says what they do."""
        belongs: Mask = (records.flags & IN_USE) != 0
        at = np.flatnonzero((records.base > 0) & belongs)
        if len(at):
            wanted = distinct(records.base[at])
            found, rows = self.read(wanted)
            place = np.searchsorted(wanted, records.base[at])
            use, in_use = np.full(len(wanted), -1, np.int64), np.ones(len(wanted), np.bool_)
            use[rows], in_use[rows] = found.use, (found.flags & IN_USE) != 0
            # Of a base that is lost nothing is known against it.
            belongs[at] = in_use[place] & ((use[place] == records.base_use[at]) | (use[place] < 0))
        return belongs

    def records_at(self, start: I64, length: I64) -> I64:
        """The numbers of the records that ranges of the disk touch, ascending."""
        size, parts = self._boot.record_size, []
        for begin, extent, disk in zip(
            *(each.tolist() for each in _columns(self.pieces)), strict=True
        ):
            low = np.maximum(start, disk)
            high = np.minimum(start + length, disk + extent)
            hit = low < high
            first = (low[hit] - disk + begin) // size
            parts.append(expand_ranges(first, (high[hit] - 1 - disk + begin) // size))
        return distinct(np.concatenate(parts)) if parts else NONE

    def in_use(self, number: I64) -> tuple[Mask, Mask]:
        """Which records are in use, by the bitmap, and of which that is known."""
        if self._resident_bitmap:
            bits = np.frombuffer(self._resident_bitmap, dtype=np.uint8)
            known = number // 8 < len(bits)
            byte = bits[np.where(known, number // 8, 0)]
        else:
            place = self._bitmap.places(number // 8)
            known = place >= 0
            order = np.argsort(place, kind="stable")
            raw = np.zeros(len(number), dtype=np.uint8)
            raw[order] = read_blocks(self._source, np.maximum(place[order], 0), 1)[:, 0]
            known &= ~self._source.are_holes(np.maximum(place, 0), 1)
            byte = raw
        used = (byte >> (number % 8).astype(np.uint8)) & 1 != 0
        return used & known, known


def _columns(pieces: Pieces) -> tuple[I64, I64, I64]:
    return pieces.start, pieces.length, pieces.disk


def _resident(records: Records, attributes: Attributes, kind: int) -> bytes:
    """The value of the first attribute of a kind that is in its record."""
    some = attributes.select((attributes.type == kind) & ~attributes.is_outside)
    if not len(some):
        return b""
    start, length = values_of(records.flat, some)
    return records.flat[int(start[0]) : int(start[0] + length[0])].tobytes()


def _listed_records(raw: bytes) -> I64:
    """The records, but for the first, that a list of attributes of the MFT names; ascending."""
    flat, at, found = np.frombuffer(raw, dtype=np.uint8), 0, []
    while at + 26 <= len(flat):
        length = int.from_bytes(raw[at + 4 : at + 6], "little")
        if length < 26:
            break
        found.append(at)
        at += length
    numbers: U8 | I64 = little(flat, np.array(found, dtype=np.int64) + 16, 8) & NUMBER
    return distinct(numbers[numbers > 0].astype(np.int64))
