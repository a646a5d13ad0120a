"""Nodes of btrfs's trees in columns: their heads, pointers to other nodes, and the items of leaves.

Decoding takes any bytes: what makes no sense is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

from planner.arrays import I64, U8, Mask
from planner.guestfs.columns import little

HEAD, POINTER, ITEM = 101, 33, 25
"""Bytes of a node's head, of a pointer to another node, and of an item's head."""

INODE_ITEM, INODE_REF, INODE_EXTREF, ORPHAN_ITEM = 1, 12, 13, 48
DIR_INDEX, EXTENT_DATA = 96, 108
ROOT_ITEM, ROOT_REF = 132, 156
EXTENT_ITEM, METADATA_ITEM = 168, 169
CHUNK_ITEM = 228


@dataclass(frozen=True, slots=True)
class Pointers:
    """Pointers in nodes: ``row``, in which; the first key below; where to, and of what generation.
    ``has_next``: whether another one of the same node follows it.
    """

    row: I64
    object: I64
    type: I64
    offset: I64
    logical: I64
    generation: I64
    has_next: Mask


@dataclass(frozen=True, slots=True)
class Items:
    """Items of leaves: ``row``, in which; the key as object, type and offset; the ``size`` bytes
    that it holds are at ``at`` in ``flat``.
    """

    row: I64
    object: I64
    type: I64
    offset: I64
    at: I64
    size: I64
    flat: U8

    def __len__(self) -> int:
        return len(self.row)

    def select(self, which: Mask | I64) -> Items:
        """Some of them."""
        row, object_, kind, offset, at, size = (
            getattr(self, each.name)[which] for each in fields(self)[:-1]
        )
        return Items(row, object_, kind, offset, at, size, self.flat)

    def of(self, kind: int, least: int = 0) -> Items:
        """Those of a type that hold so many bytes *at least*."""
        return self.select((self.type == kind) & (self.size >= least))


def pointers_in(raw: U8) -> Pointers:
    """Those of nodes above the leaves, *raw* with shape (n, bytes)."""
    flat, row, at = _slots(raw, POINTER)
    return Pointers(
        row,
        little(flat, at, 8),
        flat[at + 8].astype(np.int64),
        little(flat, at + 9, 8),
        little(flat, at + 17, 8),
        little(flat, at + 25, 8),
        np.append(row[1:] == row[:-1], np.zeros(1, dtype=np.bool_))[: len(row)],
    )


def items_in(raw: U8) -> Items:
    """Those of leaves, *raw* with shape (n, bytes)."""
    size = raw.shape[1]
    flat, row, at = _slots(raw, ITEM)
    data, length = little(flat, at + 17, 4), little(flat, at + 21, 4)
    inside = HEAD + data + length <= size
    row, at, data, length = row[inside], at[inside], data[inside], length[inside]
    return Items(
        row,
        little(flat, at, 8),
        flat[at + 8].astype(np.int64),
        little(flat, at + 9, 8),
        row * size + HEAD + data,
        length,
        flat,
    )


def _slots(raw: U8, width: int) -> tuple[U8, I64, I64]:
    """All bytes, and of each entry its row and where it is."""
    count, size = raw.shape
    flat, base = raw.reshape(-1), np.arange(count, dtype=np.int64) * size
    many = np.minimum(little(flat, base + 96, 4), (size - HEAD) // width)
    slots = np.arange(int(many.max(initial=0)))
    row, slot = np.nonzero(slots < many[:, None])
    return flat, row, row * size + HEAD + slot * width


def names_within(
    flat: U8, at: I64, end: I64, head: int, length_at: int
) -> Iterator[tuple[I64, I64, I64, I64]]:
    """Of values that are names one behind the other, each with a *head*: a step for each place.

    Yields the rows of the values that have one there, where its head is, where it is itself, and
    its length, which is in two bytes at *length_at*.
    """
    at = at.copy()
    live = np.flatnonzero(at + head <= end)
    while len(live):
        place = at[live]
        length = little(flat, place + length_at, 2)
        good = (length > 0) & (place + head + length <= end[live])
        live, place, length = live[good], place[good], length[good]
        yield live, place, place + head, length
        at[live] = place + head + length
        live = live[at[live] + head <= end[live]]
