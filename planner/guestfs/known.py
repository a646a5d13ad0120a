"""Which file systems there are readers for, and which of them is the one at hand."""

from __future__ import annotations

from collections.abc import Callable

from planner.guestfs.btrfs import filesystem as btrfs
from planner.guestfs.ext import filesystem as ext
from planner.guestfs.ext import superblock as ext_superblock
from planner.guestfs.fat import filesystem as fat
from planner.guestfs.ntfs import filesystem as ntfs
from planner.guestfs.protocol import FileSystem
from planner.guestfs.reading import Holes
from planner.guestfs.xfs import filesystem as xfs
from planner.guestfs.xfs import superblock as xfs_superblock
from planner.source import read_bytes

Reader = Callable[[Holes], FileSystem | None]

MARKS: tuple[tuple[int, bytes, Reader], ...] = (
    (1080, b"\x53\xef", ext.recognise),
    (0, b"XFSB", xfs.recognise),
    (65600, b"_BHRfS_M", btrfs.recognise),
    (3, b"NTFS    ", ntfs.recognise),
    (3, b"EXFAT   ", fat.recognise_exfat),
    (82, b"FAT32   ", fat.recognise),
    (54, b"FAT", fat.recognise),
)
"""Where the first copy of a superblock has which bytes, the surest first."""


def recognise(source: Holes) -> FileSystem | None:
    """The file system that *source* holds, if any of ours.

    By its first superblock or boot sector if that is there. Only then by copies of one: those that
    an earlier file system left behind are not overwritten by the next.
    """
    marked = [
        reader for offset, mark, reader in MARKS if read_bytes(source, offset, len(mark)) == mark
    ]
    for reader in dict.fromkeys([*marked, *(reader for _, _, reader in MARKS)]):
        found = reader(source)
        if found is not None:
            return found
    return None


def behind_beginning(source: Holes) -> int:
    """How far behind the first byte of a file system *source* begins, if with a copy of a
    superblock; else 0.
    """
    return xfs_superblock.behind_beginning(source) or ext_superblock.behind_beginning(source)
