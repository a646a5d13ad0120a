"""XFS as one file system of the protocol."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from planner.arrays import I64, U8, Mask, distinct, expand_ranges
from planner.guestfs.inodes import DIRECTORY, REGULAR, Inodes
from planner.guestfs.protocol import NO_INODE, Extents, Names, Spans, What, own_extents
from planner.guestfs.reading import Holes, read_blocks
from planner.guestfs.xfs.directories import LEAF_OFFSET, names_in, short_names
from planner.guestfs.xfs.forks import LOCAL, BlockMaps, forks_of
from planner.guestfs.xfs.groups import FREE_BY_BLOCK, INODES, Trees, fixed_extents, free_blocks
from planner.guestfs.xfs.inodes import (
    CHUNK,
    Chunks,
    find_chunks,
    read_inodes,
    records_in,
    walk_inodes,
    with_named,
)
from planner.guestfs.xfs.superblock import Superblock, find_superblock
from planner.source import present_tables

BYTES_AT_A_TIME = 4 << 20
"""Of directories: so much is looked at together."""

EXTENTS_AT_A_TIME = 1 << 14


def recognise(source: Holes) -> Xfs | None:
    """An XFS that *source* holds, by its superblock or the copy of one in another group."""
    found = find_superblock(source)
    return Xfs(source, *found) if found else None


class Xfs:
    """See `planner.guestfs.protocol.FileSystem`."""

    kind = "xfs"

    def __init__(self, source: Holes, superblock: Superblock, offset: int) -> None:
        """*offset*: where the *superblock* was found."""
        self._source, self._superblock, self._offset = source, superblock, offset
        self.superblock, self.source = superblock, source
        self._trees = Trees(source, superblock)
        self._known_chunks: Chunks | None = None
        self._broken_inodes = self._broken_maps = self._broken_space = 0
        self._left_out = False
        self.label, self.uuid = superblock.label, superblock.uuid
        self.block_size = superblock.block_size
        self.size = superblock.blocks * superblock.block_size

    @property
    def root(self) -> int:
        """As the superblock says; where its copy does not, the first inode there is."""
        if self._superblock.root:
            return self._superblock.root
        chunks = self._chunks
        return int(chunks.first[0]) if len(chunks) else 0

    @property
    def _own(self) -> I64:
        """The inodes of the file system itself: mkfs.xfs makes two with the root, behind it."""
        own = set(self._superblock.own_inodes)
        if self._superblock.lacks_own:
            own |= {self.root + 1, self.root + 2}
        return np.array(sorted(own), dtype=np.uint64).astype(np.int64)

    @property
    def notes(self) -> list[str]:
        superblock, notes = self._superblock, []
        if self._offset:
            notes.append(f"its superblock cannot be read; the copy at {self._offset} was used")
        if superblock.claimed_blocks > superblock.blocks:
            missing = (superblock.claimed_blocks - superblock.blocks) * superblock.block_size
            notes.append(f"the last {missing} bytes of it are not there")
        if superblock.realtime_blocks:
            notes.append("files on its real-time device are named, and nothing is said of its data")
        lost = len(self._trees.broken(INODES))
        if lost:
            notes.append(
                f"the inodes of {lost} of {superblock.ag_count} allocation groups are not all"
                " listed: they were looked for"
            )
        for count, what in (
            (self._broken_inodes, "inodes make no sense: their files are not known"),
            (self._broken_maps, "blocks that say where files are make no sense"),
            (self._broken_space, "allocation groups do not say as a whole what is free in them"),
        ):
            if count:
                notes.append(f"{count} {what}")
        if self._left_out:
            notes.append("its directories claim more blocks than it has: not all were read")
        return notes

    @property
    def _chunks(self) -> Chunks:
        if self._known_chunks is None:
            self._known_chunks = find_chunks(self._source, self._superblock, self._trees)
            groups = self._trees.broken(INODES)
            if len(groups):
                self._known_chunks = with_named(self._known_chunks, self._named_in(groups))
        return self._known_chunks

    def _named_in(self, groups: I64) -> I64:
        """Inodes in these groups that directories name and whose records cannot be read.

        The number of an inode says where it is: so that where no tree tells of it a name does.
        """
        superblock, parts = self._superblock, [np.zeros(0, dtype=np.int64)]
        for names in self.names():
            child = distinct(names.child)
            child = child[np.isin(child >> superblock.ag_inode_bits, groups)]
            place = superblock.inode_offset(child)
            child, place = child[place >= 0], place[place >= 0]
            parts.append(child[self._source.are_holes(place, superblock.inode_size)])
        return distinct(np.concatenate(parts))

    # ---- what lies where ----

    def extents(self) -> Iterator[Extents]:
        superblock, chunks = self._superblock, self._chunks
        yield from fixed_extents(self._source, superblock, self._trees)
        yield from self._inode_table(chunks)
        maps, broken = BlockMaps(self._source, superblock), [0]
        for inodes in walk_inodes(self._source, superblock, chunks, broken):
            for extents in maps.extents(inodes):
                if len(extents):
                    yield _with_own(extents, self._own)
        self._broken_inodes, self._broken_maps = sum(broken), maps.unreadable

    def _inode_table(self, chunks: Chunks) -> Iterator[Extents]:
        superblock = self._superblock
        piece = CHUNK // 16 * superblock.inode_size
        for at in range(0, len(chunks), EXTENTS_AT_A_TIME):
            some = chunks.select(slice(at, at + EXTENTS_AT_A_TIME))
            # Four inodes at a time: no part of a chunk that is missing is smaller.
            bits = some.there[:, None] >> np.arange(0, CHUNK, 4, dtype=np.uint64)
            row, slot = np.nonzero(bits & np.uint64(15))
            start = superblock.inode_offset(some.first)[row] + slot * piece
            follows = np.append(False, start[1:] == start[:-1] + piece)
            first = np.flatnonzero(~follows)
            length = np.diff(np.append(first, len(start))) * piece
            length = np.minimum(length, self.size - start[first])
            yield own_extents(What.INODE_TABLE, start[first], length)

    def free(self) -> Iterator[Spans]:
        size = self.block_size
        for nodes in self._trees.walk(FREE_BY_BLOCK):
            start, count = free_blocks(self._superblock, nodes)
            order = np.argsort(start, kind="stable")
            if len(order):
                yield Spans(start[order] * size, count[order] * size)
        self._broken_space = len(self._trees.broken(FREE_BY_BLOCK))

    def sizes(self) -> Iterator[tuple[I64, I64]]:
        """Numbers of files, and how many bytes each has; of those outside of their records."""
        for inodes in walk_inodes(self._source, self._superblock, self._chunks):
            files = inodes.select(inodes.type == REGULAR)
            size = np.ascontiguousarray(files.raw[:, 56:64]).view(">i8")[:, 0]
            yield files.number, size.astype(np.int64)

    # ---- names ----

    def names(self) -> Iterator[Names]:
        superblock = self._superblock
        maps, left = BlockMaps(self._source, superblock), superblock.blocks
        for inodes in walk_inodes(self._source, superblock, self._chunks):
            directories = inodes.select(inodes.type == DIRECTORY)
            yield self._short(directories)
            pieces = [
                extents.select(
                    (extents.what == What.DIRECTORY) & (extents.file_offset < LEAF_OFFSET)
                )
                for extents in maps.extents(directories, attributes=False)
            ]
            for extents in pieces:
                # Blocks of directories are nobody else's: no more of them than there are blocks.
                claimed = np.cumsum(extents.length // superblock.block_size)
                kept = claimed <= left
                self._left_out |= not kept.all()
                left -= int(claimed[kept][-1]) if kept.any() else 0
                yield from self._names_of(extents.select(kept))

    def _short(self, directories: Inodes) -> Names:
        forks = forks_of(directories, self._superblock, attributes=False)
        size = np.where(forks.format == LOCAL, forks.size, 0)
        return short_names(
            directories.raw,
            forks.begin,
            size,
            directories.number,
            has_types=self._superblock.has_types,
        )

    def _names_of(self, extents: Extents) -> Iterator[Names]:
        size = self._superblock.dir_block_size
        per_block = size // self.block_size
        step = max(1, BYTES_AT_A_TIME // size) * per_block
        order = np.lexsort((extents.file_offset, extents.inode))
        extents = extents.select(order)
        count = extents.length // self.block_size
        ends = np.cumsum(count)
        total, begin = int(ends[-1]) if len(ends) else 0, 0
        while begin < total:
            stop = min(begin + step, total)
            inode, logical, block = _blocks_between(extents, count, ends, begin, stop)
            # Whole blocks of a directory, each in one batch.
            if stop < total and per_block > 1:
                last = logical // self.block_size // per_block * per_block
                is_cut = (inode == inode[-1]) & (last == last[-1])
                if not is_cut.all():
                    stop -= int(is_cut.sum())
                    inode, logical, block = (each[~is_cut] for each in (inode, logical, block))
            begin = stop
            yield from self._names_in(inode, logical // self.block_size, block)

    def _names_in(self, inode: I64, logical: I64, block: I64) -> Iterator[Names]:
        superblock, size = self._superblock, self.block_size
        per_block = superblock.dir_block_size // size
        if per_block == 1:
            order = np.argsort(block, kind="stable")
            order = order[present_tables(self._source, block[order] * size, size)]
            raw = read_blocks(self._source, block[order] * size, size)
        else:
            first = np.flatnonzero(logical % per_block == 0)
            first = first[first + per_block <= len(block)]
            rows = first[:, None] + np.arange(per_block)
            whole = (inode[rows] == inode[first][:, None]).all(axis=1)
            whole &= (logical[rows] == logical[first][:, None] + np.arange(per_block)).all(axis=1)
            order, rows = first[whole], rows[whole].reshape(-1)
            raw = _read_any(self._source, block[rows], size).reshape(len(order), -1)
        yield names_in(raw, inode[order], is_v5=superblock.is_v5, has_types=superblock.has_types)

    # ---- records ----

    def records(self, start: I64, length: I64) -> Extents:
        superblock = self._superblock
        number, is_told = records_in(superblock, self._chunks, start, length)
        own = np.isin(number, self._own)
        number, is_told = number[~own], is_told[~own]
        size = superblock.inode_size
        rows, inodes = read_inodes(self._source, superblock, number)
        is_read = np.zeros(len(number), dtype=np.bool_)
        is_read[rows] = True
        kept = is_told | ~is_read
        kept[rows] |= inodes.field["mode"] != 0
        is_known = is_told | is_read
        number, is_known = number[kept], is_known[kept]
        return Extents(
            number,
            np.zeros(len(number), dtype=np.int64),
            superblock.inode_offset(number),
            np.full(len(number), size, dtype=np.int64),
            np.where(is_known, What.INODE_TABLE, What.UNKNOWN).astype(np.uint8),
        )

    def unlinked(self, inode: I64) -> Mask:
        result = np.zeros(len(inode), dtype=np.bool_)
        order = np.argsort(inode, kind="stable")
        rows, inodes = read_inodes(self._source, self._superblock, inode[order])
        field = inodes.field
        result[order[rows]] = (field["mode"] != 0) & (field["nlink"] == 0)
        return result


def _with_own(extents: Extents, own: I64) -> Extents:
    """*extents*, those of the file system's inodes as its own."""
    is_own = np.isin(extents.inode, own)
    if not is_own.any():
        return extents
    inode, what = extents.inode.copy(), extents.what.copy()
    inode[is_own], what[is_own] = NO_INODE, What.BITMAP
    return Extents(inode, extents.file_offset, extents.start, extents.length, what)


def _blocks_between(
    extents: Extents, count: I64, ends: I64, begin: int, stop: int
) -> tuple[I64, I64, I64]:
    """Of all blocks of *extents*, one after the other, those from *begin* up to *stop*.

    Returns inode, byte of the file and block of the disk of each.
    """
    first = int(np.searchsorted(ends, begin, side="right"))
    last = int(np.searchsorted(ends, stop, side="left")) + 1
    some, many = extents.select(np.arange(first, last)), count[first:last].copy()
    skipped = begin - int(ends[first] - count[first])
    low = np.zeros(len(many), dtype=np.int64)
    low[0] = skipped
    high = many - 1
    high[-1] -= int(ends[last - 1]) - stop
    within = expand_ranges(low, high)
    size = _unit(some, many)
    row = np.repeat(np.arange(len(many)), high - low + 1)
    return some.inode[row], some.file_offset[row] + within * size, some.start[row] // size + within


def _unit(extents: Extents, count: I64) -> int:
    return int(extents.length[0]) // int(count[0])


def _read_any(source: Holes, block: I64, size: int) -> U8:
    """Blocks in the order asked for, read in the order of the disk."""
    order = np.argsort(block, kind="stable")
    raw = np.empty((len(block), size), dtype=np.uint8)
    raw[order] = read_blocks(source, block[order] * size, size)
    return raw
