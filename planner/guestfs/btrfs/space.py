"""What of the device btrfs has not given to anybody."""

from __future__ import annotations

import numpy as np

from planner.arrays import I64, join_ranges
from planner.guestfs.btrfs.chunks import Chunks
from planner.guestfs.btrfs.items import EXTENT_ITEM, METADATA_ITEM
from planner.guestfs.btrfs.trees import TYPE_BITS, Places, Trees
from planner.guestfs.overlaps import Rest, overlaps

MAX_LENGTH = 1 << 61


def free_ranges(trees: Trees, roots: Places, node_size: int, size: int) -> tuple[I64, I64]:
    """Starts and ends of what no chunk has of *size* bytes, and of what in chunks the extent trees
    with these *roots* do not know. Where one of them is lost nothing is said.
    """
    chunks = trees.chunks
    within = Rest(chunks.start, chunks.start + chunks.length)
    if len(roots):
        _take(within, *_used(trees, roots, node_size), chunks.start, chunks.start + chunks.length)
        start, end = within.left()
    else:
        start = end = np.zeros(0, dtype=np.int64)
    places, length = chunks.places(start, end - start)
    row, copy = np.nonzero(places >= 0)
    begin, stop = _chunks_on_device(chunks)
    disk = np.array([0], dtype=np.int64), np.array([size], dtype=np.int64)
    outside = Rest(*disk)
    _take(outside, begin, stop, *disk)
    outside_start, outside_end = outside.left()
    return join_ranges(
        np.concatenate((places[row, copy], outside_start)),
        np.concatenate((np.minimum(places[row, copy] + length[row], size), outside_end)),
    )


def _take(rest: Rest, start: I64, end: I64, known_start: I64, known_end: I64) -> None:
    """Take ranges away as far as they lie in the known ones."""
    over = overlaps(start, end, known_start, known_end)
    rest.take(over.start, over.end)


def _chunks_on_device(chunks: Chunks) -> tuple[I64, I64]:
    row, copy = np.nonzero(chunks.copies >= 0)
    begin = chunks.copies[row, copy]
    return join_ranges(begin, begin + chunks.length[row])


def _used(trees: Trees, roots: Places, node_size: int) -> tuple[I64, I64]:
    """Logical ranges that are in use, or of which that is not known."""
    none = np.zeros(0, dtype=np.int64)
    parts = [(none, none)]
    for step in trees.walk(roots):
        lost = step.place.select(~step.sound)
        parts.append((lost.low >> TYPE_BITS, (lost.high >> TYPE_BITS) + 1))
        if step.items is None:
            continue
        for kind in (EXTENT_ITEM, METADATA_ITEM):
            some = step.items.of(kind)
            # Of blocks of trees the level stands where of data the length does.
            is_data = kind == EXTENT_ITEM
            length = some.offset if is_data else np.full_like(some.offset, node_size)
            kept = (some.object >= 0) & (some.object < MAX_LENGTH)
            kept &= (length > 0) & (length < MAX_LENGTH)
            parts.append((some.object[kept], (some.object + length)[kept]))
    start, end = (np.concatenate(column) for column in zip(*parts, strict=True))
    return join_ranges(start, end)
