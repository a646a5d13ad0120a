"""The names in btrfs's trees: those in directories, and where these are lost those of the files.

A name stands three times: twice with its directory, by its hash and by an index, and once with its
file, with the same index: so that of each name with a file it is known whether the other is lost.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from planner.arrays import I64, Mask
from planner.guestfs.btrfs.inodes import FIRST_INODE, number_of, object_of
from planner.guestfs.btrfs.items import (
    DIR_INDEX,
    INODE_EXTREF,
    INODE_ITEM,
    INODE_REF,
    Items,
    names_within,
)
from planner.guestfs.btrfs.roots import Subvolumes
from planner.guestfs.btrfs.trees import Places, Trees, key_of
from planner.guestfs.columns import little
from planner.guestfs.protocol import Names

ENTRY_HEAD, DIRECTORY = 30, 2
HEADS = {INODE_REF: (10, 8), INODE_EXTREF: (18, 16)}
"""Bytes before each name, and where among them its length is."""


def names_in(
    trees: Trees, roots: Places, orphans: Places, subvolumes: list[Subvolumes]
) -> Iterator[Names]:
    """All of them, of the trees with files; *orphans*: leaves among the *roots*."""
    lost = list[Places]()
    for found in subvolumes:
        yield _of_subvolumes(found)
    for step in trees.walk(roots):
        lost.append(step.place.select(~step.sound))
        if step.items is not None:
            yield _entries(step.items, step.place.tree)
    gone = Places.joined(lost)
    if not len(gone):
        return
    for step in trees.walk(roots):
        if step.items is not None:
            for names, index in _of_files(step.items, step.place.tree):
                tree, folder = object_of(names.parent)
                key = key_of(folder, np.full(len(folder), DIR_INDEX, dtype=np.int64))
                is_gone = gone.ends_behind(gone.latest(tree, key, index), key, index)
                is_told = orphans.ends_behind(orphans.latest(tree, key, index), key, index)
                yield _select(names, is_gone & ~is_told)


def _of_subvolumes(found: Subvolumes) -> Names:
    parent, good = number_of(found.parent, found.folder)
    child, _ = number_of(found.child, np.full(len(found.child), FIRST_INODE, dtype=np.int64))
    names = Names(
        parent, child, np.ones(len(child), dtype=np.bool_), found.flat, found.at, found.length
    )
    return _select(names, good)


def _entries(items: Items, trees: I64) -> Names:
    """Of directories in leaves; *trees*: of which tree each leaf is."""
    found = items.of(DIR_INDEX, ENTRY_HEAD + 1)
    flat, at, tree = found.flat, found.at, trees[found.row]
    length = little(flat, at + 27, 2)
    parent, is_folder = number_of(tree, found.object)
    child, is_inode = number_of(tree, little(flat, at, 8))
    # What leads to another subvolume is told of by the root tree.
    good = is_folder & is_inode & (flat[at + 8] == INODE_ITEM)
    good &= (length > 0) & (ENTRY_HEAD + length <= found.size)
    names = Names(parent, child, flat[at + 29] == DIRECTORY, flat, at + ENTRY_HEAD, length)
    return _select(names, good)


def _of_files(items: Items, trees: I64) -> Iterator[tuple[Names, I64]]:
    """Of files in leaves, and the index of each in its directory."""
    for kind, (head, length_at) in HEADS.items():
        found = items.of(kind)
        flat, tree, end = found.flat, trees[found.row], found.at + found.size
        child, is_inode = number_of(tree, found.object)
        for row, place, at, length in names_within(flat, found.at, end, head, length_at):
            folder = found.offset[row] if kind == INODE_REF else little(flat, place, 8)
            parent, is_folder = number_of(tree[row], folder)
            good = np.flatnonzero(is_folder & is_inode[row])
            index = little(flat, place + length_at - 8, 8)[good]
            # Whether it is a directory is not said here: it may be one.
            may_be = np.ones(len(good), dtype=np.bool_)
            yield (
                Names(parent[good], child[row[good]], may_be, flat, at[good], length[good]),
                index,
            )


def _select(names: Names, which: Mask) -> Names:
    return Names(
        names.parent[which],
        names.child[which],
        names.is_directory[which],
        names.raw,
        names.start[which],
        names.length[which],
    )
