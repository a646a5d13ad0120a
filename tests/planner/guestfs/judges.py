"""Our readers against the tools of each file system, on a whole one that nothing is wrong with.

Every path and inode, every block of every file, and what is free: debugfs, xfs_db, ntfscluster and
ntfs-3g, mtools, and of exFAT a driver's reading of all files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from planner.guestfs.btrfs.filesystem import Btrfs
from planner.guestfs.ext.filesystem import Ext
from planner.guestfs.fat.filesystem import Fat
from planner.guestfs.known import recognise
from planner.guestfs.ntfs.attributes import FIRST_FILE, NUMBER, NUMBER_BITS
from planner.guestfs.ntfs.filesystem import Ntfs
from planner.guestfs.protocol import NO_INODE
from planner.guestfs.reading import Holes
from planner.guestfs.xfs.filesystem import Xfs
from planner.source import Source
from tests.images.guest_filled import mounted_exfat, mounted_ntfs
from tests.oracle.scene import FileSource
from tests.planner.guestfs import btrfs_tools, debugfs, fat_tools, ntfs_tools, xfs_db
from tests.planner.guestfs.walks import blocks_of, free_blocks_of, owned_blocks, paths_of


def require_agreement(image: Path) -> None:
    """Whatever file system is in *image*: its own tools say of it what we say."""
    with image.open("rb") as file:
        source = FileSource(file.fileno())
        found = recognise(Holes(source))
        assert found is not None
        assert not found.notes
        JUDGES[found.kind](image, found, source)
        assert not found.notes


def require_ext(image: Path, filesystem: Ext) -> None:
    """As debugfs says."""
    paths = paths_of(filesystem)
    assert paths == debugfs.paths_in(image)
    ours = blocks_of(filesystem)
    inodes = sorted({inode for _, inode in paths} | {filesystem.root})
    for inode, judged in debugfs.blocks_of(image, inodes).items():
        attributes = {block for place, block in judged if place == "attributes"}
        mine = {("attributes" if b in attributes else place, b) for place, b in ours[inode]}
        assert mine == judged, f"inode {inode}"
    assert set(ours) <= {*inodes, NO_INODE}
    owned = owned_blocks(ours)
    assert free_blocks_of(filesystem, owned) == debugfs.free_blocks(image)


def require_xfs(image: Path, filesystem: Xfs) -> None:
    """As xfs_db says."""
    paths = paths_of(filesystem)
    parents = {parent for names in filesystem.names() for parent in names.parent.tolist()}
    assert paths == xfs_db.paths_in(image, filesystem.root, parents)
    ours = blocks_of(filesystem)
    inodes = sorted({inode for _, inode in paths} | {filesystem.root})
    for inode, (data, attributes) in xfs_db.blocks_of(image, inodes).items():
        mine = {(place, block) for place, block in ours[inode] if place != "map"}
        hidden = {block for _, block in attributes}
        assert {pair for pair in mine if pair[1] not in hidden} == data, f"inode {inode}"
        assert {block for _, block in mine} >= hidden
    assert set(ours) <= {*inodes, NO_INODE}
    owned = owned_blocks(ours)
    free = free_blocks_of(filesystem, set())
    judged = xfs_db.free_blocks(image)
    assert free <= judged
    # What is kept for the trees to grow is free to xfs_db, and not to us.
    assert judged - free <= {block for _, block in ours[NO_INODE]}
    assert not free & owned
    assert len(free | owned) == filesystem.size // filesystem.block_size


def plain(paths: set[tuple[bytes, int]]) -> set[tuple[bytes, int]]:
    """Those that are no streams of NTFS."""
    return {(path, inode) for path, inode in paths if inode >> NUMBER_BITS == 0}


def require_ntfs(image: Path, filesystem: Ntfs, judged: set[tuple[bytes, int]]) -> None:
    """As ntfscluster says; *judged*: the paths that ntfs-3g shows."""
    assert plain(paths_of(filesystem)) == judged
    ours = blocks_of(filesystem)
    for inode in sorted(inode for inode in ours if 0 <= inode <= NUMBER):
        attributes = ntfs_tools.attributes_of(image, inode)
        lists = attributes.pop("list", set())
        streams = {number for number in ours if number >> NUMBER_BITS and number & NUMBER == inode}
        mine = set().union(*(ours[number] for number in {inode, *streams}))
        assert {pair for pair in mine if pair[0] != "map"} == set().union(*attributes.values())
        assert {block for place, block in mine if place == "map"} == {block for _, block in lists}
    owned, free = owned_blocks(ours), free_blocks_of(filesystem, set())
    assert not free & owned
    clusters = filesystem._boot.clusters
    assert {block for block in free | owned if block < clusters} == set(range(clusters))


def ntfs_paths(image: Path) -> set[tuple[bytes, int]]:
    """The paths of files that ntfs-3g shows."""
    with mounted_ntfs(image) as folder:
        return {pair for pair in ntfs_tools.paths_in(folder) if pair[1] >= FIRST_FILE}


def require_fat(image: Path, filesystem: Fat) -> None:
    """As mdir and mshowfat say."""
    paths = paths_of(filesystem)
    assert {path for path, _ in paths} == fat_tools.paths_in(image)
    ours, inode_of = fat_tools.clusters_of(filesystem), dict(paths)
    # What is not ASCII cannot be on a command line of mtools.
    known = sorted(path for path, _ in paths if path.isascii())
    judged = fat_tools.clusters_in(image, known)
    assert len(judged) == len(known)
    for path, clusters in judged.items():
        assert ours.get(inode_of[path], []) == clusters, path
    require_all_clusters_are_told_of(filesystem)


def require_exfat(filesystem: Fat, files: dict[bytes, bytes | None], source: Source) -> None:
    """*files*: what a driver reads of each, None of a directory."""
    paths = paths_of(filesystem)
    assert {path for path, _ in paths} == set(files)
    contents = fat_tools.contents_of(filesystem, source)
    size = filesystem.block_size
    for path, inode in paths:
        judged = files[path]
        if judged is not None:
            ours = contents.get(inode, b"")
            assert ours[: len(judged)] == judged, path
            assert len(ours) == -(-len(judged) // size) * size
    require_all_clusters_are_told_of(filesystem)


def require_all_clusters_are_told_of(filesystem: Fat) -> None:
    """Each is in use or free, and none is both."""
    size = filesystem.block_size
    heap, count = filesystem._volume.heap, filesystem._volume.clusters
    used, free = np.zeros(count, np.bool_), np.zeros(count, np.bool_)
    for flags, parts in ((used, filesystem.extents()), (free, filesystem.free())):
        for each in parts:
            for start, length in zip(each.start.tolist(), each.length.tolist(), strict=True):
                if start >= heap:
                    flags[(start - heap) // size : (start + length - heap) // size] = True
    assert (used ^ free).all()


def exfat_files(image: Path) -> dict[bytes, bytes | None]:
    """Every path that the FUSE driver shows, and what is in each file; None of a directory."""
    with mounted_exfat(image) as folder:
        return {
            b"/" + bytes(each.relative_to(folder)): each.read_bytes() if each.is_file() else None
            for each in folder.rglob("*")
        }


def require_btrfs(image: Path, filesystem: Btrfs, source: Source) -> None:
    """As the kernel reads it, and as btrfs-progs find it to be in use."""
    btrfs_tools.require_files(filesystem, btrfs_tools.files_of(image), source)
    btrfs_tools.require_space(filesystem, image)


JUDGES: dict[str, Callable[[Path, Any, Source], None]] = {
    **dict.fromkeys(("ext2", "ext3", "ext4"), lambda image, found, _: require_ext(image, found)),
    "btrfs": require_btrfs,
    "xfs": lambda image, found, _: require_xfs(image, found),
    "ntfs": lambda image, found, _: require_ntfs(image, found, ntfs_paths(image)),
    "vfat": lambda image, found, _: require_fat(image, found),
    "exfat": lambda image, found, source: require_exfat(found, exfat_files(image), source),
}
"""By the word of blkid."""
