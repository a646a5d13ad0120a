"""What blocks say of themselves, wherever they lie: claims, in columns.

Collected in one pass over the clusters of the file, before it is known which table maps which of
them: of a block little more is kept than its own name. What a claim is worth is weighed by the
module of its file system.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache

import numpy as np
import numpy.typing as npt

from planner.arrays import I64, U8, Mask, is_among
from planner.guestfs.columns import little
from planner.rescue.placing.grid import Grid
from planner.source import SECTOR

MAX_CLAIMS = 1 << 22
"""That are kept of one image: some 150 MB. More metadata needs no more of it to be placed."""

A_PIECE = 64
"""Claims of one sort that are kept of a cluster, or of a piece of one that is large."""


class Sort(IntEnum):
    """What claims; in brackets what ``key`` and ``aux`` are."""

    XFS_BLOCK = 0
    """A block of XFS version 5 (its address in sectors, the first half of the UUID)."""
    XFS_INODE = 1
    """A record of XFS version 5 (its number, as above)."""
    XFS_GROUP = 2
    """The header of an allocation group (the group's number times 4 plus the sector, as above)."""
    XFS_SUPER = 3
    """A superblock (0, as above)."""
    EXT_SUPER = 4
    """A superblock of ext2/3/4 (its group, the first half of the UUID)."""
    EXT_BLOCK = 5
    """A block that ends in a checksum (what that was begun with, the size of the block)."""
    EXT_INODE = 6
    """A record with a checksum (its number, xor what the file system begins with; what the
    checksums of its blocks begin with)."""
    EXT_DIRECTORY = 7
    """The first block of a directory (the number of its inode, 0)."""
    EXT_JOURNAL = 8
    """A block of a journal's own (its sort, its number in sequence)."""
    NTFS_RECORD = 9
    """A file's record (its number, its size)."""
    NTFS_INDEX = 10
    """A block of a directory (the directory's number, which block of it)."""
    NTFS_BOOT = 11
    """A boot sector (sectors of the volume, sectors before it)."""
    NTFS_LOG = 17
    """A page with which the log begins (0, 0)."""
    FAT_BOOT = 12
    """A boot sector of FAT or exFAT (0, sectors before it)."""
    FAT_DIRECTORY = 13
    """The first cluster of a directory (its number, that of the directory above)."""
    GPT = 14
    """The header of a partition table (the sector that it is in, the one that its copy is in)."""
    BOOT = 15
    """A sector with the mark of a boot sector at the beginning of a cluster (0, 0)."""
    XFS_LOG = 19
    """A record of the log (in which sector of the log it is, the first half of the UUID)."""
    END = 18
    """A sector whose rest is zeros (how much of it is filled, 0)."""
    LVM = 16
    """A label of a physical volume (the sector that it is in, 0)."""


@dataclass(frozen=True, slots=True, eq=False)
class Claims:
    """One row a claim. ``place``: of the block in the file, bytes; ``key``, ``aux``: see `Sort`.

    Once it is known which table leads there: ``table``, and how far into its window (``inside``,
    bytes).
    """

    sort: U8
    place: I64
    key: I64
    aux: I64
    table: I64
    inside: I64

    def __len__(self) -> int:
        return len(self.sort)

    def select(self, which: Mask | I64) -> Claims:
        """Some of the rows."""
        return Claims(
            self.sort[which],
            self.place[which],
            self.key[which],
            self.aux[which],
            self.table[which],
            self.inside[which],
        )

    def of(self, *sorts: Sort) -> Claims:
        """The rows of those sorts."""
        return self.select(np.isin(self.sort, sorts))


Spotted = tuple[Sort, I64, I64, I64]
"""A sort; and of each block the place in the bytes, key and aux."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some clusters, or parts of ``cluster_size`` of large ones, one behind the other: ``flat`` has
    their bytes."""

    flat: U8
    cluster_size: int
    _columns: dict[tuple[int, int], npt.NDArray[np.uint16]] = field(default_factory=dict)

    def marked(self, magic: bytes, offset: int, step: int = SECTOR) -> I64:
        """Where in the bytes the pieces of *step* bytes begin that have *magic* at *offset*.

        Of that, which is even, two bytes tell nearly all of them apart from data.
        """
        if step > self.cluster_size:
            return np.zeros(0, dtype=np.int64)
        first, pair = _telling_pair(magic)
        # Not by np.flatnonzero, which takes as long again: this is asked for each magic.
        at: I64 = (self._column(offset + first, step) == pair).nonzero()[0]
        if not len(at):
            return at
        at *= step
        for number, byte in enumerate(magic):
            at = at[self.flat[at + offset + number] == byte]
        return at

    def _column(self, offset: int, step: int) -> npt.NDArray[np.uint16]:
        """The two bytes at *offset* of each piece of *step*: many magics stand at the same one."""
        column = self._columns.get((offset, step))
        if column is None:
            column = np.ascontiguousarray(self.flat.view("<u2")[offset // 2 :: step // 2])
            self._columns[offset, step] = column
        return column


@cache
def _telling_pair(magic: bytes) -> tuple[int, int]:
    """Two bytes of *magic* of which the fewest are zeros: where in it, and as a number."""
    pairs = range(0, len(magic) - 1, 2)
    first = max(pairs, key=lambda at: len(magic[at : at + 2].replace(b"\0", b"")))
    return first, int.from_bytes(magic[first : first + 2], "little")


Spotter = Callable[[Piece], Iterable[Spotted]]


class Collector:
    """Collects the claims that *spotters* find; of many what a piece of a cluster has first."""

    def __init__(self, spotters: Iterable[Spotter], cluster_bits: int) -> None:
        self._spotters, self._bits = tuple(spotters), cluster_bits
        self._parts: list[tuple[U8, I64, I64, I64]] = []
        self._count = 0

    @property
    def parts(self) -> int:
        """How many parts there are by now, for `since`."""
        return len(self._parts)

    def since(self, parts: int) -> tuple[I64, I64, I64]:
        """Of what came after so many *parts*: the places that claim something, and of sectors that
        end in zeros the places, and how much of each is filled.
        """
        none = np.zeros(0, dtype=np.int64)
        new = self._parts[parts:]
        others = [place for sort, place, _, _ in new if len(sort) and sort[0] != Sort.END]
        ends = [(place, key) for sort, place, key, _ in new if len(sort) and sort[0] == Sort.END]
        place, key = zip(*ends, strict=True) if ends else ((), ())
        return (
            np.concatenate((none, *others)),
            np.concatenate((none, *place)),
            np.concatenate((none, *key)),
        )

    def others(self) -> list[tuple[U8, I64, I64, I64]]:
        """All but sectors that end in zeros: sort, place, key and aux, some at a time."""
        return [part for part in self._parts if len(part[0]) and part[0][0] != Sort.END]

    def add(self, sort: U8, place: I64, key: I64, aux: I64) -> None:
        """What another has collected, by `others`."""
        self._parts.append((sort, place, key, aux))
        self._count += len(place)

    def add_ends(self, place: I64, filled: I64) -> None:
        """Sectors that end in zeros, as `since` told them."""
        sort = np.full(len(place), Sort.END, dtype=np.uint8)
        self.add(sort, place, filled, np.zeros_like(place))

    def look(self, pieces: I64, rows: U8) -> None:
        """Collect from some *pieces* of clusters, of which these are the offsets in the file."""
        if self._count >= MAX_CLAIMS:
            return
        piece = Piece(np.ascontiguousarray(rows).reshape(-1), rows.shape[1])
        for spot in self._spotters:
            for sort, at, key, aux in spot(piece):
                kept = _first_of_each(at // rows.shape[1])
                self._keep(sort, pieces, rows.shape[1], (at[kept], key[kept], aux[kept]))

    def _keep(self, sort: Sort, pieces: I64, size: int, found: tuple[I64, I64, I64]) -> None:
        at, key, aux = found
        place = pieces[at // size] + at % size
        self._parts.append((np.full(len(at), sort, dtype=np.uint8), place, key, aux))
        self._count += len(at)

    def claims(self, grid: Grid, tables: I64) -> Claims:
        """All of them that one of *tables* leads to, by table and place."""
        none = np.zeros(0, dtype=np.int64)
        sort: U8 = np.concatenate([none.astype(np.uint8), *(part[0] for part in self._parts)])
        place, key, aux = (
            np.concatenate([none, *(part[number] for part in self._parts)]) for number in (1, 2, 3)
        )
        filled = grid.filled(tables)
        leads = np.argsort(filled.cluster, kind="stable")
        cluster = filled.cluster[leads]
        row = np.flatnonzero(is_among(place >> self._bits, cluster))
        of = leads[np.searchsorted(cluster, place[row] >> self._bits)]
        table, entry = tables[filled.table[of]], filled.entry[of]
        inside = (entry << self._bits) + (place[row] & ((1 << self._bits) - 1))
        order = np.lexsort((inside, table))
        row = row[order]
        return Claims(sort[row], place[row], key[row], aux[row], table[order], inside[order])


def _first_of_each(piece: I64) -> I64:
    """Rows of no more than `A_PIECE` of each *piece*."""
    if len(piece) <= A_PIECE:
        return np.arange(len(piece))
    order = np.argsort(piece, kind="stable")
    ordered = piece[order]
    rank = np.arange(len(piece)) - np.searchsorted(ordered, ordered)
    return order[rank < A_PIECE]


def uuid_half(flat: U8, at: I64) -> I64:
    """The first half of the UUIDs at *at*: enough to tell file systems from each other."""
    return little(flat, at, 8)
