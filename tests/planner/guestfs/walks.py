"""What a reader says of a whole file system, gathered for a comparison."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from planner.guestfs.protocol import FileSystem, What
from planner.guestfs.reading import Holes
from planner.source import Source


def holed(source: Source, *holes: tuple[int, int]) -> Holes:
    """*source* of which nothing can be read at (offset, length)."""
    start = np.array([at for at, _ in holes], dtype=np.int64)
    length = np.array([count for _, count in holes], dtype=np.int64)
    return Holes(source, start, start + length)


def paths_of(filesystem: FileSystem) -> set[tuple[bytes, int]]:
    """Every path from the root, and its inode."""
    inside: dict[int, list[tuple[bytes, int]]] = defaultdict(list)
    for names in filesystem.names():
        for row in range(len(names)):
            inside[int(names.parent[row])].append((names.name(row), int(names.child[row])))
    found: set[tuple[bytes, int]] = set()
    folders = [(filesystem.root, b"")]
    while folders:
        folder, path = folders.pop()
        for name, inode in inside.pop(folder, []):
            found.add((path + b"/" + name, inode))
            folders.append((inode, path + b"/" + name))
    return found


def blocks_of(filesystem: FileSystem) -> dict[int, set[tuple[int | str, int]]]:
    """The blocks of each inode as (block of the file, block of the disk); those that say where
    they are with ``map`` for the first. Under -1 what is the file system's own.
    """
    size = filesystem.block_size
    found: dict[int, set[tuple[int | str, int]]] = defaultdict(set)
    for extents in filesystem.extents():
        for inode, file_offset, start, length, what in zip(
            extents.inode.tolist(),
            extents.file_offset.tolist(),
            extents.start.tolist(),
            extents.length.tolist(),
            extents.what.tolist(),
            strict=True,
        ):
            for at in range(-(-length // size)):
                place = "map" if what == What.INODE_TABLE else file_offset // size + at
                found[inode].add((place, start // size + at))
    return found


def free_blocks_of(filesystem: FileSystem, own: set[int]) -> set[int]:
    """Free blocks but for *own*: what nobody wrote a bitmap for is told of as free as a whole."""
    size = filesystem.block_size
    found: set[int] = set()
    for spans in filesystem.free():
        for start, length in zip(spans.start.tolist(), spans.length.tolist(), strict=True):
            found.update(range(start // size, (start + length) // size))
    return found - own


def owned_blocks(blocks: dict[int, set[tuple[int | str, int]]]) -> set[int]:
    """All blocks that somebody has, or the file system itself."""
    return {block for pairs in blocks.values() for _, block in pairs}


def require_sound(filesystem: FileSystem) -> None:
    """Ask it all that can be asked, whatever it is made of, and believe no place outside of it."""
    assert filesystem.label is not None
    for extents in filesystem.extents():
        assert (extents.start >= 0).all()
        assert (extents.length >= 0).all()
        assert (extents.start + extents.length <= filesystem.size).all()
    for spans in filesystem.free():
        assert (spans.start + spans.length <= filesystem.size).all()
    inodes = [np.array([filesystem.root])]
    for names in filesystem.names():
        inodes.append(names.child[:8])
        for row in range(min(len(names), 8)):
            names.name(row)
    size = filesystem.size
    starts = np.arange(0, size, max(1, size // 64), dtype=np.int64)
    assert (filesystem.records(starts, np.ones_like(starts)).start >= 0).all()
    filesystem.unlinked(np.concatenate(inodes))
    assert all("\n" not in note for note in filesystem.notes)
