"""What the kernel and btrfs-progs say of a btrfs: the judges of ours."""

from __future__ import annotations

import os
import re
import stat
import zlib
from pathlib import Path

import numpy as np

from planner.arrays import join_ranges
from planner.guestfs.btrfs.filesystem import RESERVED, Btrfs
from planner.guestfs.btrfs.inodes import INODE_MASK
from planner.guestfs.btrfs.superblock import PLACES, SIZE
from planner.guestfs.overlaps import overlaps
from planner.guestfs.protocol import NO_INODE, What
from planner.source import Source, read_bytes
from tests.images.guest_filled import mounted, run
from tests.planner.guestfs.walks import paths_of

STUB = 2
"""The inode of what stands in a snapshot for a subvolume that it does not have."""

Files = dict[tuple[bytes, int], bytes | None]
"""By path and inode what is in each file; None of what is no plain file."""


def files_in(folder: Path) -> Files:
    """What the kernel shows in a mount."""
    found: Files = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        if status.st_ino != STUB:
            is_plain = stat.S_ISREG(status.st_mode)
            name = b"/" + os.fsencode(path.relative_to(folder))
            found[name, status.st_ino] = path.read_bytes() if is_plain else None
    return found


def files_of(image: Path) -> Files:
    """The same of an image."""
    with mounted(image, "ro") as folder:
        return files_in(folder)


def require_files(filesystem: Btrfs, files: Files, source: Source) -> None:
    """Every path, every inode, and each byte of each file lies where we say."""
    paths = paths_of(filesystem)
    assert {(path, inode & INODE_MASK) for path, inode in paths} == set(files)
    pieces: dict[int, list[tuple[int, bytes]]] = {}
    for extents in filesystem.extents():
        mine = extents.select((extents.inode != NO_INODE) & (extents.what == What.DATA))
        for row in range(len(mine)):
            raw = read_bytes(source, int(mine.start[row]), int(mine.length[row]))
            place = int(mine.file_offset[row])
            pieces.setdefault(int(mine.inode[row]), []).append((place, raw))
    for path, inode in paths:
        content = files[path, inode & INODE_MASK]
        if content is None:
            assert inode not in pieces
            continue
        known = bytearray(len(content))
        for at, raw in pieces.get(inode, []):
            _fill(known, at, raw, content, path)
        # What is short may be with the inode.
        assert known == content or (inode not in pieces and len(content) < 4096), path


def _fill(known: bytearray, at: int, raw: bytes, content: bytes, path: bytes) -> None:
    expected = content[at : at + len(raw)]
    if raw[: len(expected)] != expected:
        unpacked = zlib.decompressobj().decompress(raw)
        start = unpacked.find(content[at : at + 4096])
        assert start >= 0, path
        raw = unpacked[start:]
        # Of what is packed a part may be somebody else's by now.
        length = next((n for n in range(0, min(len(raw), len(content) - at), 4096)
                       if raw[n : n + 4096][: len(content) - at - n]
                       != content[at + n : at + n + 4096]), len(content) - at)  # fmt: skip
        expected = content[at : at + min(length, len(raw))]
    known[at : at + len(expected)] = expected


def require_space(filesystem: Btrfs, image: Path) -> None:
    """As much is free as btrfs-progs find nobody to have, and none of it is anybody's."""
    text = run("btrfs", "inspect-internal", "dump-tree", "-t", "extent", image)
    chunks = run("btrfs", "inspect-internal", "dump-tree", "-t", "chunk", image)
    ranges = []
    for start, length, kind in re.findall(
        r"CHUNK_ITEM (\d+)\) itemoff.*\n\t\tlength (\d+) .*type (\S+)", chunks
    ):
        ranges.append((int(start), int(start) + int(length), 2 if "DUP" in kind else 1))
    described = run("btrfs", "inspect-internal", "dump-super", image)
    [node] = map(int, re.findall(r"nodesize\s+(\d+)", described))
    used = 0
    items = re.findall(r"item \d+ key \((\d+) (EXTENT|METADATA)_ITEM (\d+)\)", text)
    for start, kind, offset in items:
        length = int(offset) if kind == "EXTENT" else node
        copies = next(copies for low, high, copies in ranges if low <= int(start) < high)
        used += length * copies
    used += RESERVED + SIZE * sum(place < filesystem.size for place in PLACES[1:])
    spans, extents = list(filesystem.free()), list(filesystem.extents())
    start, end = (np.concatenate(column) for column in zip(
        *((each.start, each.start + each.length) for each in spans), strict=True))  # fmt: skip
    assert int((end - start).sum()) == filesystem.size - used
    taken = join_ranges(
        np.concatenate([each.start for each in extents]),
        np.concatenate([each.start + each.length for each in extents]),
    )
    over = overlaps(*taken, start, end)
    assert not len(over), (over.start, over.end)
