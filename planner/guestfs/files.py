"""Whose bytes damaged ranges of a disk hold: rows of volume, file system, inode, path, and what.

What the answer is made of; how it is found is `planner.guestfs.search`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

from planner.arrays import I32, I64, U8, Mask
from planner.guestfs.paths import Paths
from planner.guestfs.protocol import NO_INODE, What

if TYPE_CHECKING:  # every file system
    from planner.guestfs.volumes.find import Layout, Volume

MAX_HITS = 1 << 20
"""Rows that are kept; of more it is only said that there are more."""

ROWS_AT_ONCE = 1 << 12

NO_VOLUME = -1
NOT_COUNTED = -1
NO_OFFSET = -1


@dataclass(frozen=True, slots=True)
class Damage:
    """Ranges of a disk that something is wrong with: ``start``, ``end`` (exclusive), int64.

    Ascending and disjoint. ``harm``: what, uint8, whoever asks knows. ``unreadable``: those whose
    bytes are not to be believed; ``doubtful``: of these those that may be right all the same.
    """

    start: I64
    end: I64
    harm: U8
    unreadable: Mask
    doubtful: Mask

    def __len__(self) -> int:
        return len(self.start)


@dataclass(frozen=True, slots=True)
class Hits:
    """Pieces of damaged ranges in columns, one row a file that has them, by ``start``.

    ``start``, ``length``: on the disk. ``volume``: which one, or `NO_VOLUME`. ``inode``: or
    `NO_INODE`; ``file_offset``: or `NO_OFFSET`. ``behind``: of a piece of an inode table how many
    files have their records there, or `NOT_COUNTED`. The rest as of `Extents` and `Damage`.
    """

    harm: U8
    start: I64
    length: I64
    volume: I32
    inode: I64
    file_offset: I64
    what: U8
    behind: I64

    def __len__(self) -> int:
        return len(self.start)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the answer. ``path``: as bytes, not to be trusted; None where there is none."""

    harm: int
    start: int
    length: int
    volume: Volume | None
    inode: int | None
    path: bytes | None
    file_offset: int | None
    what: What
    behind: int | None


@dataclass(frozen=True, slots=True)
class FilesUnknown:
    """That nobody can say which files are hit, and why: a sentence without a full stop."""

    reason: str


@dataclass(frozen=True, slots=True)
class HitFiles:
    """All that is known of what damage hits: ``hits``, and the layout of the disk.

    ``notes``: what could not be read, and what that means, sentences. ``more``: whether there are
    more hits than are kept. By the volume's number, ``paths``: of the inodes that are hit;
    ``deleted``: those of them that have none any more.
    """

    layout: Layout
    hits: Hits
    notes: list[str]
    more: bool
    paths: dict[int, Paths] = field(default_factory=dict)
    deleted: dict[int, frozenset[int]] = field(default_factory=dict)

    def with_note(self, note: str) -> HitFiles:
        """The same, with one more thing to be said first."""
        return replace(self, notes=[note, *self.notes])

    def rows(self) -> Iterator[Row]:
        """By guest offset; a file with several names is a row for each."""
        for at in range(0, len(self.hits), ROWS_AT_ONCE):
            yield from self._rows(slice(at, at + ROWS_AT_ONCE))

    def _rows(self, part: slice) -> Iterator[Row]:
        columns = (getattr(self.hits, each.name)[part].tolist() for each in fields(Hits))
        for harm, start, length, volume, inode, offset, what, behind in zip(*columns, strict=True):
            for path in self.names(volume, inode) if inode != NO_INODE else (None,):
                yield Row(
                    harm,
                    start,
                    length,
                    self.layout.volumes[volume] if volume != NO_VOLUME else None,
                    inode if inode != NO_INODE else None,
                    path,
                    offset if offset != NO_OFFSET else None,
                    What(what),
                    behind if behind != NOT_COUNTED else None,
                )

    def names(self, volume: int, inode: int) -> list[bytes]:
        """The paths of a file that is hit, or ``#`` and its number where nothing names it."""
        deleted = b" (deleted)" if inode in self.deleted[volume] else b""
        return self.paths[volume].of(inode) or [b"#%d" % inode + deleted]
