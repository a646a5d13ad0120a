"""The bitmap directory and its tables.

Source: docs/interop/qcow2.txt, "Bitmaps"; for what QEMU refuses, bitmap_list_load and
check_dir_entry.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import overload

import numpy as np
import numpy.typing as npt
from construct import Int8ub, Int16ub, Int32ub, Int64ub, Struct

from planner.arrays import I64, U8, U64, Mask
from planner.errors import ImageError, as_value
from planner.qcow2.extensions import BitmapsPointer
from planner.qcow2.fixed import Fixed
from planner.qcow2.geometry import SECTOR, Geometry
from planner.qcow2.names import quoted
from planner.source import Source, read_bytes

IN_USE = 1 << 0
AUTO = 1 << 1
RESERVED_FLAGS = 0xFFFF_FFFC

TYPE_DIRTY = 1
GRANULARITY_BITS = range(9, 32)
MAX_TABLE_ENTRIES = 0x800_0000
MAX_BITMAP_BYTES = 0x2000_0000
MAX_NAME = 1023

WINDOW_BYTES = 1 << 18
"""Of a directory, so much is read at a time."""

ENTRY = Struct(
    "bitmap_table_offset" / Int64ub,
    "bitmap_table_size" / Int32ub,
    "flags" / Int32ub,
    "type" / Int8ub,
    "granularity_bits" / Int8ub,
    "name_size" / Int16ub,
    "extra_data_size" / Int32ub,
)
ENTRY_BYTES = ENTRY.sizeof()
_FIXED = Fixed(ENTRY)
_SIZES = struct.Struct(">18xHI")
"""Of an entry's fixed part what says how long it is: name_size, extra_data_size."""


@dataclass(frozen=True, slots=True)
class Bitmap:
    """One entry of the bitmap directory; ``offset`` is where it stands in the file, bytes.

    Of extra data only the size is kept: nobody knows what it would mean.
    """

    offset: int
    bitmap_table_offset: int
    bitmap_table_size: int
    flags: int
    type: int
    granularity_bits: int
    extra_data_size: int
    name: bytes

    @property
    def granularity(self) -> int:
        """Guest bytes that one bit stands for."""
        return 1 << self.granularity_bits


def encode_bitmap(bitmap: Bitmap) -> bytes:
    """One directory entry, padded to eight bytes: the inverse of decoding, but for zeros in the
    place of extra data.
    """
    raw = _FIXED.build(
        bitmap_table_offset=bitmap.bitmap_table_offset,
        bitmap_table_size=bitmap.bitmap_table_size,
        flags=bitmap.flags,
        type=bitmap.type,
        granularity_bits=bitmap.granularity_bits,
        name_size=len(bitmap.name),
        extra_data_size=bitmap.extra_data_size,
    )
    raw += bytes(bitmap.extra_data_size) + bitmap.name
    return raw.ljust(-(-len(raw) // 8) * 8, b"\0")


@dataclass(frozen=True, slots=True, eq=False)
class BitmapEntries(Sequence[Bitmap]):
    """Entries of a directory, in its order; a `Bitmap` is made of one when somebody asks for it.

    ``raw``: of each its fixed part and its name, and what pads them. ``start``: where each begins
    in there, int64. ``offset``: where it stands in the file, int64.
    """

    raw: bytes | bytearray
    start: I64
    offset: I64

    def __len__(self) -> int:
        return len(self.start)

    @overload
    def __getitem__(self, at: int) -> Bitmap: ...

    @overload
    def __getitem__(self, at: slice) -> tuple[Bitmap, ...]: ...

    def __getitem__(self, at: int | slice) -> Bitmap | tuple[Bitmap, ...]:
        if isinstance(at, slice):
            return tuple(map(self.__getitem__, range(*at.indices(len(self)))))
        at = range(len(self))[at]
        start = int(self.start[at])
        table_at, entries, flags, kind, bits, name_size, extra_size = _FIXED.values(self.raw, start)
        return Bitmap(
            offset=int(self.offset[at]),
            bitmap_table_offset=table_at,
            bitmap_table_size=entries,
            flags=flags,
            type=kind,
            granularity_bits=bits,
            extra_data_size=extra_size,
            name=self._name(start, name_size),
        )

    def fields(self) -> npt.NDArray[np.void]:
        """The fixed part of each entry: a structured array with the fields of `ENTRY`."""
        return _FIXED.rows(self.raw, self.start)

    def tables(self) -> tuple[U64, I64]:
        """The offset of each one's table, and how many entries that has."""
        fields = self.fields()
        offset = fields["bitmap_table_offset"].astype(np.uint64)
        return offset, fields["bitmap_table_size"].astype(np.int64)

    def names(self) -> Iterator[bytes]:
        """The name of each."""
        sizes = self.fields()["name_size"].tolist()
        return map(self._name, self.start.tolist(), sizes)

    def _name(self, start: int, size: int) -> bytes:
        return bytes(self.raw[start + ENTRY_BYTES : start + ENTRY_BYTES + size])

    def select(self, which: Mask) -> BitmapEntries:
        """Some of them."""
        return BitmapEntries(self.raw, self.start[which], self.offset[which])


@dataclass(frozen=True, slots=True)
class Refusal:
    """What QEMU refuses about an entry: a ``field`` of it, its ``value``, and one sentence why.

    Of tens of thousands: the error of each is made where somebody wants it.
    """

    field: str
    value: int | str
    problem: str

    def of(self, bitmap: Bitmap) -> ImageError:
        """The same as an error, of *bitmap*."""
        return ImageError(
            f"{self.field} of the bitmap at {bitmap.offset}", self.value, self.problem
        )


@dataclass(frozen=True, slots=True, eq=False)
class Listed:
    """The ``entries`` of a directory; ``broken``: which rule of `_RULES` each breaks first, uint8,
    `_SOUND`: none. ``error``: what ends the directory too early, if anything.
    """

    entries: BitmapEntries
    broken: U8
    error: ImageError | None
    geometry: Geometry

    @property
    def is_sound(self) -> Mask:
        """Which entries QEMU takes."""
        sound: Mask = self.broken == _SOUND
        return sound

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[tuple[Bitmap, Refusal | None]]:
        """Bitmaps, each with what QEMU refuses about its entry."""
        for bitmap, broken in zip(self.entries, self.broken.tolist(), strict=True):
            yield bitmap, self._refusal(bitmap, broken)

    def _refusal(self, bitmap: Bitmap, broken: int) -> Refusal | None:
        if broken == _SOUND:
            return None
        if broken == _NOT_UNIQUE:
            return Refusal("name", quoted(bitmap.name), "not unique")
        field, _, problem = _RULES[broken]
        if broken == _NEEDED:
            needed = int(_needed(self.geometry)[bitmap.granularity_bits])
            problem = problem.format(needed)
        value = len(bitmap.name) if field == "name_size" else getattr(bitmap, field)
        return Refusal(field, value, problem)

    def first_refusal(self) -> ImageError | None:
        """The first thing that QEMU refuses."""
        for at in np.flatnonzero(~self.is_sound)[:1].tolist():
            bitmap = self.entries[at]
            refusal = self._refusal(bitmap, int(self.broken[at]))
            return refusal.of(bitmap) if refusal else None
        error = self.error
        # Another each time, so that who raises it leaves no frames in what is kept.
        return ImageError(error.field, error.value, error.problem) if error else None


def read_bitmaps(source: Source, pointer: BitmapsPointer, geometry: Geometry) -> BitmapEntries:
    """The bitmap directory. Raises `ImageError` for the first thing that QEMU refuses."""
    listed = list_bitmaps(source, pointer, geometry)
    error = listed.first_refusal()
    if error is not None:
        raise error
    return listed.entries


def list_bitmaps(source: Source, pointer: BitmapsPointer, geometry: Geometry) -> Listed:
    """All that can be made out of the bitmap directory."""
    try:
        directory = _Directory.of(source, pointer, geometry)
    except ImageError as error:
        entries = _EntriesBuilder().build()
        return Listed(entries, _broken(entries, geometry), as_value(error), geometry)
    known = _known(directory.digest(), pointer, geometry)
    if not known:
        known.append(_list(directory, pointer, geometry))
    return known[0]


@lru_cache(maxsize=1)
def _known(_digest: bytes, _pointer: BitmapsPointer, _geometry: Geometry) -> list[Listed]:
    """What was listed of a directory, if it was. Each check asks, and who comes after it, and there
    may be 65,535 bitmaps.
    """
    return []


def _list(directory: _Directory, pointer: BitmapsPointer, geometry: Geometry) -> Listed:
    builder = _EntriesBuilder()
    error = None
    try:
        _read_entries(directory, pointer, builder)
    except ImageError as broken:
        error = as_value(broken)
    entries = builder.build()
    return Listed(entries, _broken(entries, geometry), error, geometry)


class _EntriesBuilder:
    def __init__(self) -> None:
        self._raw = bytearray()
        self._start: list[int] = []
        self._offset: list[int] = []

    def add(self, offset: int, raw: bytes, starts: Sequence[int] = (0,)) -> None:
        """Entries that begin at these *starts* in *raw*, which stands at *offset*."""
        self._start += [len(self._raw) + start for start in starts]
        self._offset += [offset + start for start in starts]
        self._raw += raw

    def build(self) -> BitmapEntries:
        columns = (np.array(each, dtype=np.int64) for each in (self._start, self._offset))
        return BitmapEntries(self._raw, *columns)


class _Directory:
    """The bytes of a directory. It may claim 64 MiB, and be a hole: a window of it is held."""

    def __init__(self, source: Source, start: int, size: int) -> None:
        self._source, self.start, self.size = source, start, size
        self._window, self._window_at = b"", 0

    @classmethod
    def of(cls, source: Source, pointer: BitmapsPointer, geometry: Geometry) -> _Directory:
        """Raises `ImageError` where it cannot be one."""
        start, size = pointer.bitmap_directory_offset, pointer.bitmap_directory_size
        if not size:
            raise ImageError("bitmap_directory_size", size, "a directory cannot be empty")
        if start + size > source.size + geometry.cluster_size:
            # Zeros past the end of the file are no valid entry: refuse before reading so many.
            raise ImageError(
                "bitmap_directory_offset", start, "the directory runs past the end of the file"
            )
        return cls(source, start, size)

    def window(self, position: int, length: int) -> tuple[bytes, int]:
        """Some of its bytes, and where among them those from *position* on are: *length*, or as
        many as there are.
        """
        length = min(length, self.size - position)
        if not self._window_at <= position <= self._window_at + len(self._window) - length:
            some = min(max(length, WINDOW_BYTES), self.size - position)
            self._window = read_bytes(self._source, self.start + position, some)
            self._window_at = position
        return self._window, position - self._window_at

    def digest(self) -> bytes:
        """Another for other bytes."""
        found = hashlib.blake2b()
        for low, high in self._source.data_extents(self.start, self.size):
            for at in range(low, high, WINDOW_BYTES):
                content = read_bytes(self._source, at, min(high - at, WINDOW_BYTES))
                found.update(b"%d %d " % (at, len(content)))
                found.update(content)
        return found.digest()


def _read_entries(directory: _Directory, pointer: BitmapsPointer, entries: _EntriesBuilder) -> None:
    """Add the entries, whatever they say. Raises `ImageError` where it goes wrong."""
    number, position = 0, 0
    while position < directory.size:
        if number == pointer.nb_bitmaps:
            raise ImageError("nb_bitmaps", pointer.nb_bitmaps, "the bitmap directory lists more")
        raw, at = directory.window(position, ENTRY_BYTES + MAX_NAME)
        starts, end = _plain_entries(raw, at, pointer.nb_bitmaps - number)
        if not starts:
            position = _read_entry(directory, position, entries)
            number += 1
            continue
        entries.add(directory.start + position, raw[at:end], [start - at for start in starts])
        position += end - at
        number += len(starts)
    if number != pointer.nb_bitmaps:
        raise ImageError("nb_bitmaps", pointer.nb_bitmaps, f"the directory lists {number}")


def _plain_entries(raw: bytes, at: int, most: int) -> tuple[list[int], int]:
    """Where entries begin in *raw* that stand one after the other from *at* on, whole and without
    extra data, no more than *most*; and where the last ends, padded.
    """
    starts: list[int] = []
    last = len(raw) - ENTRY_BYTES
    while at <= last and len(starts) < most:
        name_size, extra_size = _SIZES.unpack_from(raw, at)
        following = at + (ENTRY_BYTES + name_size + 7 & ~7)
        if extra_size or following > len(raw):
            break
        starts.append(at)
        at = following
    return starts, at


def _read_entry(directory: _Directory, position: int, entries: _EntriesBuilder) -> int:
    """Add the entry at *position*; where the next one begins."""
    start = directory.start + position
    if position + ENTRY_BYTES > directory.size:
        raise _cut_off(start)
    raw, at = directory.window(position, ENTRY_BYTES + MAX_NAME)
    name_size, extra_size = _SIZES.unpack_from(raw, at)
    name = position + ENTRY_BYTES + extra_size
    following: int = position + ((ENTRY_BYTES + extra_size + name_size + 7) & ~7)
    if following > directory.size:
        raise _cut_off(start)
    fixed = raw[at : at + ENTRY_BYTES]
    raw, at = directory.window(name, name_size)
    entries.add(start, fixed + raw[at : at + name_size])
    return following


def _cut_off(offset: int) -> ImageError:
    return ImageError("bitmap directory", offset, "its last entry is cut off")


# ---- what QEMU refuses: check_dir_entry ----

_Fields = npt.NDArray[np.void]
_Breaks = Callable[[_Fields, Geometry], Mask]


def _are_used(fields: _Fields) -> Mask:
    used: Mask = fields["flags"] & np.uint32(IN_USE) != 0
    return used


@lru_cache(maxsize=1)
def _needed(geometry: Geometry) -> I64:
    """How many table entries the disk needs, by granularity bits."""
    size = geometry.virtual_size // SECTOR * SECTOR
    needed = [-(-size // (geometry.cluster_size * 8 << bits)) for bits in range(256)]
    return np.array(needed, dtype=np.int64)


_RULES: tuple[tuple[str, _Breaks, str], ...] = (
    ("extra_data_size", lambda each, _: each["extra_data_size"] != 0, "not supported"),
    (
        "bitmap_table_size",
        lambda each, _: (
            (each["bitmap_table_size"] == 0) | (each["bitmap_table_size"] > MAX_TABLE_ENTRIES)
        ),
        "out of bounds",
    ),
    (
        "bitmap_table_offset",
        lambda each, geometry: (
            (each["bitmap_table_offset"] == 0)
            | (each["bitmap_table_offset"] & np.uint64(geometry.cluster_size - 1) != 0)
        ),
        "zero or not cluster aligned",
    ),
    (
        "granularity_bits",
        lambda each, _: (
            (each["granularity_bits"] < GRANULARITY_BITS.start)
            | (each["granularity_bits"] >= GRANULARITY_BITS.stop)
        ),
        "must be 9 to 31",
    ),
    (
        "flags",
        lambda each, _: each["flags"] & np.uint32(RESERVED_FLAGS) != 0,
        "reserved bits are set",
    ),
    ("name_size", lambda each, _: each["name_size"] > MAX_NAME, "over 1023 bytes"),
    ("type", lambda each, _: each["type"] != TYPE_DIRTY, "only 1 (dirty tracking) is known"),
    (
        "bitmap_table_size",
        lambda each, geometry: (
            each["bitmap_table_size"].astype(np.int64) * geometry.cluster_size > MAX_BITMAP_BYTES
        ),
        "the bitmap would have over 512 MiB",
    ),
    (
        "bitmap_table_size",
        lambda each, geometry: (
            ~_are_used(each)
            & (each["bitmap_table_size"] != _needed(geometry)[each["granularity_bits"]])
        ),
        "the disk needs {} entries",
    ),
)
"""Of each: the field that it is about, which entries break it, and why they do. The first that is
broken is told.
"""

_NEEDED = len(_RULES) - 1
_NOT_UNIQUE, _SOUND = len(_RULES), 255


def _broken(entries: BitmapEntries, geometry: Geometry) -> U8:
    """Which rule each entry breaks first."""
    fields = entries.fields()
    broken = np.full(len(entries), _SOUND, dtype=np.uint8)
    for number, (_, breaks, _) in enumerate(_RULES):
        broken[(broken == _SOUND) & breaks(fields, geometry)] = number
    to_be_unique = (broken == _SOUND) & ~_are_used(fields)
    if to_be_unique.any():
        broken[to_be_unique & _had_before(entries.names())] = _NOT_UNIQUE
    return broken


def _had_before(names: Iterator[bytes]) -> Mask:
    """Which names one before them has, too."""
    first: dict[bytes, int] = {}
    had = [first.setdefault(name, at) != at for at, name in enumerate(names)]
    return np.array(had, dtype=np.bool_)
