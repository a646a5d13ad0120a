"""ext2, ext3 and ext4 as one file system of the protocol."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from planner.arrays import I64, Mask, distinct, expand_ranges
from planner.guestfs.ext.blockmaps import BlockMaps
from planner.guestfs.ext.directories import inline_rest, names_in
from planner.guestfs.ext.groups import Groups, fixed_extents, free_spans, read_groups
from planner.guestfs.ext.inodes import (
    INLINE_DATA_FL,
    Inodes,
    are_own,
    inodes_in,
    inodes_in_use,
    walk_inodes,
)
from planner.guestfs.ext.superblock import (
    JOURNAL_INODE,
    OFFSET,
    RESIZE_INODE,
    ROOT_INODE,
    Incompat,
    Superblock,
    find_superblock,
)
from planner.guestfs.inodes import DIRECTORY, REGULAR
from planner.guestfs.protocol import NO_INODE, Extents, Names, Spans, What
from planner.guestfs.reading import Holes, read_blocks
from planner.source import read_tables

BLOCKS_AT_A_TIME = 512
"""Of directories: so many are looked at together."""

INLINE_PARENT = 4
"""Bytes of the number of the parent, before the entries of a directory in its inode."""


def recognise(source: Holes) -> Ext | None:
    """An ext2, ext3 or ext4 that *source* holds, by its superblock or a copy of that."""
    found = find_superblock(source)
    return Ext(source, *found) if found else None


class Ext:
    """A file system of that family; see `planner.guestfs.protocol.FileSystem`."""

    root = ROOT_INODE

    def __init__(self, source: Holes, superblock: Superblock, offset: int) -> None:
        """*offset*: where the *superblock* was found."""
        self._source, self._superblock, self._offset = source, superblock, offset
        self._groups: Groups = read_groups(source, superblock)
        self._broken_inodes = self._broken_maps = self._lost_directories = 0
        self.superblock, self.groups, self.source = superblock, self._groups, source
        self.kind = superblock.kind
        self.label, self.uuid = superblock.label, superblock.uuid
        self.block_size = superblock.block_size
        self.size = superblock.blocks * superblock.block_size

    @property
    def notes(self) -> list[str]:
        superblock, notes = self._superblock, []
        if self._offset != OFFSET:
            notes.append(f"its superblock cannot be read; the copy at {self._offset} was used")
        if superblock.claimed_blocks > superblock.blocks:
            missing = (superblock.claimed_blocks - superblock.blocks) * superblock.block_size
            notes.append(f"the last {missing} bytes of it are not there")
        lost = superblock.groups - len(self._groups)
        if lost:
            notes.append(
                f"{lost} of {superblock.groups} group descriptors cannot be read, nor any copy: "
                "the files whose inodes they lead to are not known"
            )
        if Incompat.RECOVER in superblock.incompat:
            notes.append("its journal was not replayed: what was written last may be elsewhere")
        for count, what in (
            (self._broken_inodes, "inodes make no sense: their files are not known"),
            (self._broken_maps, "blocks that say where files are make no sense"),
        ):
            if count:
                notes.append(f"{count} {what}")
        return notes

    # ---- what lies where ----

    def extents(self) -> Iterator[Extents]:
        yield from fixed_extents(self._superblock, self._groups)
        maps, broken = BlockMaps(self._source, self._superblock), [0]
        for inodes in walk_inodes(self._source, self._superblock, self._groups, broken):
            for extents in maps.extents(inodes):
                if len(extents):
                    yield self._own(extents)
        self._broken_inodes, self._broken_maps = sum(broken), maps.unreadable

    def _own(self, extents: Extents) -> Extents:
        """*extents*, those of the file system's inodes as its own."""
        own = are_own(extents.inode, self._superblock)
        if not own.any():
            return extents
        superblock = self._superblock
        inode, what = extents.inode.copy(), extents.what.copy()
        journals = (superblock.journal_inode, superblock.orphan_inode, JOURNAL_INODE)
        what[own] = What.SUPERBLOCK
        what[own & np.isin(inode, journals)] = What.JOURNAL
        what[own & np.isin(inode, [*superblock.quota_inodes, 3, 4])] = What.BITMAP
        inode[own] = NO_INODE
        # What is reserved for the table of groups is told of with that.
        kept = (extents.inode != RESIZE_INODE) | (extents.what == What.INODE_TABLE)
        told = Extents(inode, extents.file_offset, extents.start, extents.length, what)
        return told.select(kept)

    def free(self) -> Iterator[Spans]:
        size = self.block_size
        for start, length in free_spans(self._source, self._superblock, self._groups):
            if len(start):
                yield Spans(start * size, length * size)

    def sizes(self) -> Iterator[tuple[I64, I64]]:
        """Numbers of files, and how many bytes each has; of those outside of their records."""
        for inodes in walk_inodes(self._source, self._superblock, self._groups):
            files = inodes.select((inodes.type == REGULAR) & (inodes.flags & INLINE_DATA_FL == 0))
            low, high = (files.field[name].astype(np.int64) for name in ("size_lo", "size_high"))
            yield files.number, low | (high & 0x7FFF_FFFF) << 32

    # ---- names ----

    def names(self) -> Iterator[Names]:
        has_types = Incompat.FILETYPE in self._superblock.incompat
        maps = BlockMaps(self._source, self._superblock)
        for inodes in walk_inodes(self._source, self._superblock, self._groups):
            directories = inodes.select(inodes.type == DIRECTORY)
            is_inline = (directories.flags & INLINE_DATA_FL) != 0
            yield from self._inline_names(directories.select(is_inline), has_types=has_types)
            for extents in maps.extents(directories.select(~is_inline)):
                yield from self._names_of(
                    extents.select(extents.what == What.DIRECTORY), has_types=has_types
                )

    def _names_of(self, extents: Extents, *, has_types: bool) -> Iterator[Names]:
        size = self.block_size
        for at in range(0, len(extents), BLOCKS_AT_A_TIME):
            some = extents.select(np.arange(at, min(at + BLOCKS_AT_A_TIME, len(extents))))
            first, count = some.start // size, some.length // size
            blocks = expand_ranges(first, first + count - 1)
            parent = np.repeat(some.inode, count)
            order = np.argsort(blocks, kind="stable")
            blocks, parent = blocks[order], parent[order]
            for part in range(0, len(blocks), BLOCKS_AT_A_TIME):
                these = slice(part, part + BLOCKS_AT_A_TIME)
                raw = read_blocks(self._source, blocks[these] * size, size)
                yield names_in(raw, parent[these], has_types=has_types)

    def _inline_names(self, inodes: Inodes, *, has_types: bool) -> Iterator[Names]:
        if not len(inodes):
            return
        yield names_in(inodes.field["block"], inodes.number, INLINE_PARENT, has_types=has_types)
        rest = inline_rest(inodes)
        has_rest = rest.length > 0
        yield names_in(
            inodes.raw[has_rest],
            inodes.number[has_rest],
            rest.start[has_rest],
            end=(rest.start + rest.length)[has_rest],
            has_types=has_types,
        )

    # ---- records ----

    def records(self, start: I64, length: I64) -> Extents:
        numbers = self._inodes_in(start, length)
        in_use, is_known = inodes_in_use(self._source, self._superblock, self._groups, numbers)
        wanted = in_use | ~is_known
        numbers, is_known = numbers[wanted], is_known[wanted]
        own = are_own(numbers, self._superblock)
        numbers, is_known = numbers[~own], is_known[~own]
        size = self._superblock.inode_size
        return Extents(
            numbers,
            np.zeros(len(numbers), dtype=np.int64),
            self._record_offset(numbers),
            np.full(len(numbers), size, dtype=np.int64),
            np.where(is_known, What.INODE_TABLE, What.UNKNOWN).astype(np.uint8),
        )

    def _inodes_in(self, start: I64, length: I64) -> I64:
        """The numbers of all inodes whose records the ranges touch."""
        superblock, groups = self._superblock, self._groups
        order = np.argsort(groups.inode_table, kind="stable")
        table = groups.inode_table[order] * superblock.block_size
        size = superblock.inodes_per_group * superblock.inode_size
        # Tables do not overlap, unless the descriptors are garbage: then the first one counts.
        first = np.maximum(np.searchsorted(table, start, side="right") - 1, 0)
        last = np.searchsorted(table, start + length, side="left") - 1
        some = first <= last
        start, length, first, last = start[some], length[some], first[some], last[some]
        if not len(start):
            return np.zeros(0, dtype=np.int64)
        which = expand_ranges(first, last)
        row = np.repeat(np.arange(len(start)), last - first + 1)
        low = np.clip(start[row] - table[which], 0, size)
        high = np.clip(start[row] + length[row] - table[which], 0, size)
        inside = low < high
        low, high, which = low[inside], high[inside], which[inside]
        if not len(which):
            return np.zeros(0, dtype=np.int64)
        begin = groups.number[order][which] * superblock.inodes_per_group + 1
        numbers = expand_ranges(
            begin + low // superblock.inode_size, begin + (high - 1) // superblock.inode_size
        )
        return distinct(numbers)

    def record_offset(self, number: I64) -> I64:
        """Where the records of inodes are, bytes; -1 of those whose group is not known."""
        result = np.full(len(number), -1, dtype=np.int64)
        known = np.isin((number - 1) // self._superblock.inodes_per_group, self._groups.number)
        result[known] = self._record_offset(number[known])
        return result

    def _record_offset(self, number: I64) -> I64:
        superblock, groups = self._superblock, self._groups
        group, index = np.divmod(number - 1, superblock.inodes_per_group)
        at = np.searchsorted(groups.number, group)
        offset: I64 = groups.inode_table[at] * superblock.block_size
        result: I64 = offset + index * superblock.inode_size
        return result

    def unlinked(self, inode: I64) -> Mask:
        superblock, size = self._superblock, self.block_size
        result = np.zeros(len(inode), dtype=np.bool_)
        group = (inode - 1) // superblock.inodes_per_group
        at = np.flatnonzero((inode > 0) & np.isin(group, self._groups.number))
        at = at[np.argsort(inode[at], kind="stable")]
        if not len(at):
            return result
        offset = self._record_offset(inode[at])
        per_block = size // superblock.inode_size
        for part, rows in read_tables(self._source, offset // size * size, size):
            number = inode[at[part]]
            slot = offset[part] % size // superblock.inode_size
            found = inodes_in(rows, number - slot, superblock)
            field = found.field[np.arange(len(number)) * per_block + slot]
            result[at[part]] = (field["mode"] != 0) & (field["links_count"] == 0)
        return result
