"""What every file system offers to who asks whose bytes a range of the guest's disk holds.

A module a file system, each with a function ``recognise(source: Holes) -> FileSystem | None``. It
looks at the source's first bytes and at the places of backup copies, is tolerant, and raises
nothing: what it could not read it says in ``notes``. A million files pass through here, so that all
is handed over in batches of columns: no Python loop runs over inodes, clusters or names.

Memory is bounded by what a batch holds, and by the directories there are; never by what a field
claims. Nothing loops: a chain or a tree is followed no further than the file system is large.

Offsets are bytes from the file system's first byte. Numbers of inodes are those that people use
(`ls -i`): of NTFS the MFT record's number without its sequence number; where there are none, as in
FAT, the offset of the directory entry.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np

from planner.arrays import I64, U8, Mask

NO_INODE = -1
"""In a column of inodes: of the file system itself."""


class What(IntEnum):
    """What a range of a file system holds."""

    DATA = 0
    """Of a file that is no directory: its bytes, a symbolic link's target, extended attributes."""
    DIRECTORY = 1
    INODE_TABLE = 2
    """Records of files, and the blocks that say where the data of a file lies: with an inode, of
    that file alone."""
    BITMAP = 3
    """What is free and what is not: bitmaps, trees of free space, a FAT."""
    JOURNAL = 4
    SUPERBLOCK = 5
    """Superblocks, group descriptors, boot sectors; backups too."""
    FREE = 6
    UNKNOWN = 7


@dataclass(frozen=True, slots=True)
class Extents:
    """What lies where, one row an extent, in any order, of any number of files.

    ``inode``: int64, `NO_INODE` where it is the file system's own. ``file_offset``: of the first
    byte within the file, 0 where it has none. ``start``, ``length``: bytes, int64, on the disk.
    ``what``: uint8, see `What`. Nothing is said of holes of a file. Two files can have the same
    bytes. What reaches past the end of the file system is cut.
    """

    inode: I64
    file_offset: I64
    start: I64
    length: I64
    what: U8

    def __len__(self) -> int:
        return len(self.start)

    def select(self, which: Mask | I64) -> Extents:
        """Some of the rows."""
        return Extents(
            self.inode[which],
            self.file_offset[which],
            self.start[which],
            self.length[which],
            self.what[which],
        )


def own_extents(what: What, start: I64, length: I64) -> Extents:
    """Extents of the file system itself, all of one sort."""
    count = len(start)
    return Extents(
        np.full(count, NO_INODE, dtype=np.int64),
        np.zeros(count, dtype=np.int64),
        start.astype(np.int64),
        length.astype(np.int64),
        np.full(count, what, dtype=np.uint8),
    )


@dataclass(frozen=True, slots=True)
class Spans:
    """Ranges of bytes: ``start`` and ``length``, int64, ascending."""

    start: I64
    length: I64

    def __len__(self) -> int:
        return len(self.start)


@dataclass(frozen=True, slots=True)
class Names:
    """Entries of directories, one row an entry; ``.`` and ``..`` are left out.

    ``parent``, ``child``: int64, inodes of the directory and of what it names. ``is_directory``:
    whether that is one. The name of row i is ``length[i]`` bytes of ``raw`` (uint8) from
    ``start[i]`` on, in ``encoding``; taken out, with `name`, for the few rows that are wanted.
    """

    parent: I64
    child: I64
    is_directory: Mask
    raw: U8
    start: I64
    length: I64
    encoding: str = "utf-8"

    def __len__(self) -> int:
        return len(self.child)

    def name(self, row: int) -> bytes:
        """The name as UTF-8, or as the bytes that it is: it is not to be trusted."""
        start = int(self.start[row])
        stored = self.raw[start : start + int(self.length[row])].tobytes()
        if self.encoding == "utf-8":
            return stored
        return stored.decode(self.encoding, "surrogatepass").encode("utf-8", "surrogatepass")


class FileSystem(Protocol):
    """One file system, found on a source that it is read from again with each question."""

    @property
    def kind(self) -> str:
        """As blkid says it: ext2, ext3, ext4, xfs, btrfs, ntfs, vfat, exfat."""

    @property
    def label(self) -> str:
        """As stored, not to be trusted; "" where there is none."""

    @property
    def uuid(self) -> str:
        """As blkid writes it; "" where there is none."""

    @property
    def block_size(self) -> int: ...

    @property
    def size(self) -> int:
        """Of the whole, in bytes: as the file system says, cut at the end of the source."""

    @property
    def root(self) -> int:
        """The inode of ``/``."""

    @property
    def notes(self) -> Sequence[str]:
        """What could not be read and what that means, one sentence each, without a full stop.

        All of it once the walks are over; their number does not grow with that of what is damaged.
        """

    def extents(self) -> Iterator[Extents]:
        """All there is but what is free: data of all files, deleted ones that still have their
        blocks too, and the file system's own. Batches of some 100,000 rows at most."""

    def free(self) -> Iterator[Spans]:
        """What the file system has not given to anybody, as far as its bitmaps can be read."""

    def names(self) -> Iterator[Names]:
        """The entries of all directories that can be read, found through their inodes, not
        through their parents: so that one that is lost loses only its own."""

    def records(self, start: I64, length: I64) -> Extents:
        """The records of files in use that the ranges touch, ``what`` being `What.INODE_TABLE`.

        Known to be in use by the inode bitmap where the record itself is lost. Ranges ascend and
        do not overlap; a record that two of them touch is one row.
        """

    def unlinked(self, inode: I64) -> Mask:
        """Which of these have no name any more and are still allocated: deleted while open."""
