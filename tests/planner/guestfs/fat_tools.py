"""What mtools say of a FAT, the judges of ours; and what ours has, in the same shape."""

from __future__ import annotations

import re
from pathlib import Path

from planner.guestfs.fat.filesystem import Fat
from planner.guestfs.fat.volume import FIRST
from planner.guestfs.protocol import NO_INODE, What
from planner.source import Source, read_bytes
from tests.images.guest_filled import mtools

Clusters = list[tuple[int, int]]
"""(place in the chain, cluster)."""


def clusters_of(filesystem: Fat) -> dict[int, Clusters]:
    """Ours, of each file; nothing of what is the file system's own."""
    volume = filesystem._volume
    found: dict[int, Clusters] = {}
    for extents in filesystem.extents():
        kept = extents.select((extents.inode != NO_INODE) & (extents.start >= volume.heap))
        for inode, at, start, length in zip(
            kept.inode.tolist(),
            (kept.file_offset // volume.cluster_size).tolist(),
            ((kept.start - volume.heap) // volume.cluster_size + FIRST).tolist(),
            (kept.length // volume.cluster_size).tolist(),
            strict=True,
        ):
            found.setdefault(inode, []).extend((at + n, start + n) for n in range(length))
    return {inode: sorted(pairs) for inode, pairs in found.items()}


def contents_of(filesystem: Fat, source: Source) -> dict[int, bytes]:
    """Ours: the bytes of each file's clusters, those of directories left out."""
    pieces: dict[int, dict[int, bytes]] = {}
    for extents in filesystem.extents():
        kept = extents.select((extents.what == What.DATA) & (extents.inode != NO_INODE))
        for row in range(len(kept)):
            file = pieces.setdefault(int(kept.inode[row]), {})
            raw = read_bytes(source, int(kept.start[row]), int(kept.length[row]))
            file[int(kept.file_offset[row])] = raw
    found = {}
    for inode, file in pieces.items():
        at = 0
        for offset in sorted(file):
            assert offset == at
            at += len(file[offset])
        found[inode] = b"".join(file[offset] for offset in sorted(file))
    return found


def paths_in(image: Path) -> set[bytes]:
    """Every path that mdir shows."""
    text = mtools("mdir", image, "-/", "-b", "-a", "::")
    return {line.removeprefix("::").rstrip("/").encode() for line in text.splitlines() if line}


def clusters_in(image: Path, paths: list[bytes]) -> dict[bytes, Clusters]:
    """The clusters of files that mshowfat names."""
    text = mtools("mshowfat", image, *("::" + path.decode() for path in paths))
    found: dict[bytes, Clusters] = {}
    for line in filter(None, text.splitlines()):
        match = re.fullmatch(r"::(.*?) ((?:<[\d-]+> *)*|Root directory or empty file)", line)
        assert match is not None
        path, ranges = match.groups()
        clusters = [
            cluster
            for first, last in re.findall(r"<(\d+)(?:-(\d+))?>", ranges)
            for cluster in range(int(first), int(last or first) + 1)
        ]
        found[path.encode()] = list(enumerate(clusters))
    return found
