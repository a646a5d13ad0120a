"""Directory entries of XFS: many directories at a time, a step an entry of each."""

from __future__ import annotations

import numpy as np

from planner.arrays import I64, U8
from planner.guestfs.columns import big, select
from planner.guestfs.protocol import Names

DIRECTORY_TYPE = 2

MAGICS = ((b"XD2D", b"XD2B"), (b"XDD3", b"XDB3"))
"""Of blocks of entries, and of the only block of a directory; of version 4 and of version 5."""

LEAF_OFFSET = 1 << 35
"""What lies behind this in a directory is an index of its entries."""


def no_names(flat: U8) -> Names:
    """None."""
    empty = np.zeros(0, dtype=np.int64)
    return Names(empty, empty, np.zeros(0, dtype=np.bool_), flat, empty, empty)


def names_in(blocks: U8, parent: I64, *, is_v5: bool, has_types: bool) -> Names:
    """The entries in directory blocks, shape (n, bytes), of directories *parent*.

    What does not make sense ends its block. Without *has_types* nothing is known to be a directory.
    """
    count, size = blocks.shape
    flat = np.ascontiguousarray(blocks).reshape(-1)
    base = np.arange(count, dtype=np.int64) * size
    data, single = (np.frombuffer(magic, dtype=np.uint8) for magic in MAGICS[is_v5])
    is_single = (blocks[:, :4] == single).all(axis=1)
    sound = is_single | (blocks[:, :4] == data).all(axis=1)
    if is_v5:
        sound &= big(flat, base + 40, 8) == parent
    end = np.full(count, size, dtype=np.int64)
    end[is_single] = size - 8 - 8 * big(flat, base[is_single] + size - 8, 4)
    at = np.full(count, 64 if is_v5 else 16, dtype=np.int64)
    fixed = 9 + has_types
    row = np.flatnonzero(sound & (at + 16 <= end))
    found = []
    while len(row):
        place = base[row] + at[row]
        is_unused = big(flat, place, 2) == 0xFFFF
        name_length = flat[place + 8].astype(np.int64)
        length = np.where(is_unused, big(flat, place + 2, 2), (name_length + fixed + 2 + 7) & ~7)
        good = (length >= 8) & (length % 8 == 0) & (at[row] + length <= end[row])
        is_entry = good & ~is_unused & (name_length > 0)
        found.append(select(is_entry, row, place, name_length))
        row, length = row[good], length[good]
        at[row] += length
        row = row[at[row] + 16 <= end[row]]
    if not found:
        return no_names(flat)
    rows, place, length = (np.concatenate(column) for column in zip(*found, strict=True))
    kind = flat[place + 9 + length] if has_types else np.zeros(len(place), dtype=np.uint8)
    return _without_dots(
        Names(parent[rows], big(flat, place, 8), kind == DIRECTORY_TYPE, flat, place + 9, length)
    )


def short_names(raw: U8, begin: I64, size: I64, parent: I64, *, has_types: bool) -> Names:
    """The entries of directories that are in their inodes: *size* bytes from *begin* in *raw*."""
    flat = np.ascontiguousarray(raw).reshape(-1)
    base = np.arange(len(raw), dtype=np.int64) * raw.shape[1] + begin
    row = np.flatnonzero(size >= 6)
    left = np.zeros(len(raw), dtype=np.int64)
    left[row] = flat[base[row]]
    width = np.full(len(raw), 4, dtype=np.int64)
    width[row] = np.where(flat[base[row] + 1] > 0, 8, 4)
    at = 2 + width
    found = []
    row = row[left[row] > 0]
    while len(row):
        row = row[at[row] + 3 + width[row] <= size[row]]
        place = base[row] + at[row]
        length = flat[place].astype(np.int64)
        whole = 3 + length + has_types + width[row]
        good = (length > 0) & (at[row] + whole <= size[row])
        row, place, length, whole = select(good, row, place, length, whole)
        found.append((row, place + 3, length))
        at[row] += whole
        left[row] -= 1
        row = row[left[row] > 0]
    if not found:
        return no_names(flat)
    row, name, length = (np.concatenate(column) for column in zip(*found, strict=True))
    number = name + length + has_types
    child = np.where(
        width[row] == 8,
        big(flat, np.minimum(number, len(flat) - 8), 8),
        big(flat, number, 4),
    )
    kind = flat[name + length] if has_types else np.zeros(len(name), dtype=np.uint8)
    return Names(parent[row], child, kind == DIRECTORY_TYPE, flat, name, length)


def _without_dots(names: Names) -> Names:
    dot = ord(".")
    first, last = names.raw[names.start], names.raw[names.start + names.length - 1]
    kept = (names.length > 2) | (first != dot) | (last != dot)
    parent, child, start, length = select(
        kept, names.parent, names.child, names.start, names.length
    )
    return Names(parent, child, names.is_directory[kept], names.raw, start, length)
