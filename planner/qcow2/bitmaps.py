"""The bitmap directory and its tables.

Source: docs/interop/qcow2.txt, "Bitmaps"; for what QEMU refuses, bitmap_list_load and
check_dir_entry.
"""

from __future__ import annotations

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
    """One entry of the bitmap directory; ``offset`` is where it stands in the file, bytes."""

    offset: int
    bitmap_table_offset: int
    bitmap_table_size: int
    flags: int
    type: int
    granularity_bits: int
    extra_data: bytes
    name: bytes

    @property
    def granularity(self) -> int:
        """Guest bytes that one bit stands for."""
        return 1 << self.granularity_bits


def encode_bitmap(bitmap: Bitmap) -> bytes:
    """One directory entry, padded to eight bytes: the inverse of decoding."""
    raw: bytes = ENTRY.build(
        {
            "bitmap_table_offset": bitmap.bitmap_table_offset,
            "bitmap_table_size": bitmap.bitmap_table_size,
            "flags": bitmap.flags,
            "type": bitmap.type,
            "granularity_bits": bitmap.granularity_bits,
            "name_size": len(bitmap.name),
            "extra_data_size": len(bitmap.extra_data),
        }
    )
    raw += bitmap.extra_data + bitmap.name
    return raw.ljust(-(-len(raw) // 8) * 8, b"\0")


Listed = list[tuple[Bitmap, ImageError | None]]
"""Bitmaps, each with what QEMU refuses about its entry."""


def read_bitmaps(source: Source, pointer: BitmapsPointer, geometry: Geometry) -> tuple[Bitmap, ...]:
    """The bitmap directory. Raises `ImageError` for the first thing that QEMU refuses."""
    found: list[Bitmap] = []
    names: set[bytes] = set()
    for bitmap in _decode_directory(_read_directory(source, pointer, geometry), pointer):
        error = _entry_error(bitmap, names, geometry)
        if error is not None:
            raise error
        names.add(bitmap.name)
        found.append(bitmap)
    return tuple(found)


def list_bitmaps(
    source: Source, pointer: BitmapsPointer, geometry: Geometry
) -> tuple[Listed, ImageError | None]:
    """All that can be made out of the bitmap directory, and what ends it too early, if anything."""
    try:
        directory = _read_directory(source, pointer, geometry)
    except ImageError as error:
        return [], as_value(error)
    listed, broken = _list_directory(directory, pointer, geometry)
    return list(listed), broken


@lru_cache(maxsize=1)
def _list_directory(
    directory: bytes, pointer: BitmapsPointer, geometry: Geometry
) -> tuple[tuple[tuple[Bitmap, ImageError | None], ...], ImageError | None]:
    """The same of its bytes. Several ask, one after the other, and there may be 65,535 of them."""
    listed: Listed = []
    names: set[bytes] = set()
    try:
        for bitmap in _decode_directory(directory, pointer):
            listed.append((bitmap, _entry_error(bitmap, names, geometry)))
            names.add(bitmap.name)
    except ImageError as error:
        return tuple(listed), as_value(error)
    return tuple(listed), None


def _read_directory(source: Source, pointer: BitmapsPointer, geometry: Geometry) -> bytes:
    """Its bytes. Raises `ImageError` where it cannot be one."""
    start, size = pointer.bitmap_directory_offset, pointer.bitmap_directory_size
    if not size:
        raise ImageError("bitmap_directory_size", size, "a directory cannot be empty")
    if start + size > source.size + geometry.cluster_size:
        # Zeros past the end of the file are no valid entry: refuse before reading so many.
        raise ImageError(
            "bitmap_directory_offset", start, "the directory runs past the end of the file"
        )
    return read_bytes(source, start, size)


def _decode_directory(directory: bytes, pointer: BitmapsPointer) -> Iterator[Bitmap]:
    """The entries, whatever they say. Raises `ImageError` where it goes wrong."""
    start, number, position = pointer.bitmap_directory_offset, 0, 0
    while position < len(directory):
        if number == pointer.nb_bitmaps:
            raise ImageError("nb_bitmaps", pointer.nb_bitmaps, "the bitmap directory lists more")
        bitmap, position = _decode_entry(directory, position, start)
        yield bitmap
        number += 1
    if number != pointer.nb_bitmaps:
        raise ImageError("nb_bitmaps", pointer.nb_bitmaps, f"the directory lists {number}")


def _entry_error(bitmap: Bitmap, names: set[bytes], geometry: Geometry) -> ImageError | None:
    """What QEMU refuses about an entry; *names*: of those before it."""
    try:
        _check_entry(bitmap, geometry)
    except ImageError as error:
        return as_value(error)
    if not bitmap.flags & IN_USE and bitmap.name in names:
        return ImageError(
            f"name of the bitmap at {bitmap.offset}", quoted(bitmap.name), "not unique"
        )
    return None


def _decode_entry(directory: bytes, position: int, start: int) -> tuple[Bitmap, int]:
    """The entry at *position*, and where the next one begins."""
    if position + ENTRY_BYTES > len(directory):
        raise _cut_off(start + position)
    table_at, entries, flags, kind, bits, name_size, extra_size = _FIXED.values(directory, position)
    extra = position + ENTRY_BYTES
    name = extra + extra_size
    end = name + name_size
    following = position + ((end - position + 7) & ~7)
    if following > len(directory):
        raise _cut_off(start + position)
    bitmap = Bitmap(
        offset=start + position,
        bitmap_table_offset=table_at,
        bitmap_table_size=entries,
        flags=flags,
        type=kind,
        granularity_bits=bits,
        extra_data=directory[extra:name],
        name=directory[name:end],
    )
    return bitmap, following


def _cut_off(offset: int) -> ImageError:
    return ImageError("bitmap directory", offset, "its last entry is cut off")


def _check_entry(bitmap: Bitmap, geometry: Geometry) -> None:
    """check_dir_entry: raises `ImageError`."""
    bits, entries = bitmap.granularity_bits, bitmap.bitmap_table_size
    table_at = bitmap.bitmap_table_offset
    size = geometry.virtual_size // SECTOR * SECTOR
    needed = -(-size // (geometry.cluster_size * 8 << bits))
    # Of tens of thousands: sentences are made where one is wrong.
    rules: tuple[tuple[bool, str, int, str], ...] = (
        (bool(bitmap.extra_data), "extra_data_size", len(bitmap.extra_data), "not supported"),
        (not 0 < entries <= MAX_TABLE_ENTRIES, "bitmap_table_size", entries, "out of bounds"),
        (
            table_at == 0 or table_at % geometry.cluster_size != 0,
            "bitmap_table_offset",
            table_at,
            "zero or not cluster aligned",
        ),
        (bits not in GRANULARITY_BITS, "granularity_bits", bits, "must be 9 to 31"),
        (bool(bitmap.flags & RESERVED_FLAGS), "flags", bitmap.flags, "reserved bits are set"),
        (len(bitmap.name) > MAX_NAME, "name_size", len(bitmap.name), "over 1023 bytes"),
        (bitmap.type != TYPE_DIRTY, "type", bitmap.type, "only 1 (dirty tracking) is known"),
        (
            entries * geometry.cluster_size > MAX_BITMAP_BYTES,
            "bitmap_table_size",
            entries,
            "the bitmap would have over 512 MiB",
        ),
        (
            not bitmap.flags & IN_USE and entries != needed,
            "bitmap_table_size",
            entries,
            "the disk needs {} entries",
        ),
    )
    for broken, field, value, problem in rules:
        if broken:
            raise ImageError(
                f"{field} of the bitmap at {bitmap.offset}", value, problem.format(needed)
            )
