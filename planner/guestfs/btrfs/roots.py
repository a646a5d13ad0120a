"""Which trees a btrfs has: the chunk tree, the root tree, and those that the root tree names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.arrays import I64, U8, Mask
from planner.guestfs.btrfs.chunks import chunks_in_array, chunks_of, joined
from planner.guestfs.btrfs.inodes import FIRST_SUBVOLUME, FS_TREE, MAX_TREES, are_subvolumes
from planner.guestfs.btrfs.items import ROOT_ITEM, ROOT_REF, Items
from planner.guestfs.btrfs.orphans import find_orphans
from planner.guestfs.btrfs.superblock import MAX_LEVEL, Root, Superblock
from planner.guestfs.btrfs.trees import Places, Trees, root_places
from planner.guestfs.columns import little
from planner.guestfs.reading import Holes

ROOT_TREE, EXTENT_TREE, CHUNK_TREE, CSUM_TREE = 1, 2, 3, 7
FREE_SPACE_TREE, GROUP_TREE, LOG_TREE = 10, 11, -6

ROOT_ITEM_BYTES, ROOT_REF_HEAD = 239, 18


@dataclass(frozen=True, slots=True)
class Subvolumes:
    """Names of subvolumes: in directory ``folder`` of subvolume ``parent`` one is ``child``; the
    name is ``length`` bytes of ``flat`` from ``at`` on.
    """

    parent: I64
    folder: I64
    child: I64
    flat: U8
    at: I64
    length: I64


@dataclass(frozen=True, slots=True)
class Forest:
    """All that leads to the trees. ``chunk``, ``root``: the nodes of those trees that are known.
    ``others``: roots of all other trees, ``logs``: of what was not yet written into them.
    ``orphans``: leaves among the others that nothing leads to any more. ``own``: files in the root
    tree, items. ``is_old``: an older root had to do; ``lost``: nodes of the chunk tree and of the
    root tree that cannot be read.
    """

    trees: Trees
    chunk: Places
    root: Places
    others: Places
    logs: Places
    orphans: Places
    own: list[Items]
    subvolumes: list[Subvolumes]
    is_old: bool
    lost: int


def find_forest(source: Holes, superblock: Superblock) -> Forest:
    """What the superblock leads to."""
    trees = Trees(
        source, superblock, chunks_in_array(superblock.chunks, superblock.device, superblock.size)
    )
    chunk, old_chunk = _first_that_is(trees, superblock.chunk_roots, CHUNK_TREE)
    chunk_nodes, lost = [], 0
    for step in trees.walk(chunk):
        chunk_nodes.append(step.place)
        lost += int((~step.sound).sum())
        if step.items is not None:
            more = chunks_of(step.items, superblock.device, superblock.size)
            trees.chunks = joined(trees.chunks, more)
    root, old_root = _first_that_is(trees, superblock.roots, ROOT_TREE)
    nodes, others, own, subvolumes = [], list[Places](), list[Items](), list[Subvolumes]()
    for step in trees.walk(root):
        nodes.append(step.place)
        lost += int((~step.sound).sum())
        if step.items is not None:
            others.append(_roots_in(step.items))
            subvolumes.append(_subvolumes_in(step.items))
            own.append(step.items)
    logs = []
    log, _ = _first_that_is(trees, [superblock.log] if superblock.log.logical else [], LOG_TREE)
    for step in trees.walk(log):
        logs.append(step.place)
        if step.items is not None:
            found = _roots_in(step.items)
            logs.append(found.select(found.tree == LOG_TREE))
    known, is_remembered = _with_remembered(trees, Places.joined(others))
    with_files = known.select(are_subvolumes(known.tree))
    extents = known.select(known.tree == EXTENT_TREE)
    orphans = find_orphans(trees, with_files, extents, are_all_known=not lost)
    return Forest(
        trees,
        Places.joined(chunk_nodes),
        Places.joined(nodes),
        Places.joined([known, orphans]),
        Places.joined(logs),
        orphans,
        own,
        subvolumes,
        old_chunk or old_root or is_remembered,
        lost,
    )


def _with_remembered(trees: Trees, known: Places) -> tuple[Places, bool]:
    """*known* roots, and where two are not among them what the superblock remembers of those."""
    superblock, parts = trees.superblock, [known]
    for tree, roots in ((EXTENT_TREE, superblock.extent_roots), (FS_TREE, superblock.file_roots)):
        if not (known.tree == tree).any():
            found, _ = _first_that_is(trees, roots, tree)
            parts.append(found)
    return Places.joined(parts), len(parts) > 1


def _first_that_is(trees: Trees, roots: Sequence[Root], tree: int) -> tuple[Places, bool]:
    """The first root that can be read, else the first of all; and whether it is another one."""
    places = [
        root_places(*(np.array([each], dtype=np.int64) for each in (tree, *_words(root))))
        for root in roots
    ]
    for number, place in enumerate(places):
        raw, sound = trees.read(place)
        generation = int(little(raw.reshape(-1), np.array([80]), 8)[0])
        # The log's generation is in nothing that leads to it.
        if sound[0] and (tree == LOG_TREE or generation == int(place.generation[0])):
            place.generation[0] = generation
            return place, number > 0
    return (places[0] if places else Places.joined([])), False


def _words(root: Root) -> tuple[int, int, int]:
    logical = root.logical if root.logical < 1 << 63 else -1
    return logical, root.level, root.generation & ((1 << 63) - 1)


def _roots_in(items: Items) -> Places:
    found = items.of(ROOT_ITEM, ROOT_ITEM_BYTES)
    flat, at = found.flat, found.at
    # One that is deleted and not yet cleared away has no references.
    level, is_used = flat[at + 238].astype(np.int64), little(flat, at + 216, 4) > 0
    kept: Mask = (level <= MAX_LEVEL) & (found.object < MAX_TREES) & is_used
    kept |= (found.object == LOG_TREE) & (level <= MAX_LEVEL)
    columns = (found.object, little(flat, at + 176, 8), level, little(flat, at + 160, 8))
    return root_places(*(column[kept] for column in columns))


def _subvolumes_in(items: Items) -> Subvolumes:
    found = items.of(ROOT_REF, ROOT_REF_HEAD + 1)
    length = little(found.flat, found.at + 16, 2)
    kept = (length > 0) & (ROOT_REF_HEAD + length <= found.size)
    kept &= (found.object >= 0) & (found.object < MAX_TREES)
    kept &= (found.offset >= FIRST_SUBVOLUME) & (found.offset < MAX_TREES)
    found, length = found.select(kept), length[kept]
    folder = little(found.flat, found.at, 8)
    return Subvolumes(
        found.object, folder, found.offset, found.flat, found.at + ROOT_REF_HEAD, length
    )
