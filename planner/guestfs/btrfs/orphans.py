"""Leaves with files that no node leads to any more, since it is lost.

The extent tree lists every node that is in use, and a leaf says itself which tree it is of.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from planner.arrays import I64, distinct, is_among
from planner.guestfs.btrfs.inodes import MAX_TREES, are_subvolumes
from planner.guestfs.btrfs.items import EXTENT_ITEM, METADATA_ITEM, Items, items_in
from planner.guestfs.btrfs.trees import NODES_AT_A_TIME, Places, Trees, key_of, root_places
from planner.guestfs.columns import little

OWNER = 88
IS_NODE = 2
"""Of an extent's flags: it is a node of a tree."""


def find_orphans(
    trees: Trees, subvolumes: Places, extents: Places, *, are_all_known: bool
) -> Places:
    """Those that are below lost nodes of *subvolumes*, or of one that is not among them, unless all
    are known. *extents*: the root of the extent tree.
    """
    leaves, lost = list[Places](), list[Places]()
    for step in trees.walk(subvolumes, leaves):
        lost.append(step.place.select(~step.sound))
    gone = Places.joined(lost)
    if not len(gone) and are_all_known:
        return gone
    known_trees = None if are_all_known else distinct(subvolumes.tree)
    known = distinct(Places.joined(leaves).logical)
    found = list[Places]()
    for step in trees.walk(extents):
        if step.items is not None:
            logical = _nodes_in(step.items)
            logical = distinct(logical[~is_among(logical, known)])
            found += _below(trees, logical, gone, known_trees)
    return Places.joined(found)


def _nodes_in(items: Items) -> I64:
    """The leaves among the nodes that items list, and some that may be none."""
    leaves = items.of(METADATA_ITEM)
    leaves = leaves.select(leaves.offset == 0)
    others = items.of(EXTENT_ITEM, 24)
    others = others.select((little(others.flat, others.at + 16, 8) & IS_NODE) != 0)
    return np.concatenate((leaves.object, others.object))


def _below(trees: Trees, logical: I64, gone: Places, known: I64 | None) -> Iterator[Places]:
    """The leaves among nodes that are below what is *gone*, or of trees that are not *known*."""
    zero = np.zeros(len(logical), dtype=np.int64)
    nodes = root_places(zero, logical, zero, zero)
    for at in range(0, len(nodes), NODES_AT_A_TIME):
        some = nodes.select(slice(at, at + NODES_AT_A_TIME))
        raw, sound = trees.read(some)
        raw, some = raw[sound], some.select(sound)
        items = items_in(raw)
        first = np.flatnonzero(np.diff(items.row, prepend=-1) != 0)
        last = np.append(first[1:], len(items))[: len(first)] - 1
        row, keys = items.row[first], key_of(items.object, items.type)
        tree = little(raw.reshape(-1), row * raw.shape[1] + OWNER, 8)
        low, low_offset = keys[first], items.offset[first]
        found = Places(
            tree,
            some.logical[row],
            some.level[row],
            trees.generation(raw)[row],
            low,
            low_offset,
            keys[last],
            items.offset[last] + 1,
        )
        kept = gone.ends_behind(gone.latest(tree, low, low_offset), low, low_offset)
        if known is not None:
            kept |= ~is_among(tree, known)
        kept &= are_subvolumes(tree) & (tree < MAX_TREES)
        yield found.select(kept)
