"""Numbers of inodes of btrfs: each subvolume, and each snapshot, has its own.

Above `INODE_BITS` stands which subvolume it is, 0 for the first.
"""

from __future__ import annotations

import numpy as np

from planner.arrays import I64, Mask

FS_TREE, FIRST_SUBVOLUME = 5, 256
TREE_BITS = 19
MAX_TREES = 1 << TREE_BITS
"""Subvolumes have smaller numbers."""

INODE_BITS = 63 - TREE_BITS
INODE_MASK = (1 << INODE_BITS) - 1
FIRST_INODE = 256
"""The root of each subvolume; those below are the file system's."""


def are_subvolumes(tree: I64) -> Mask:
    """Which trees have files."""
    result: Mask = (tree == FS_TREE) | (tree >= FIRST_SUBVOLUME)
    return result


def number_of(tree: I64, object_: I64) -> tuple[I64, Mask]:
    """The number of an object in a tree, and whether it can be a file's."""
    is_inode = (object_ >= FIRST_INODE) & (object_ <= INODE_MASK)
    above = np.where(tree == FS_TREE, 0, tree) << INODE_BITS
    return above | np.where(is_inode, object_, 0), is_inode


def object_of(number: I64) -> tuple[I64, I64]:
    """The tree and the object in it of a number."""
    tree = number >> INODE_BITS
    return np.where(tree == 0, FS_TREE, tree), number & INODE_MASK
