"""btrfs as one file system of the protocol. What snapshots share is of all of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from planner.arrays import I64, Mask, distinct
from planner.guestfs.btrfs.inodes import (
    FIRST_INODE,
    FS_TREE,
    are_subvolumes,
    number_of,
    object_of,
)
from planner.guestfs.btrfs.items import EXTENT_DATA, INODE_ITEM, Items
from planner.guestfs.btrfs.naming import names_in
from planner.guestfs.btrfs.roots import (
    CSUM_TREE,
    EXTENT_TREE,
    FREE_SPACE_TREE,
    GROUP_TREE,
    Forest,
    find_forest,
)
from planner.guestfs.btrfs.space import free_ranges
from planner.guestfs.btrfs.superblock import PLACES, SIZE, Superblock, find_superblock
from planner.guestfs.btrfs.trees import END, TYPE_BITS, Places, Step
from planner.guestfs.columns import Once, little
from planner.guestfs.names import written_uuid
from planner.guestfs.overlaps import Rest, overlaps
from planner.guestfs.protocol import Extents, Names, Spans, What, own_extents
from planner.guestfs.reading import Holes

RESERVED = 1 << 20
"""Bytes before the first chunk."""

EXTENT_BYTES, INLINE = 53, 0
INODE_BYTES = 160

BITMAPS = (EXTENT_TREE, CSUM_TREE, FREE_SPACE_TREE, GROUP_TREE)
"""Trees that say what is free, and what the data was like."""

NONE = np.zeros(0, dtype=np.int64)


def recognise(source: Holes) -> Btrfs | None:
    """A btrfs that *source* holds, by the newest copy of its superblock."""
    superblock = find_superblock(source)
    return Btrfs(source, superblock) if superblock else None


class Btrfs:
    """See `planner.guestfs.protocol.FileSystem`."""

    kind = "btrfs"
    root = FIRST_INODE

    def __init__(self, source: Holes, superblock: Superblock) -> None:
        self._source, self._superblock = source, superblock
        self._known_forest: Forest | None = None
        self._lost = 0
        self.label = superblock.raw_label.decode("utf-8", "replace")
        self.uuid = written_uuid(superblock.raw_uuid)
        self.block_size, self.size = superblock.sector_size, superblock.size

    @property
    def _forest(self) -> Forest:
        if self._known_forest is None:
            self._known_forest = find_forest(self._source, self._superblock)
        return self._known_forest

    @property
    def notes(self) -> list[str]:
        superblock, forest, notes = self._superblock, self._known_forest, list[str]()
        if superblock.offset != PLACES[0]:
            notes.append(f"its superblock cannot be read; the copy at {superblock.offset} was used")
        if superblock.claimed_size > superblock.size + superblock.sector_size:
            missing = superblock.claimed_size - superblock.size
            notes.append(f"the last {missing} bytes of it are not there")
        if superblock.devices > 1:
            notes.append(
                f"it spreads over {superblock.devices} devices: only what is whole on this one is"
                " known"
            )
        if superblock.log.logical:
            notes.append("its log was not replayed: what was written last may be elsewhere")
        return notes if forest is None else notes + self._found_lost(forest)

    def _found_lost(self, forest: Forest) -> list[str]:
        notes = []
        if forest.is_old:
            notes.append("the root of its trees cannot be read; an older one was used")
        for count, what in (
            (forest.lost, "blocks that lead to its trees cannot be read"),
            (self._lost, "blocks of its trees cannot be read: what they tell is not known"),
        ):
            if count:
                notes.append(f"{count} {what}")
        if forest.trees.left_out:
            notes.append("its snapshots share more than was looked at")
        return notes

    # ---- what lies where ----

    def extents(self) -> Iterator[Extents]:
        forest, once = self._forest, Once()
        yield own_extents(What.SUPERBLOCK, *self._fixed())
        for places, what in ((forest.chunk, What.SUPERBLOCK), (forest.root, What.SUPERBLOCK)):
            yield self._nodes(places.logical[once.first(places.logical)], what)
        for items in forest.own:
            extents = self._data(items, np.full(len(items), FS_TREE, dtype=np.int64))
            yield own_extents(What.BITMAP, extents.start, extents.length)
        self._lost = 0
        for step in forest.trees.walk(forest.others):
            yield from self._of_step(step, once)
        for step in forest.trees.walk(forest.logs):
            places = step.place
            yield self._nodes(places.logical[once.first(places.logical)], What.JOURNAL)

    def _of_step(self, step: Step, once: Once) -> Iterator[Extents]:
        places = step.place
        self._lost += int((~step.sound).sum())
        of_files = are_subvolumes(places.tree)
        new = once.first(places.logical)
        is_table, is_map = of_files[new], np.isin(places.tree[new], BITMAPS)
        for what, which in (
            (What.INODE_TABLE, is_table),
            (What.BITMAP, is_map),
            (What.SUPERBLOCK, ~is_table & ~is_map),
        ):
            if which.any():
                yield self._nodes(places.logical[new[which]], what)
        if step.items is not None:
            items = step.items.select(of_files[step.items.row])
            yield self._data(items, places.tree[items.row])

    def _fixed(self) -> tuple[I64, I64]:
        start = np.array([0, *PLACES[1:]], dtype=np.int64)
        length = np.array([RESERVED, SIZE, SIZE], dtype=np.int64)
        inside = start < self.size
        return start[inside], np.minimum(length, self.size - start)[inside]

    def _nodes(self, logical: I64, what: What) -> Extents:
        copies = self._forest.trees.copies(logical).reshape(-1)
        start = copies[copies >= 0]
        length = np.minimum(self._superblock.node_size, self.size - start)
        return own_extents(what, start[length > 0], length[length > 0])

    def _data(self, items: Items, tree: I64) -> Extents:
        """Where the data of files is that is not in the trees."""
        rows = np.flatnonzero((items.type == EXTENT_DATA) & (items.size >= EXTENT_BYTES))
        some, tree = items.select(rows), tree[rows]
        flat, at = some.flat, some.at
        start, on_disk = little(flat, at + 21, 8), little(flat, at + 29, 8)
        is_packed = flat[at + 16] != 0
        # Of what is compressed no byte has a place of its own.
        start += np.where(is_packed, 0, little(flat, at + 37, 8))
        length = np.where(is_packed, on_disk, little(flat, at + 45, 8))
        kept = (flat[at + 20] != INLINE) & (little(flat, at + 21, 8) > 0)
        kept &= (start > 0) & (length > 0) & (some.offset >= 0)
        inode, is_inode = number_of(tree, some.object)
        kept &= is_inode | (some.object < FIRST_INODE)
        places, there = self._forest.trees.chunks.places(start[kept], length[kept])
        inode, offset = inode[kept], some.offset[kept]
        row, copy = np.nonzero(places >= 0)
        place = places[row, copy]
        size = np.minimum(there[row], self.size - place)
        row, place, size = row[size > 0], place[size > 0], size[size > 0]
        what = np.full(len(row), What.DATA, dtype=np.uint8)
        return Extents(inode[row], offset[row], place, size, what)

    # ---- what is free, and names ----

    def free(self) -> Iterator[Spans]:
        forest = self._forest
        roots = forest.others.select(forest.others.tree == EXTENT_TREE)
        start, end = free_ranges(forest.trees, roots, self._superblock.node_size, self.size)
        fixed_start, fixed_length = self._fixed()
        fixed = overlaps(fixed_start, fixed_start + fixed_length, start, end)
        rest = Rest(start, end)
        rest.take(fixed.start, fixed.end)
        start, end = rest.left()
        if len(start):
            yield Spans(start, end - start)

    def names(self) -> Iterator[Names]:
        forest = self._forest
        return names_in(forest.trees, self._subvolumes, forest.orphans, forest.subvolumes)

    @property
    def _subvolumes(self) -> Places:
        others = self._forest.others
        return others.select(are_subvolumes(others.tree))

    # ---- records ----

    def records(self, start: I64, length: I64) -> Extents:
        """Of files in leaves that the ranges touch, if no other copy of the leaf is whole."""
        parts, lost, begins = [(NONE, NONE)], list[Places](), [NONE]
        for step in self._forest.trees.walk(self._subvolumes):
            row, place = self._touched(step.place, start, length)
            lost.append(step.place.select(row[~step.sound[row]]))
            begins.append(place[~step.sound[row]])
            if step.items is None:
                continue
            where = np.full(len(step.place), -1, dtype=np.int64)
            where[row] = place
            items = step.items.select(where[step.items.row] >= 0)
            inode, is_inode = number_of(step.place.tree[items.row], items.object)
            is_inode &= items.type <= EXTENT_DATA
            parts.append(_pairs(inode[is_inode], where[items.row[is_inode]]))
        places = Places.joined(lost)
        if len(places):
            parts += self._below(places, np.concatenate(begins))
        inode, place = _pairs(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        return Extents(
            inode,
            np.zeros(len(inode), dtype=np.int64),
            place,
            np.minimum(self._superblock.node_size, self.size - place),
            np.full(len(inode), What.INODE_TABLE, dtype=np.uint8),
        )

    def _touched(self, places: Places, start: I64, length: I64) -> tuple[I64, I64]:
        """The rows of *places* of which no copy is untouched and can be read, and where one is."""
        size = self._superblock.node_size
        if not len(start):
            return NONE, NONE
        copies = self._forest.trees.copies(places.logical)
        at = np.searchsorted(start + length, copies, side="right")
        touched = (copies >= 0) & (at < len(start))
        touched &= start[np.minimum(at, len(start) - 1)] < copies + size
        gone = self._source.are_holes(np.maximum(copies, 0).reshape(-1), size)
        no_other = touched | (copies < 0) | gone.reshape(copies.shape)
        rows = np.flatnonzero(touched.any(axis=1) & no_other.all(axis=1))
        return rows, copies[rows, touched[rows].argmax(axis=1)]

    def _below(self, lost: Places, begin: I64) -> list[tuple[I64, I64]]:
        """The files that names lead to whose items are below lost nodes, which are at *begin*."""
        parts, orphans = [], self._forest.orphans
        for child in (np.array([self.root]), *(each.child for each in self.names())):
            number = distinct(child)
            tree, object_ = object_of(number)
            last = object_ << TYPE_BITS | ((1 << TYPE_BITS) - 1)
            end = np.full(len(last), END, dtype=np.int64)
            row = lost.latest(tree, last, end)
            first = object_ << TYPE_BITS | INODE_ITEM
            begin_of = np.zeros(len(first), dtype=np.int64)
            hit = lost.ends_behind(row, first, begin_of)
            hit &= ~orphans.ends_behind(orphans.latest(tree, last, end), first, begin_of)
            parts.append((number[hit], begin[row[hit]]))
        return parts

    def unlinked(self, inode: I64) -> Mask:
        result = np.zeros(len(inode), dtype=np.bool_)
        if not len(inode):
            return result
        gone = [NONE]
        for step in self._forest.trees.walk(self._subvolumes):
            if step.items is not None:
                items = step.items.of(INODE_ITEM, INODE_BYTES)
                items = items.select(little(items.flat, items.at + 40, 4) == 0)
                number, is_inode = number_of(step.place.tree[items.row], items.object)
                gone.append(number[is_inode])
        result[:] = np.isin(inode, np.concatenate(gone))
        return result


def _pairs(inode: I64, place: I64) -> tuple[I64, I64]:
    """Each pair once."""
    order = np.lexsort((place, inode))
    inode, place = inode[order], place[order]
    new = np.ones(len(order), dtype=np.bool_)
    new[1:] = (inode[1:] != inode[:-1]) | (place[1:] != place[:-1])
    return inode[new], place[new]
