"""Where the data and the attributes of inodes are: lists of extents and B+trees, of many at a time.

Of the trees a level is read at once. Each block of one belongs to one file: a second claim to it is
not followed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planner.arrays import I64, U8, Mask, expand_ranges
from planner.guestfs.columns import Once, big
from planner.guestfs.inodes import DIRECTORY, Inodes
from planner.guestfs.protocol import Extents, What
from planner.guestfs.reading import Holes, read_blocks
from planner.guestfs.xfs.inodes import LARGE_COUNTS, REALTIME
from planner.guestfs.xfs.superblock import Superblock

LOCAL, EXTENTS, BTREE = 1, 2, 3
"""Of ``format`` and ``aformat``."""

MAX_LEVEL = 10
NODES_AT_A_TIME = 512


@dataclass(frozen=True, slots=True)
class Forks:
    """One fork of each of some inodes, in columns: where it is in the record, and what it has."""

    number: I64
    begin: I64
    size: I64
    format: I64
    count: I64
    what: I64
    is_attribute: bool

    def select(self, which: Mask) -> Forks:
        """Some of them."""
        return Forks(
            self.number[which],
            self.begin[which],
            self.size[which],
            self.format[which],
            self.count[which],
            self.what[which],
            self.is_attribute,
        )


@dataclass(frozen=True, slots=True)
class _Nodes:
    """Blocks of B+trees: where (linear), of whose file, how far above its leaves, and the rest."""

    block: I64
    inode: I64
    level: I64
    what: I64
    is_attribute: Mask

    def select(self, which: Mask | I64 | slice) -> _Nodes:
        return _Nodes(
            self.block[which],
            self.inode[which],
            self.level[which],
            self.what[which],
            self.is_attribute[which],
        )


def forks_of(inodes: Inodes, superblock: Superblock, *, attributes: bool) -> Forks:
    """The data fork of each of *inodes*, or that of its attributes; size 0 where it has none."""
    field = inodes.field
    literal = 176 if superblock.is_v5 else 100
    room = superblock.inode_size - literal
    offset = np.minimum(field["forkoff"].astype(np.int64) * 8, room)
    count, attribute_count = field["nextents"].astype(np.int64), field["anextents"].astype(np.int64)
    if superblock.is_v5:
        is_wide = (field["flags2"] & LARGE_COUNTS) != 0
        wide = field["big_nextents"].astype(np.int64)
        count, attribute_count = (
            np.where(is_wide, wide, count),
            np.where(is_wide, count, attribute_count),
        )
    is_directory = inodes.type == DIRECTORY
    data = np.full(len(inodes), What.DATA, dtype=np.int64)
    if attributes:
        size = np.where(offset > 0, room - offset, 0)
        kind = field["aformat"].astype(np.int64)
        return Forks(inodes.number, literal + offset, size, kind, attribute_count, data, True)
    begin = np.full(len(inodes), literal, dtype=np.int64)
    size = np.where(offset > 0, offset, room)
    # What is on a real-time device is not here.
    size[(field["flags"] & REALTIME) != 0] = 0
    what = np.where(is_directory, np.int64(What.DIRECTORY), data)
    return Forks(inodes.number, begin, size, field["format"].astype(np.int64), count, what, False)


class BlockMaps:
    """The maps of one file system. ``unreadable``: how many parts of them make no sense."""

    def __init__(self, source: Holes, superblock: Superblock) -> None:
        self._source, self._superblock, self._once = source, superblock, Once()
        self.unreadable = 0

    def extents(self, inodes: Inodes, *, attributes: bool = True) -> Iterator[Extents]:
        """What *inodes* have, and the blocks of their maps; some 100,000 at a time at most."""
        for of_attributes in (False, True)[: 2 if attributes else 1]:
            forks = forks_of(inodes, self._superblock, attributes=of_attributes)
            yield self._listed(inodes.raw, forks)
            yield from self._trees(inodes.raw, forks)

    def _listed(self, raw: U8, forks: Forks) -> Extents:
        is_list = (forks.format == EXTENTS) & (forks.size > 0)
        fits = (forks.count >= 0) & (forks.count * 16 <= forks.size)
        self.unreadable += int((is_list & ~fits).sum())
        row = np.flatnonzero(is_list & fits & (forks.count > 0))
        count = forks.count[row]
        base = row * raw.shape[1] + forks.begin[row]
        at = np.repeat(base, count) + expand_ranges(np.zeros_like(count), count - 1) * 16
        row = np.repeat(row, count)
        nodes = _Nodes(
            row, forks.number[row], row, forks.what[row], np.full(len(row), forks.is_attribute)
        )
        return self._decoded(raw.reshape(-1), at, nodes)

    def _trees(self, raw: U8, forks: Forks) -> Iterator[Extents]:
        row = np.flatnonzero((forks.format == BTREE) & (forks.size > 20))
        flat, base = raw.reshape(-1), row * raw.shape[1] + forks.begin[row]
        level, count = big(flat, base, 2), big(flat, base + 2, 2)
        room = (forks.size[row] - 4) // 16
        sound = (count <= room) & (level > 0) & (level <= MAX_LEVEL)
        self.unreadable += int((~sound).sum())
        row, base, level, count, room = (each[sound] for each in (row, base, level, count, room))
        pointers = np.repeat(base + 4 + room * 8, count)
        pointers += expand_ranges(np.zeros_like(count), count - 1) * 8
        block = self._superblock.linear(big(flat, pointers, 8))
        whose = np.repeat(row, count)
        is_attribute = np.full(len(whose), forks.is_attribute)
        level = np.repeat(level, count) - 1
        nodes = _Nodes(block, forks.number[whose], level, forks.what[whose], is_attribute)
        stack: list[_Nodes] = []
        yield self._push(nodes, stack)
        while stack:
            nodes = stack.pop()
            if len(nodes.block) > NODES_AT_A_TIME:
                stack.append(nodes.select(slice(NODES_AT_A_TIME, None)))
                nodes = nodes.select(slice(NODES_AT_A_TIME))
            yield from self._step(nodes, stack)

    def _step(self, nodes: _Nodes, stack: list[_Nodes]) -> Iterator[Extents]:
        superblock = self._superblock
        size = superblock.block_size
        raw = read_blocks(self._source, nodes.block * size, size)
        flat, base = raw.reshape(-1), np.arange(len(raw), dtype=np.int64) * size
        header, magic = (72, b"BMA3") if superblock.is_v5 else (24, b"BMAP")
        room = (size - header) // 16
        count = big(flat, base + 6, 2)
        sound = (raw[:, :4] == np.frombuffer(magic, dtype=np.uint8)).all(axis=1)
        sound &= (big(flat, base + 4, 2) == nodes.level) & (count <= room)
        if superblock.is_v5:
            sound &= big(flat, base + 56, 8) == nodes.inode
        self.unreadable += int((~sound).sum())
        count[~sound] = 0
        row = np.repeat(np.arange(len(raw), dtype=np.int64), count)
        slot = expand_ranges(np.zeros_like(count), count - 1)
        is_leaf = nodes.level[row] == 0
        leaf = row[is_leaf]
        yield self._decoded(flat, base[leaf] + header + slot[is_leaf] * 16, nodes.select(leaf))
        above = row[~is_leaf]
        if len(above):
            pointer = big(flat, base[above] + header + room * 8 + slot[~is_leaf] * 8, 8)
            parent = nodes.select(above)
            yield self._push(
                _Nodes(
                    superblock.linear(pointer),
                    parent.inode,
                    parent.level - 1,
                    parent.what,
                    parent.is_attribute,
                ),
                stack,
            )

    def _push(self, nodes: _Nodes, stack: list[_Nodes]) -> Extents:
        """Have *nodes* followed that were not yet, and return where they are."""
        nodes = nodes.select(nodes.block > 0)
        nodes = nodes.select(self._once.first(nodes.block))
        if len(nodes.block):
            stack.append(nodes)
        size, count = self._superblock.block_size, len(nodes.block)
        return Extents(
            nodes.inode,
            np.zeros(count, dtype=np.int64),
            nodes.block * size,
            np.full(count, size, dtype=np.int64),
            np.full(count, What.INODE_TABLE, dtype=np.uint8),
        )

    def _decoded(self, flat: U8, at: I64, nodes: _Nodes) -> Extents:
        """The extents at *at* in *flat*, 128 bits each, of the files in *nodes*."""
        superblock = self._superblock
        high, low = big(flat, at, 8), big(flat, at + 8, 8)
        logical = (high >> 9) & ((1 << 54) - 1)
        fsblock = (high & 0x1FF) << 43 | ((low >> 21) & ((1 << 43) - 1))
        count = low & ((1 << 21) - 1)
        place = superblock.linear(fsblock)
        block = fsblock & ((1 << superblock.ag_block_bits) - 1)
        count = np.minimum(count, superblock.ag_blocks - block)
        count = np.minimum(count, superblock.blocks - place)
        inside = (place > 0) & (count > 0) & (logical < 1 << 52)
        size = superblock.block_size
        file_offset = np.where(nodes.is_attribute, 0, logical * size)
        return Extents(
            nodes.inode[inside],
            file_offset[inside],
            place[inside] * size,
            count[inside] * size,
            nodes.what[inside].astype(np.uint8),
        )
