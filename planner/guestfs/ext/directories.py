"""Directory entries of ext2/3/4: many blocks at a time, a step an entry of each.

A directory with an index is read as one without: its index hides in entries that name nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.arrays import I64, U8, Mask, expand_ranges
from planner.guestfs.ext.inodes import Inodes
from planner.guestfs.protocol import Names

HEADER = 8
"""Bytes of an entry before its name: inode, rec_len, name_len, file_type."""

DIRECTORY_TYPE = 2

XATTR_MAGIC = 0xEA020000
SYSTEM_INDEX = 7
"""Of the attribute ``system.data``: what of a file in its inode found no room in ``i_block``."""


def names_in(
    blocks: U8, parent: I64, begin: I64 | int = 0, *, end: I64 | None = None, has_types: bool
) -> Names:
    """The entries in *blocks*, shape (n, bytes), of directories *parent*.

    They are looked for from *begin* up to *end*, by default in the whole of each block. What does
    not make sense ends its block. Without *has_types* nothing is known to be a directory.
    """
    count, size = blocks.shape
    flat = np.ascontiguousarray(blocks).reshape(-1)
    at = np.broadcast_to(np.asarray(begin, dtype=np.int64), count).copy()
    stop = np.full(count, size, dtype=np.int64) if end is None else end
    row = np.flatnonzero(at + HEADER <= stop)
    found: list[tuple[I64, I64, I64]] = []
    while len(row):
        place = row * size + at[row]
        length = _u16(flat, place + 4)
        if size > 1 << 15:  # ext4_rec_len_from_disk: lengths are multiples of 4
            length = np.where(
                (length == 0xFFFF) | (length == 0), 1 << 16, (length & 0xFFFC) | (length & 3) << 16
            )
        name_length = flat[place + 6].astype(np.int64)
        sound = (length >= HEADER + 4) & (length % 4 == 0) & (at[row] + length <= stop[row])
        sound &= name_length + HEADER <= length
        row, place, length, name_length = _of(sound, row, place, length, name_length)
        is_entry = (_u32(flat, place) != 0) & (name_length > 0)
        is_entry &= ~_is_dots(flat, place + HEADER, name_length)
        found.append(_of(is_entry, row, place, name_length))  # type: ignore[arg-type]
        at[row] += length
        row = row[at[row] + HEADER <= stop[row]]
    if not found:
        empty = np.zeros(0, dtype=np.int64)
        return Names(empty, empty, np.zeros(0, dtype=np.bool_), flat, empty, empty)
    rows, places, lengths = (np.concatenate(column) for column in zip(*found, strict=True))
    kinds = flat[places + 7] == DIRECTORY_TYPE if has_types else np.zeros(len(rows), dtype=np.bool_)
    return Names(parent[rows], _u32(flat, places), kinds, flat, places + HEADER, lengths)


def _of(mask: Mask, *columns: I64) -> tuple[I64, ...]:
    return tuple(column[mask] for column in columns)


def _u16(flat: U8, at: I64) -> I64:
    return flat[at].astype(np.int64) | flat[at + 1].astype(np.int64) << 8


def _u32(flat: U8, at: I64) -> I64:
    return _u16(flat, at) | _u16(flat, at + 2) << 16


def _is_dots(flat: U8, at: I64, length: I64) -> Mask:
    dot = ord(".")
    last = np.minimum(at + 1, len(flat) - 1)
    dots: Mask = (flat[at] == dot) & ((length == 1) | ((length == 2) & (flat[last] == dot)))
    return dots


@dataclass(frozen=True, slots=True)
class InlineData:
    """What attribute ``system.data`` of each inode has: where in its record, and how long.

    ``length`` 0: there is none.
    """

    start: I64
    length: I64


def inline_rest(inodes: Inodes) -> InlineData:
    """Of inodes whose data is in their record: the part that is among the attributes."""
    raw = inodes.raw
    count, size = raw.shape
    start, length = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    if size <= 128 or not count:
        return InlineData(start, length)
    flat = np.ascontiguousarray(raw).reshape(-1)
    header = 128 + inodes.field["extra_isize"].astype(np.int64)
    row = np.flatnonzero(header + 4 + 16 <= size)
    row = row[_u32(flat, row * size + header[row]) == XATTR_MAGIC]
    first = header + 4
    at = first.copy()
    while len(row):
        place = row * size + at[row]
        name_length = flat[place].astype(np.int64)
        offset, value_size = _u16(flat, place + 2), _u32(flat, place + 8)
        is_end = _u32(flat, place) == 0
        is_data = (flat[place + 1] == SYSTEM_INDEX) & (name_length == 4)
        name = expand_ranges(place + 16, place + 19).reshape(-1, 4)
        is_data &= (flat[np.minimum(name, len(flat) - 1)] == np.frombuffer(b"data", np.uint8)).all(
            axis=1
        )
        is_data &= ~is_end & (first[row] + offset + value_size <= size)
        start[row[is_data]] = (first[row] + offset)[is_data]
        length[row[is_data]] = value_size[is_data]
        at[row] += 16 + (name_length + 3) // 4 * 4
        row = row[~is_end & ~is_data & (at[row] + 16 <= size)]
    return InlineData(start, length)
