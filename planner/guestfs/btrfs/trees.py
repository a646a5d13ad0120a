"""The trees of btrfs: their nodes, read from whichever copy is whole, a level of many at a time.

A node says where it belongs, of which file system it is, how high it stands, and when it was
written: one that says anything else is an old one, or garbage, and is lost. Nothing is followed
twice in one tree; of trees that share nodes, as snapshots do, so much that no bomb is made of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np

from planner.arrays import I64, U8, Mask
from planner.guestfs.btrfs.chunks import MAX_COPIES, Chunks
from planner.guestfs.btrfs.items import Items, items_in, pointers_in
from planner.guestfs.btrfs.superblock import CRC32C_TYPE, MAX_LEVEL, Superblock
from planner.guestfs.checksums import crc_of_long
from planner.guestfs.columns import little
from planner.guestfs.reading import Holes, read_blocks
from planner.source import present_tables

NODES_AT_A_TIME = 128

MAX_SHARED, ANYWAY = 64, 1 << 10
"""So many times as many nodes are looked at as there are different ones, and some more."""

TYPE_BITS = 8
END = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class Places:
    """Nodes as what leads to them has them: of which ``tree``, the ``logical`` address, ``level``
    and ``generation``; the keys below are from ``low`` up to ``high``, each as the object with the
    type in `TYPE_BITS` below it, and an offset.
    """

    tree: I64
    logical: I64
    level: I64
    generation: I64
    low: I64
    low_offset: I64
    high: I64
    high_offset: I64

    def __len__(self) -> int:
        return len(self.tree)

    def select(self, which: Mask | I64 | slice) -> Places:
        """Some of them."""
        return Places(*(getattr(self, each.name)[which] for each in fields(self)))

    @classmethod
    def joined(cls, parts: Sequence[Places]) -> Places:
        """All of them, one after the other."""
        none = [np.zeros(0, dtype=np.int64)]
        return cls(
            *(
                np.concatenate(none + [getattr(part, each.name) for part in parts])
                for each in fields(cls)
            )
        )

    def latest(self, tree: I64, key: I64, offset: I64) -> I64:
        """Of each key the row that begins last at or before it in that tree, -1: there is none."""
        count = len(self)
        order = np.lexsort(
            (
                np.repeat((0, 1), (count, len(tree))),
                np.concatenate((self.low_offset, offset)),
                np.concatenate((self.low, key)),
                np.concatenate((self.tree, tree)),
            )
        )
        latest = np.maximum.accumulate(np.where(order < count, np.arange(len(order)), -1))
        found = np.full(len(tree), -1, dtype=np.int64)
        at = np.flatnonzero((order >= count) & (latest >= 0))
        mine, row = order[at] - count, order[latest[at]]
        found[mine] = np.where(self.tree[row] == tree[mine], row, -1)
        return found

    def ends_behind(self, row: I64, key: I64, offset: I64) -> Mask:
        """Whether each *row* goes on behind a key; row -1 does not."""
        if not len(self):
            return np.zeros(len(row), dtype=np.bool_)
        high, high_offset = self.high[row], self.high_offset[row]
        result: Mask = (row >= 0) & ((key < high) | ((key == high) & (offset < high_offset)))
        return result


def root_places(tree: I64, logical: I64, level: I64, generation: I64) -> Places:
    """Roots of trees: all keys are below them."""
    zero = np.zeros(len(tree), dtype=np.int64)
    return Places(tree, logical, level, generation, zero, zero, zero + END, zero)


@dataclass(frozen=True, slots=True)
class Step:
    """Some nodes of one level: which were read (``sound``), and of leaves that were their items,
    whose rows are those of ``place``.
    """

    place: Places
    sound: Mask
    items: Items | None


class Trees:
    """The trees of one file system. ``left_out``: some of what they share was not looked at."""

    def __init__(self, source: Holes, superblock: Superblock, chunks: Chunks) -> None:
        self._source, self.superblock, self.chunks = source, superblock, chunks
        self.left_out = False

    def walk(self, roots: Places, leaves: list[Places] | None = None) -> Iterator[Step]:
        """All nodes of the trees with these roots; or none of the leaves, which are added to
        *leaves* instead.
        """
        pending: dict[int, list[Places]] = {level: [] for level in range(MAX_LEVEL + 1)}
        for level in range(MAX_LEVEL + 1):
            pending[level].append(roots.select(roots.level == level))
        different, looked_at = 0, 0
        for level in range(MAX_LEVEL, -1 if leaves is None else 0, -1):
            places = _once(Places.joined(pending.pop(level)))
            different += int((np.diff(places.logical, prepend=-1) != 0).sum())
            room = MAX_SHARED * different + ANYWAY - looked_at
            self.left_out |= room < len(places)
            places = places.select(slice(0, room))
            looked_at += len(places)
            for at in range(0, len(places), NODES_AT_A_TIME):
                yield self._step(places.select(slice(at, at + NODES_AT_A_TIME)), level, pending)
        if leaves is not None:
            leaves += pending[0]

    def _step(self, place: Places, level: int, pending: dict[int, list[Places]]) -> Step:
        first = np.flatnonzero(np.diff(place.logical, prepend=-1) != 0)
        raw, sound = self.read(place.select(first))
        of = np.cumsum(np.diff(place.logical, prepend=-1) != 0) - 1
        sound = sound[of] & (self.generation(raw)[of] == place.generation)
        if level == 0:
            rows = np.flatnonzero(sound)
            items = items_in(np.ascontiguousarray(raw[of[rows]]))
            columns = (items.object, items.type, items.offset, items.at, items.size)
            return Step(place, sound, Items(rows[items.row], *columns, items.flat))
        pending[level - 1].append(_below(place.select(sound), raw[of[sound]], level))
        return Step(place, sound, None)

    def generation(self, raw: U8) -> I64:
        """When nodes were written."""
        size = self.superblock.node_size
        return little(raw.reshape(-1), np.arange(len(raw), dtype=np.int64) * size + 80, 8)

    def read(self, place: Places) -> tuple[U8, Mask]:
        """Nodes from whichever copy is whole, and which have one."""
        size = self.superblock.node_size
        copies, length = self.chunks.places(place.logical, size)
        raw = np.zeros((len(place), size), dtype=np.uint8)
        sound = np.zeros(len(place), dtype=np.bool_)
        for copy in range(MAX_COPIES):
            rows = np.flatnonzero(~sound & (copies[:, copy] >= 0) & (length == size))
            rows = rows[np.argsort(copies[rows, copy], kind="stable")]
            offset = copies[rows, copy]
            there = present_tables(self._source, offset, size, anyway=0)
            rows, offset = rows[there], offset[there]
            if not len(rows):
                continue
            blocks = read_blocks(self._source, offset, size)
            good = self._are_sound(blocks, place.select(rows))
            raw[rows[good]], sound[rows[good]] = blocks[good], True
        return raw, sound

    def _are_sound(self, raw: U8, place: Places) -> Mask:
        superblock = self.superblock
        flat, at = raw.reshape(-1), np.arange(len(raw), dtype=np.int64) * superblock.node_size
        own = np.frombuffer(superblock.node_uuid, dtype=np.uint8)
        sound = (raw[:, 32:48] == own).all(axis=1)
        sound &= (little(flat, at + 48, 8) == place.logical) & (raw[:, 100] == place.level)
        rows = np.flatnonzero(sound)
        if superblock.checksum == CRC32C_TYPE and len(rows):
            stored = little(flat, at[rows], 4).astype(np.uint32)
            sound[rows] = ~crc_of_long(raw[rows, 32:], 0xFFFFFFFF) == stored
        result: Mask = sound
        return result

    def copies(self, logical: I64) -> I64:
        """Where nodes are on the device, shape (n, `MAX_COPIES`), -1 where they are not."""
        places, length = self.chunks.places(logical, self.superblock.node_size)
        return np.where((length == self.superblock.node_size)[:, None], places, -1)


def _once(places: Places) -> Places:
    """Each node of each tree once, by address; none that is nowhere."""
    places = places.select(places.logical >= 0)
    order = np.lexsort((places.tree, places.logical))
    places = places.select(order)
    new = np.ones(len(places), dtype=np.bool_)
    new[1:] = (places.tree[1:] != places.tree[:-1]) | (places.logical[1:] != places.logical[:-1])
    return places.select(new)


def _below(place: Places, raw: U8, level: int) -> Places:
    """What the nodes at *place*, whose bytes are *raw*, lead to."""
    pointers = pointers_in(np.ascontiguousarray(raw))
    above, low = place.select(pointers.row), key_of(pointers.object, pointers.type)
    return Places(
        above.tree,
        pointers.logical,
        np.full(len(low), level - 1, dtype=np.int64),
        pointers.generation,
        low,
        pointers.offset,
        np.where(pointers.has_next, np.roll(low, -1), above.high),
        np.where(pointers.has_next, np.roll(pointers.offset, -1), above.high_offset),
    )


def key_of(object_: I64, kind: I64) -> I64:
    """Object and type as one number; objects that no file has are behind all others."""
    has_file = (object_ >= 0) & (object_ < 1 << 54)
    return np.where(has_file, object_ << TYPE_BITS | kind, END)
