"""The allocation groups of XFS: their headers, and the trees whose roots those name.

All groups' trees are walked at once, a level of many nodes at a time. A node that makes no sense
loses what is below it; that its group is not known whole is noted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planner.arrays import I64, U8, Mask, distinct
from planner.guestfs.columns import Once, big
from planner.guestfs.protocol import Extents, What, own_extents
from planner.guestfs.reading import Holes, read_blocks
from planner.guestfs.xfs.superblock import FINOBT, REFLINK, RMAPBT, Superblock
from planner.source import present_tables, read_tables

MAX_LEVELS = 12
NODES_AT_A_TIME = 512
GROUPS_AT_A_TIME = 4096

AGF, AGI, AGFL = 1, 2, 3
"""Which sector of a group each header is in."""


@dataclass(frozen=True, slots=True)
class Tree:
    """A sort of B+tree within a group: where its root is told, and what its blocks look like."""

    header: int
    root: int
    level: int
    magics: tuple[bytes, ...]
    key_bytes: int
    record_bytes: int
    what: What
    feature: int = 0


FREE_BY_BLOCK = Tree(AGF, 16, 28, (b"ABTB", b"AB3B"), 8, 8, What.BITMAP)
INODES = Tree(AGI, 20, 24, (b"IABT", b"IAB3"), 4, 16, What.INODE_TABLE)
OTHERS = (
    Tree(AGF, 20, 32, (b"ABTC", b"AB3C"), 8, 8, What.BITMAP),
    Tree(AGF, 24, 36, (b"RMB3",), 40, 24, What.BITMAP, RMAPBT),
    Tree(AGF, 88, 92, (b"R3FC",), 4, 12, What.BITMAP, REFLINK),
    Tree(AGI, 328, 332, (b"FIBT", b"FIB3"), 4, 16, What.INODE_TABLE, FINOBT),
)


@dataclass(frozen=True, slots=True)
class Nodes:
    """Some nodes of a tree: ``block``, where each is (linear); of the leaves among them the
    records, shape (n, bytes), and the ``group`` of each record.
    """

    block: I64
    group: I64
    record: U8


def headers(source: Holes, superblock: Superblock) -> Iterator[tuple[I64, U8]]:
    """Numbers of groups, and their four sectors, shape (groups, sectors, bytes), some at a time.

    Of groups that are there: one that is a hole is left out.
    """
    size = superblock.header_bytes
    for first in range(0, superblock.ag_count, GROUPS_AT_A_TIME):
        group = np.arange(first, min(first + GROUPS_AT_A_TIME, superblock.ag_count), dtype=np.int64)
        offset = group * superblock.ag_blocks * superblock.block_size
        there = present_tables(source, offset, size)
        group, offset = group[there], offset[there]
        for part, rows in read_tables(source, offset, size):
            yield group[part], rows.reshape(-1, 4, superblock.sector_size)


class Trees:
    """The trees of one file system. ``broken``: groups of which one tree is not known whole."""

    def __init__(self, source: Holes, superblock: Superblock) -> None:
        self._source, self._superblock = source, superblock
        self._broken: dict[Tree, list[I64]] = {}

    def broken(self, tree: Tree) -> I64:
        """The groups of which *tree*, once walked, could not be read as a whole; ascending."""
        parts = self._broken.get(tree, [])
        return distinct(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.int64)

    def has(self, tree: Tree) -> bool:
        """Whether this file system has trees of that sort."""
        return not tree.feature or bool(self._superblock.ro_compat & tree.feature)

    def walk(self, tree: Tree) -> Iterator[Nodes]:
        """All nodes of *tree* in all groups."""
        self._broken[tree] = broken = []
        superblock, once = self._superblock, Once()
        covered = np.zeros(0, dtype=np.int64)
        for group, rows in headers(self._source, superblock):
            sector = np.ascontiguousarray(rows[:, tree.header])
            name = (b"", b"XAGF", b"XAGI")[tree.header]
            sound = (sector[:, :4] == np.frombuffer(name, dtype=np.uint8)).all(axis=1)
            at = np.arange(len(sector), dtype=np.int64) * superblock.sector_size
            flat = sector.reshape(-1)
            root, levels = big(flat, at + tree.root, 4), big(flat, at + tree.level, 4)
            sound &= (levels > 0) & (levels <= MAX_LEVELS)
            broken.append(group[~sound])
            covered = np.concatenate((covered, group))
            stack = [(group[sound], root[sound], levels[sound] - 1)]
            while stack:
                yield from self._step(tree, stack, once)
        if len(covered) < superblock.ag_count:
            lost = np.ones(superblock.ag_count, dtype=np.bool_)
            lost[covered] = False
            broken.append(np.flatnonzero(lost))

    def _step(self, tree: Tree, stack: list[tuple[I64, I64, I64]], once: Once) -> Iterator[Nodes]:
        group, block, level = stack.pop()
        if len(group) > NODES_AT_A_TIME:
            stack.append(
                (group[NODES_AT_A_TIME:], block[NODES_AT_A_TIME:], level[NODES_AT_A_TIME:])
            )
            group, block, level = (each[:NODES_AT_A_TIME] for each in (group, block, level))
        place = self._superblock.linear_in(group, block)
        self._broken[tree].append(group[place < 0])
        rows = np.flatnonzero(place >= 0)
        first = once.first(place[rows])
        if len(first) < len(rows):
            self._broken[tree].append(group[np.delete(rows, first)])
        rows = rows[first]
        group, place, level = group[rows], place[rows], level[rows]
        if not len(rows):
            return
        size = self._superblock.block_size
        raw = read_blocks(self._source, place * size, size)
        sound = self._sound(tree, raw, group, level)
        lost = ~sound | self._source.are_holes(place * size, size)
        self._broken[tree].append(group[lost])
        raw, group, place, level = raw[sound], group[sound], place[sound], level[sound]
        count = big(raw.reshape(-1), np.arange(len(raw)) * size + 6, 2)
        is_leaf = level == 0
        node, record = self._entries(raw, np.where(is_leaf, count, 0), tree.record_bytes, 0)
        yield Nodes(place, group[node], record)
        room = (size - self._header) // (tree.key_bytes + 4)
        node, pointer = self._entries(raw, np.where(is_leaf, 0, count), 4, room * tree.key_bytes)
        if len(node):
            at = np.arange(len(node), dtype=np.int64) * 4
            below = big(pointer.reshape(-1), at, 4)
            stack.append((group[node], below, level[node] - 1))

    @property
    def _header(self) -> int:
        return 56 if self._superblock.is_v5 else 16

    def _sound(self, tree: Tree, raw: U8, group: I64, level: I64) -> Mask:
        size = self._superblock.block_size
        flat, at = raw.reshape(-1), np.arange(len(raw), dtype=np.int64) * size
        magic = tree.magics[-1] if self._superblock.is_v5 else tree.magics[0]
        sound = (raw[:, :4] == np.frombuffer(magic, dtype=np.uint8)).all(axis=1)
        sound &= big(flat, at + 4, 2) == level
        entry = np.where(level == 0, tree.record_bytes, tree.key_bytes + 4)
        sound &= big(flat, at + 6, 2) <= (size - self._header) // entry
        if self._superblock.is_v5:
            sound &= big(flat, at + 48, 4) == group
        result: Mask = sound
        return result

    def _entries(self, raw: U8, count: I64, width: int, skip: int) -> tuple[I64, U8]:
        """The first *count* entries of each node, and which node each is of."""
        begin = self._header + skip
        room = (self._superblock.block_size - begin) // width
        body = raw[:, begin : begin + room * width].reshape(len(raw), room, width)
        node, slot = np.nonzero(np.arange(room) < count[:, None])
        return node, np.ascontiguousarray(body[node, slot])


def fixed_extents(source: Holes, superblock: Superblock, trees: Trees) -> Iterator[Extents]:
    """What is of the file system itself, but for inodes and what they have."""
    size = superblock.block_size
    if superblock.log_start:
        start = superblock.linear(np.array([superblock.log_start], dtype=np.int64))
        length = np.minimum(superblock.log_blocks, superblock.blocks - start)
        yield own_extents(What.JOURNAL, start[start >= 0] * size, length[start >= 0] * size)
    for first in range(0, superblock.ag_count, GROUPS_AT_A_TIME):
        last = min(first + GROUPS_AT_A_TIME, superblock.ag_count)
        start = np.arange(first, last, dtype=np.int64) * superblock.ag_blocks * size
        whole = -(-superblock.header_bytes // size) * size
        length = np.minimum(start + whole, superblock.blocks * size) - start
        yield own_extents(What.SUPERBLOCK, start, length)
    for group, rows in headers(source, superblock):
        start = _free_list(superblock, group, rows) * size
        yield own_extents(What.BITMAP, start, np.full(len(start), size, dtype=np.int64))
    for tree in (FREE_BY_BLOCK, INODES, *OTHERS):
        if trees.has(tree):
            for nodes in trees.walk(tree):
                count = np.full(len(nodes.block), size, dtype=np.int64)
                yield own_extents(tree.what, nodes.block * size, count)


def _free_list(superblock: Superblock, group: I64, rows: U8) -> I64:
    """The blocks that are kept for the trees to grow: those of a ring in each AGFL."""
    begin = 36 if superblock.is_v5 else 0
    table = np.ascontiguousarray(rows[:, AGFL, begin:])
    room = table.shape[1] // 4
    at = (np.arange(len(rows)) * table.shape[1])[:, None] + np.arange(room) * 4
    entries = big(table.reshape(-1), at.astype(np.int64), 4)
    agf = np.ascontiguousarray(rows[:, AGF])
    at = np.arange(len(rows), dtype=np.int64) * superblock.sector_size
    first, last, count = (big(agf.reshape(-1), at + place, 4) for place in (40, 44, 48))
    known = (first < room) & (last < room) & (count <= room)
    slot = np.arange(room)
    distance = (slot - first[:, None]) % room
    row, column = np.nonzero((distance < count[:, None]) & known[:, None])
    place = superblock.linear_in(group[row], entries[row, column])
    result: I64 = place[place > 0]
    return result


def free_blocks(superblock: Superblock, nodes: Nodes) -> tuple[I64, I64]:
    """What records of `FREE_BY_BLOCK` say is free: first block, linear, and number of them."""
    at = np.arange(len(nodes.record), dtype=np.int64) * 8
    flat = nodes.record.reshape(-1)
    block, count = big(flat, at, 4), big(flat, at + 4, 4)
    start = superblock.linear_in(nodes.group, block)
    count = np.minimum(count, superblock.ag_blocks - block)
    count = np.minimum(count, superblock.blocks - start)
    inside = (start >= 0) & (count > 0)
    return start[inside], count[inside]
