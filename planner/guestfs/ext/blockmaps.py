"""Where the data of inodes is: extent trees and indirect blocks, of many files at a time.

Of a tree a level is read at once. Each block of one belongs to one file: a second claim to it is
not followed, so that no tree, however it is knotted, costs more than the file system is large.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from planner.arrays import I64, U8, Mask, without_repeats
from planner.guestfs.ext.inodes import EXTENTS_FL, FAST_SYMLINK, INLINE_DATA_FL, Inodes
from planner.guestfs.ext.superblock import Superblock
from planner.guestfs.inodes import DIRECTORY, REGULAR, SYMLINK
from planner.guestfs.protocol import Extents, What
from planner.guestfs.reading import Holes, read_blocks

EXTENT_MAGIC = 0xF30A
MAX_DEPTH = 5
MAX_INITIALIZED = 32768
"""Blocks of an extent; a longer one is that much shorter, and not written yet."""

NODES_AT_A_TIME = 256

LEAF = np.dtype([("block", "<u4"), ("len", "<u2"), ("start_hi", "<u2"), ("start_lo", "<u4")])
INDEX = np.dtype([("block", "<u4"), ("leaf_lo", "<u4"), ("leaf_hi", "<u2"), ("unused", "<u2")])

NO_NUMBERS = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Blocks of files in columns, int64: data, or blocks that lead to more of them.

    ``logical``: the first block of the file that it maps. ``level``: of a node how many are below
    it, of data the number of blocks. ``what``: what the file is, see `What`.
    """

    inode: I64
    logical: I64
    start: I64
    level: I64
    what: I64

    def __len__(self) -> int:
        return len(self.inode)

    def select(self, which: Mask | slice) -> _Rows:
        return _Rows(
            self.inode[which],
            self.logical[which],
            self.start[which],
            self.level[which],
            self.what[which],
        )


class BlockMaps:
    """The maps of one file system. ``unreadable``: how many of their blocks make no sense."""

    def __init__(self, source: Holes, superblock: Superblock) -> None:
        self._source, self._superblock = source, superblock
        self._followed = NO_NUMBERS
        self.unreadable = 0

    def extents(self, inodes: Inodes) -> Iterator[Extents]:
        """What *inodes* have, and the blocks of their maps; some 100,000 at a time at most."""
        mapped = np.isin(inodes.type, (REGULAR, DIRECTORY, SYMLINK))
        mapped &= (inodes.flags & INLINE_DATA_FL) == 0
        has_tree = mapped & ((inodes.flags & EXTENTS_FL) != 0)
        is_short = (inodes.type == SYMLINK) & (inodes.field["size_lo"] < FAST_SYMLINK)
        yield self._attributes(inodes)
        yield from self._trees(inodes.select(has_tree))
        yield from self._indirect(inodes.select(mapped & ~has_tree & ~is_short))

    def _attributes(self, inodes: Inodes) -> Extents:
        """The blocks of extended attributes, one a file; files share those that are the same."""
        block = inodes.field["file_acl_lo"].astype(np.int64)
        block |= inodes.field["file_acl_high"].astype(np.int64) << 32
        has_one = (block > 0) & (block < self._superblock.blocks)
        rows = _Rows(
            inodes.number[has_one],
            np.zeros(int(has_one.sum()), dtype=np.int64),
            block[has_one],
            np.ones(int(has_one.sum()), dtype=np.int64),
            np.full(int(has_one.sum()), What.DATA, dtype=np.int64),
        )
        return self._bytes(rows)

    # ---- extent trees ----

    def _trees(self, inodes: Inodes) -> Iterator[Extents]:
        raw = inodes.field["block"]
        depth = raw[:, 6].astype(np.int64) | raw[:, 7].astype(np.int64) << 8
        owner = _Rows(
            inodes.number,
            np.zeros(len(raw), dtype=np.int64),
            np.zeros(len(raw), dtype=np.int64),
            depth,
            _what_of(inodes),
        )
        stack: list[_Rows] = []
        yield from self._tree_nodes(np.ascontiguousarray(raw), owner, stack)
        while stack:
            nodes = stack.pop()
            if len(nodes) > NODES_AT_A_TIME:
                stack.append(nodes.select(slice(NODES_AT_A_TIME, None)))
                nodes = nodes.select(slice(NODES_AT_A_TIME))
            yield from self._tree_nodes(self._read(nodes), nodes, stack)

    def _tree_nodes(self, raw: U8, owner: _Rows, stack: list[_Rows]) -> Iterator[Extents]:
        """The extents in nodes *raw*; the nodes below go to *stack*."""
        magic, entries, limit, depth = (
            np.ascontiguousarray(raw[:, :8]).view("<u2").T.astype(np.int64)
        )
        room = (raw.shape[1] - 12) // 12
        sound = (magic == EXTENT_MAGIC) & (entries <= np.minimum(limit, room))
        sound &= (depth == owner.level) & (depth <= MAX_DEPTH)
        self.unreadable += int((~sound).sum())
        entries[~sound] = 0
        inside = np.arange(room) < entries[:, None]
        is_leaf = depth == 0
        body = np.ascontiguousarray(raw[:, 12 : 12 + room * 12]).reshape(-1)
        at = np.flatnonzero((inside & is_leaf[:, None]).reshape(-1))
        if len(at):
            leaf, node = body.view(LEAF)[at], at // room
            length = leaf["len"].astype(np.int64)
            length[length > MAX_INITIALIZED] -= MAX_INITIALIZED
            start = leaf["start_lo"].astype(np.int64) | leaf["start_hi"].astype(np.int64) << 32
            logical = leaf["block"].astype(np.int64)
            rows = _Rows(owner.inode[node], logical, start, length, owner.what[node])
            yield self._bytes(rows)
        at = np.flatnonzero((inside & ~is_leaf[:, None]).reshape(-1))
        if len(at):
            index, node = body.view(INDEX)[at], at // room
            start = index["leaf_lo"].astype(np.int64) | index["leaf_hi"].astype(np.int64) << 32
            logical = index["block"].astype(np.int64)
            nodes = _Rows(
                owner.inode[node], logical, start, owner.level[node] - 1, owner.what[node]
            )
            yield self._push(nodes, stack)

    # ---- indirect blocks ----

    def _indirect(self, inodes: Inodes) -> Iterator[Extents]:
        if not len(inodes):
            return
        pointers = np.ascontiguousarray(inodes.field["block"]).view("<u4").astype(np.int64)
        what, width = _what_of(inodes), self._superblock.block_size // 4
        count = len(pointers)
        direct = _Rows(
            np.repeat(inodes.number, 12),
            np.tile(np.arange(12, dtype=np.int64), count),
            pointers[:, :12].reshape(-1),
            np.ones(12 * count, dtype=np.int64),
            np.repeat(what, 12),
        )
        yield self._bytes(_joined(direct.select(self._inside(direct.start))))
        stack: list[_Rows] = []
        base = 12
        for level in (1, 2, 3):
            nodes = _Rows(
                inodes.number,
                np.full(count, base, dtype=np.int64),
                pointers[:, 11 + level],
                np.full(count, level, dtype=np.int64),
                what,
            )
            yield self._push(nodes, stack)
            base += width**level
        while stack:
            nodes = stack.pop()
            step = max(1, NODES_AT_A_TIME * 256 // width)
            if len(nodes) > step:
                stack.append(nodes.select(slice(step, None)))
                nodes = nodes.select(slice(step))
            raw = self._read(nodes)
            yield from self._pointers(raw, nodes, stack)

    def _pointers(self, raw: U8, nodes: _Rows, stack: list[_Rows]) -> Iterator[Extents]:
        """What the pointers in blocks *raw* lead to."""
        width = raw.shape[1] // 4
        pointer = raw.view("<u4").astype(np.int64)
        node, slot = np.nonzero(self._inside(pointer))
        level = nodes.level[node]
        rows = _Rows(
            nodes.inode[node],
            nodes.logical[node] + slot * width ** (level - 1),
            pointer[node, slot],
            level - 1,
            nodes.what[node],
        )
        is_data = level == 1
        data = rows.select(is_data)
        yield self._bytes(_joined(replace(data, level=np.ones(len(data), dtype=np.int64))))
        yield self._push(rows.select(~is_data), stack)

    # ---- both ----

    def _inside(self, block: I64) -> Mask:
        return (block > 0) & (block < self._superblock.blocks)

    def _push(self, nodes: _Rows, stack: list[_Rows]) -> Extents:
        """Have *nodes* followed that were not yet, and return where they are."""
        nodes = nodes.select(self._inside(nodes.start))
        order = np.argsort(nodes.start, kind="stable")
        start = nodes.start[order]
        is_first = np.ones(len(order), dtype=np.bool_)
        is_first[1:] = start[1:] != start[:-1]
        at = np.searchsorted(self._followed, start)
        if len(self._followed):
            at = np.minimum(at, len(self._followed) - 1)
            is_first &= self._followed[at] != start
        nodes = _taken(nodes, order[is_first])
        if len(nodes):
            merged = np.concatenate((self._followed, nodes.start))
            merged.sort(kind="stable")
            self._followed = without_repeats(merged)
            stack.append(nodes)
        rows = replace(nodes, level=np.ones(len(nodes), dtype=np.int64))
        return self._bytes(replace(rows, what=np.full(len(rows), What.INODE_TABLE, dtype=np.int64)))

    def _read(self, nodes: _Rows) -> U8:
        size = self._superblock.block_size
        return read_blocks(self._source, nodes.start * size, size)

    def _bytes(self, rows: _Rows) -> Extents:
        """*rows* of data in bytes, cut at the end of the file system."""
        size, end = self._superblock.block_size, self._superblock.blocks
        rows = rows.select(self._inside(rows.start) & (rows.level > 0))
        length = np.minimum(rows.start + rows.level, end) - rows.start
        return Extents(
            rows.inode,
            rows.logical * size,
            rows.start * size,
            length * size,
            rows.what.astype(np.uint8),
        )


def _taken(rows: _Rows, at: I64) -> _Rows:
    return _Rows(rows.inode[at], rows.logical[at], rows.start[at], rows.level[at], rows.what[at])


def _what_of(inodes: Inodes) -> I64:
    return np.where(inodes.type == DIRECTORY, np.int64(What.DIRECTORY), np.int64(What.DATA))


def _joined(rows: _Rows) -> _Rows:
    """Single blocks of data as extents: those that follow each other, in file and on the disk."""
    if not len(rows):
        return rows
    new = np.ones(len(rows), dtype=np.bool_)
    new[1:] = (
        (rows.inode[1:] != rows.inode[:-1])
        | (rows.logical[1:] != rows.logical[:-1] + 1)
        | (rows.start[1:] != rows.start[:-1] + 1)
    )
    first = np.flatnonzero(new)
    length = np.diff(np.append(first, len(rows)))
    return replace(_taken(rows, first), level=length)
