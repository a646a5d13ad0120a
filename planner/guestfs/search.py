"""The search for the files that damage hits.

One walk over each file system. Its extents are laid over the damaged ranges, which are few and in
order, and only what touches is kept; then the names of those inodes are found in one more walk. So
memory is bounded by what is hit, up to `MAX_HITS`, and by the directories there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np

from planner.arrays import I32, I64, U8, Mask, distinct, join_ranges
from planner.guestfs.files import (
    MAX_HITS,
    NO_OFFSET,
    NO_VOLUME,
    NOT_COUNTED,
    Damage,
    HitFiles,
    Hits,
)
from planner.guestfs.overlaps import Rest, overlaps
from planner.guestfs.paths import Paths
from planner.guestfs.protocol import NO_INODE, Extents, FileSystem, What
from planner.guestfs.reading import NO_RANGES
from planner.guestfs.volumes.find import Layout, find_volumes
from planner.guestfs.work import Work, WorkSpent
from planner.progress import Progress, tell_nobody
from planner.source import Source

T = TypeVar("T")

BELIEVED = (
    "no file system can be seen without what is suspect: that was read, and what hangs on it may"
    " be wrong"
)


def find_files(
    source: Source,
    damage: Damage,
    *,
    unread: tuple[I64, I64] = (NO_RANGES, NO_RANGES),
    work: Work | None = None,
    progress: Progress = tell_nobody,
) -> HitFiles:
    """What of the disk *source* is hit by *damage*. Raises what *progress* raises.

    *unread*: starts and ends of what else is not read, though nothing is wrong with it. *work*:
    what *source* takes from, too; where nothing is left, a note says that the rest is not known.
    *progress* is told how many volumes were looked at.
    """
    work = work or Work()
    if not len(damage):
        return HitFiles(Layout([], [], []), _Kept(damage).hits()[0], [], more=False)
    layout = _layout(source, damage, unread, work)
    search = _Search(damage, layout, work, progress)
    for number in range(len(layout.volumes)):
        search.volume(number)
    search.outside()
    return search.result()


def _layout(source: Source, damage: Damage, unread: tuple[I64, I64], work: Work) -> Layout:
    """The volumes; what is doubtful is read only where without it there is no file system."""

    def read_without(bad: Mask) -> Layout:
        start = np.concatenate((damage.start[bad], unread[0]))
        end = np.concatenate((damage.end[bad], unread[1]))
        return find_volumes(source, *join_ranges(start, end), work)

    layout = read_without(damage.unreadable)
    if damage.doubtful.any() and not _has_any(layout):
        believing = read_without(damage.unreadable & ~damage.doubtful)
        if _has_any(believing):
            believing.notes.insert(0, BELIEVED)
            return believing
    return layout


def _has_any(layout: Layout) -> bool:
    return any(each.filesystem is not None for each in layout.volumes)


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Damaged ranges as ranges of a volume, ascending, with the rows of `Damage` they are of."""

    volume: int
    start: I64
    end: I64
    disk: I64
    row: I64


class _Search:
    """The walks under way, and what they have found."""

    def __init__(self, damage: Damage, layout: Layout, work: Work, progress: Progress) -> None:
        self._damage, self._layout, self._progress = damage, layout, progress
        self._work = work
        self._done = 0
        self._kept = _Kept(damage)
        self._outside = Rest(damage.start, damage.end)
        self._paths: dict[int, Paths] = {}
        self._deleted: dict[int, frozenset[int]] = {}
        self._notes = list(layout.notes)

    def _watched(self, batches: Iterable[T]) -> Iterator[T]:
        for batch in batches:
            self._work.extents(0)
            self._progress("files", self._done, len(self._layout.volumes))
            yield batch

    def result(self) -> HitFiles:
        """All that was found."""
        hits, more = self._kept.hits()
        return HitFiles(
            self._layout,
            hits,
            self._notes,
            more=more,
            paths=self._paths,
            deleted=self._deleted,
        )

    def outside(self) -> None:
        """What is hit and belongs to no volume."""
        start, end = self._outside.left()
        own = sorted(self._layout.own)
        own_start = np.array([at for at, _ in own], dtype=np.int64)
        own_end = np.array([at + length for at, length in own], dtype=np.int64)
        own_start, own_end = join_ranges(own_start, own_end)
        disk = _Pieces(
            NO_VOLUME,
            self._damage.start,
            self._damage.end,
            self._damage.start,
            np.arange(len(self._damage)),
        )
        rest = Rest(start, end)
        tables = overlaps(start, end, own_start, own_end)
        rest.take(tables.start, tables.end)
        self._kept.spans(disk, tables.start, tables.end, What.SUPERBLOCK)
        self._kept.spans(disk, *rest.left(), What.UNKNOWN)

    def volume(self, number: int) -> None:
        """What is hit in one volume."""
        self._done = number
        volume = self._layout.volumes[number]
        try:
            self._work.volume(len(self._damage))
        except WorkSpent:
            return  # whose the rest is is not known; it is said by then
        found = volume.pieces(self._damage.start, self._damage.end)
        if not len(found.start):
            return
        self._outside.take(found.disk, found.disk + found.length)
        pieces = _Pieces(number, found.start, found.start + found.length, found.disk, found.row)
        notes = list(volume.notes)
        rest = Rest(pieces.start, pieces.end)
        if volume.filesystem is not None:
            try:
                self._filesystem(volume.filesystem, pieces, rest)
            except WorkSpent as spent:
                notes.append(str(spent))
            notes += volume.filesystem.notes
        self._kept.spans(pieces, *rest.left(), What.UNKNOWN)
        self._notes += (f"{volume.name}: {note}" for note in notes)

    def _filesystem(self, filesystem: FileSystem, pieces: _Pieces, rest: Rest) -> None:
        tables = _Tables()
        inodes: list[I64] = []
        self._paths[pieces.volume] = Paths((), NO_RANGES, filesystem.root)
        self._deleted[pieces.volume] = frozenset()
        for extents in self._watched(filesystem.extents()):
            self._work.extents(len(extents))
            over = overlaps(extents.start, extents.start + extents.length, pieces.start, pieces.end)
            if not len(over):
                continue
            rest.take(over.start, over.end)
            hit = extents.select(over.row)
            inodes.append(distinct(hit.inode))
            is_table = (hit.what == What.INODE_TABLE) & (hit.inode == NO_INODE)
            tables.add(over.start[is_table], over.end[is_table])
            others = ~is_table
            offset = np.where(
                hit.inode == NO_INODE, NO_OFFSET, hit.file_offset + over.start - hit.start
            )
            self._kept.add(
                pieces, over.of[others], over.start[others], over.end[others],
                inode=hit.inode[others], offset=offset[others], what=hit.what[others],
            )  # fmt: skip
        self._free(filesystem, pieces, rest)
        table_start, table_end = tables.joined()
        records = filesystem.records(table_start, table_end - table_start)
        wanted = distinct(np.concatenate([*inodes, records.inode]))
        wanted = wanted[wanted != NO_INODE]
        names = filesystem.names() if len(wanted) else ()
        paths = Paths(self._watched(names), wanted, filesystem.root)
        self._paths[pieces.volume] = paths
        # Where nobody knows whether a record was in use, a name shows that it was.
        in_use = (records.what == What.INODE_TABLE) | paths.have(records.inode)
        self._records(records.select(in_use), table_start, table_end, pieces)
        nameless = wanted[~paths.have(wanted)]
        self._deleted[pieces.volume] = frozenset(nameless[filesystem.unlinked(nameless)].tolist())

    def _free(self, filesystem: FileSystem, pieces: _Pieces, rest: Rest) -> None:
        left_start, left_end = rest.left()
        if not len(left_start):
            return
        for spans in self._watched(filesystem.free()):
            free = overlaps(spans.start, spans.start + spans.length, left_start, left_end)
            rest.take(free.start, free.end)
            self._kept.spans(pieces, free.start, free.end, What.FREE)

    def _records(self, records: Extents, start: I64, end: I64, pieces: _Pieces) -> None:
        """Pieces of the inode table from *start* to *end*, and the files behind them."""
        each = overlaps(start, end, pieces.start, pieces.end)
        behind = overlaps(records.start, records.start + records.length, pieces.start, pieces.end)
        count = np.bincount(behind.of, minlength=len(pieces.start)).astype(np.int64)
        self._kept.add(
            pieces, each.of, each.start, each.end,
            what=np.full(len(each), What.INODE_TABLE, dtype=np.uint8), behind=count[each.of],
        )  # fmt: skip
        self._kept.add(
            pieces, behind.of, behind.start, behind.end,
            inode=records.inode[behind.row],
            what=np.full(len(behind), What.INODE_TABLE, dtype=np.uint8),
        )  # fmt: skip


_TYPES: dict[str, type[np.integer[Any]]] = {each.name: np.int64 for each in fields(Hits)} | {
    "harm": np.uint8,
    "what": np.uint8,
    "volume": np.int32,
}
"""Of the columns, where there is no row to tell."""


class _Tables:
    """Pieces of inode tables that are hit."""

    def __init__(self) -> None:
        self._parts: list[tuple[I64, I64]] = []

    def add(self, start: I64, end: I64) -> None:
        if len(start):
            self._parts.append((start, end))

    def joined(self) -> tuple[I64, I64]:
        """Ascending and disjoint."""
        nothing = np.zeros(0, dtype=np.int64)
        start = np.concatenate([nothing, *(each[0] for each in self._parts)])
        end = np.concatenate([nothing, *(each[1] for each in self._parts)])
        return join_ranges(start, end)


class _Kept:
    """Hits in columns, `MAX_HITS` of them at most."""

    def __init__(self, damage: Damage) -> None:
        self._damage = damage
        self._parts: list[Hits] = []
        self._room, self._more = MAX_HITS, False

    def spans(self, pieces: _Pieces, start: I64, end: I64, what: What) -> None:
        """Ranges of a volume that are no file's, wherever they are in *pieces*."""
        over = overlaps(start, end, pieces.start, pieces.end)
        self.add(
            pieces, over.of, over.start, over.end, what=np.full(len(over), what, dtype=np.uint8)
        )

    def add(
        self,
        pieces: _Pieces,
        of: I64,
        start: I64,
        end: I64,
        *,
        what: U8,
        inode: I64 | None = None,
        offset: I64 | None = None,
        behind: I64 | None = None,
    ) -> None:
        """Ranges of a volume, each within the piece *of*."""
        count = min(len(of), self._room)
        self._more |= count < len(of)
        self._room -= count
        if not count:
            return
        of = of[:count]
        row = pieces.row[of]

        def column(values: I64 | None, otherwise: int) -> I64:
            return np.full(count, otherwise, dtype=np.int64) if values is None else values[:count]

        volume: I32 = np.full(count, pieces.volume, dtype=np.int32)
        self._parts.append(
            Hits(
                self._damage.harm[row],
                pieces.disk[of] + start[:count] - pieces.start[of],
                (end - start)[:count],
                volume,
                column(inode, NO_INODE),
                column(offset, NO_OFFSET),
                what[:count],
                column(behind, NOT_COUNTED),
            )
        )

    def hits(self) -> tuple[Hits, bool]:
        """All of them by place on the disk, and whether there were more."""
        columns = {
            each.name: np.concatenate(
                [
                    np.zeros(0, dtype=_TYPES[each.name]),
                    *(getattr(part, each.name) for part in self._parts),
                ]
            )
            for each in fields(Hits)
        }
        self._parts.clear()
        order: I64 = np.lexsort((columns["inode"], columns["start"]))
        return Hits(**{name: column[order] for name, column in columns.items()}), self._more
