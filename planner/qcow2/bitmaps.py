"""The bitmap directory and its tables.

Source: docs/interop/qcow2.txt, "Bitmaps"; for what QEMU refuses, bitmap_list_load and
check_dir_entry.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from construct import Int8ub, Int16ub, Int32ub, Int64ub, Struct

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
    raw: bytes = ENTRY.build(
        {
            "bitmap_table_offset": bitmap.bitmap_table_offset,
            "bitmap_table_size": bitmap.bitmap_table_size,
            "flags": bitmap.flags,
            "type": bitmap.type,
            "granularity_bits": bitmap.granularity_bits,
            "name_size": len(bitmap.name),
            "extra_data_size": bitmap.extra_data_size,
        }
    )
    raw += bytes(bitmap.extra_data_size) + bitmap.name
    return raw.ljust(-(-len(raw) // 8) * 8, b"\0")


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


Listed = list[tuple[Bitmap, Refusal | None]]
"""Bitmaps, each with what QEMU refuses about its entry."""


def read_bitmaps(source: Source, pointer: BitmapsPointer, geometry: Geometry) -> tuple[Bitmap, ...]:
    """The bitmap directory. Raises `ImageError` for the first thing that QEMU refuses."""
    found: list[Bitmap] = []
    rules = _Rules(geometry)
    for bitmap in _entries(_Directory.of(source, pointer, geometry), pointer):
        refusal = rules.refusal(bitmap)
        if refusal is not None:
            raise refusal.of(bitmap)
        found.append(bitmap)
    return tuple(found)


def list_bitmaps(
    source: Source, pointer: BitmapsPointer, geometry: Geometry
) -> tuple[Listed, ImageError | None]:
    """All that can be made out of the bitmap directory, and what ends it too early, if anything."""
    try:
        directory = _Directory.of(source, pointer, geometry)
    except ImageError as error:
        return [], as_value(error)
    known = _known(directory.digest(), pointer, geometry)
    if not known:
        known.append(_list(directory, pointer, geometry))
    listed, broken = known[0]
    return list(listed), broken


_Found = tuple[tuple[tuple[Bitmap, Refusal | None], ...], ImageError | None]


@lru_cache(maxsize=1)
def _known(_digest: bytes, _pointer: BitmapsPointer, _geometry: Geometry) -> list[_Found]:
    """What was listed of a directory, if it was. Several ask, one after the other, and there may be
    65,535 bitmaps.
    """
    return []


def _list(directory: _Directory, pointer: BitmapsPointer, geometry: Geometry) -> _Found:
    listed: Listed = []
    rules = _Rules(geometry)
    try:
        for bitmap in _entries(directory, pointer):
            listed.append((bitmap, rules.refusal(bitmap)))
    except ImageError as error:
        return tuple(listed), as_value(error)
    return tuple(listed), None


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


def _entries(directory: _Directory, pointer: BitmapsPointer) -> Iterator[Bitmap]:
    """The entries, whatever they say. Raises `ImageError` where it goes wrong."""
    number, position = 0, 0
    while position < directory.size:
        if number == pointer.nb_bitmaps:
            raise ImageError("nb_bitmaps", pointer.nb_bitmaps, "the bitmap directory lists more")
        bitmap, position = _decode_entry(directory, position)
        yield bitmap
        number += 1
    if number != pointer.nb_bitmaps:
        raise ImageError("nb_bitmaps", pointer.nb_bitmaps, f"the directory lists {number}")


def _decode_entry(directory: _Directory, position: int) -> tuple[Bitmap, int]:
    """The entry at *position*, and where the next one begins."""
    start = directory.start + position
    if position + ENTRY_BYTES > directory.size:
        raise _cut_off(start)
    raw, at = directory.window(position, ENTRY_BYTES + MAX_NAME)
    table_at, entries, flags, kind, bits, name_size, extra_size = _FIXED.values(raw, at)
    name = position + ENTRY_BYTES + extra_size
    following = position + ((ENTRY_BYTES + extra_size + name_size + 7) & ~7)
    if following > directory.size:
        raise _cut_off(start)
    raw, at = directory.window(name, name_size)
    bitmap = Bitmap(
        offset=start,
        bitmap_table_offset=table_at,
        bitmap_table_size=entries,
        flags=flags,
        type=kind,
        granularity_bits=bits,
        extra_data_size=extra_size,
        name=raw[at : at + name_size],
    )
    return bitmap, following


def _cut_off(offset: int) -> ImageError:
    return ImageError("bitmap directory", offset, "its last entry is cut off")


class _Rules:
    """check_dir_entry, of one bitmap after the other."""

    def __init__(self, geometry: Geometry) -> None:
        self._cluster_size = geometry.cluster_size
        size = geometry.virtual_size // SECTOR * SECTOR
        self._needed = [-(-size // (geometry.cluster_size * 8 << bits)) for bits in range(256)]
        self._names: set[bytes] = set()

    def refusal(self, bitmap: Bitmap) -> Refusal | None:
        """What is wrong with it, or with its name after those before it."""
        is_used, name = bool(bitmap.flags & IN_USE), bitmap.name
        broken = self._of_fields(bitmap)
        if broken is None and not is_used and name in self._names:
            broken = Refusal("name", quoted(name), "not unique")
        self._names.add(name)
        return broken

    def _of_fields(self, bitmap: Bitmap) -> Refusal | None:
        entries, at, bits = (
            bitmap.bitmap_table_size,
            bitmap.bitmap_table_offset,
            bitmap.granularity_bits,
        )
        for broken, field, value, problem in (
            (bitmap.extra_data_size, "extra_data_size", bitmap.extra_data_size, "not supported"),
            (not 0 < entries <= MAX_TABLE_ENTRIES, "bitmap_table_size", entries, "out of bounds"),
            (
                at == 0 or at % self._cluster_size,
                "bitmap_table_offset",
                at,
                "zero or not cluster aligned",
            ),
            (bits not in GRANULARITY_BITS, "granularity_bits", bits, "must be 9 to 31"),
            (bitmap.flags & RESERVED_FLAGS, "flags", bitmap.flags, "reserved bits are set"),
            (len(bitmap.name) > MAX_NAME, "name_size", len(bitmap.name), "over 1023 bytes"),
            (bitmap.type != TYPE_DIRTY, "type", bitmap.type, "only 1 (dirty tracking) is known"),
            (
                entries * self._cluster_size > MAX_BITMAP_BYTES,
                "bitmap_table_size",
                entries,
                "the bitmap would have over 512 MiB",
            ),
        ):
            if broken:
                return Refusal(field, value, problem)
        needed = self._needed[bits]
        if not bitmap.flags & IN_USE and entries != needed:
            return Refusal("bitmap_table_size", entries, f"the disk needs {needed} entries")
        return None
