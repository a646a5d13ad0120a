"""NTFS as one file system of the protocol.

An alternate stream of a file is shown as a file of its own, ``name:stream``. Its number is that of
the file's record and, above `NUMBER_BITS`, one that the stream's name gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from planner.arrays import I64, U8, Mask, distinct, is_among
from planner.guestfs.columns import little
from planner.guestfs.ntfs.attributes import (
    ATTRIBUTE_LIST,
    BITMAP,
    DATA,
    FIRST_FILE,
    IN_USE,
    INDEX_ALLOCATION,
    MFT,
    NUMBER,
    ROOT,
    attributes_of,
    runs_of,
    values_of,
)
from planner.guestfs.ntfs.boot import Boot, find_boot
from planner.guestfs.ntfs.naming import Naming, Survey, survey
from planner.guestfs.ntfs.streams import inodes_of
from planner.guestfs.ntfs.table import Pieces, Table
from planner.guestfs.protocol import NO_INODE, Extents, Names, Spans, What, own_extents
from planner.guestfs.reading import Holes, read_blocks

MIRROR, LOG, VOLUME, BITMAP_FILE, BAD_CLUSTERS = 1, 2, 3, 6, 8
"""Numbers of records, as `MFT` and `ROOT` are."""

OWN = {
    MFT: What.INODE_TABLE,
    MIRROR: What.INODE_TABLE,
    LOG: What.JOURNAL,
    BITMAP_FILE: What.BITMAP,
    BAD_CLUSTERS: What.UNKNOWN,
}
"""What the data of its own files is, where it is not `What.SUPERBLOCK`."""

VOLUME_NAME = 0x60
BITMAP_BYTES_AT_A_TIME = 1 << 17


def recognise(source: Holes) -> Ntfs | None:
    """An NTFS that *source* holds, by its boot sector or the copy of that."""
    boot = find_boot(source)
    return Ntfs(source, boot) if boot else None


class Ntfs:
    """See `planner.guestfs.protocol.FileSystem`."""

    kind = "ntfs"
    root = ROOT

    def __init__(self, source: Holes, boot: Boot) -> None:
        self._source, self._boot = source, boot
        self._table = Table(source, boot)
        self.boot, self.table, self.source = boot, self._table, source
        self._broken_records = self._broken_runs = 0
        self._known_survey: Survey | None = None
        self.uuid = f"{boot.serial:016X}"
        self.block_size, self.size = boot.cluster_size, boot.size
        self.label = self._volume_name()

    def _volume_name(self) -> str:
        records, _ = self._table.read(np.array([VOLUME], dtype=np.int64))
        attributes = attributes_of(records)
        some = attributes.select((attributes.type == VOLUME_NAME) & ~attributes.is_outside)
        if not len(some):
            return ""
        start, length = values_of(records.flat, some)
        raw = records.flat[int(start[0]) : int(start[0] + length[0] // 2 * 2)].tobytes()
        return raw.decode("utf-16-le", "replace")

    @property
    def notes(self) -> list[str]:
        boot, table, notes = self._boot, self._table, []
        if boot.offset:
            notes.append(f"its boot sector cannot be read; the copy at {boot.offset} was used")
        if boot.claimed_size > boot.size + 512:
            notes.append(f"the last {boot.claimed_size - boot.size} bytes of it are not there")
        if table.from_mirror:
            notes.append("the first record of its MFT cannot be read; the copy was used")
        if table.is_guessed:
            notes.append(
                "the first record of its MFT cannot be read, nor its copy: only the first piece of"
                " the MFT is known"
            )
        for count, what in (
            (self._broken_records, "records of its MFT make no sense: their files are not known"),
            (self._broken_runs, "lists of runs make no sense from some point on"),
        ):
            if count:
                notes.append(f"{count} {what}")
        return notes

    # ---- what lies where ----

    def extents(self) -> Iterator[Extents]:
        boot = self._boot
        # The copy of the boot sector is in no file.
        end = boot.clusters * boot.cluster_size
        if boot.size > end:
            start, length = (np.array([each], dtype=np.int64) for each in (end, boot.size - end))
            yield own_extents(What.SUPERBLOCK, start, length)
        broken, broken_runs = list[I64](), 0
        for records in self._table.walk(broken):
            attributes = attributes_of(records)
            attributes = attributes.select(self._table.belongs(records)[attributes.row])
            outside = attributes.select(attributes.is_outside)
            runs, count = runs_of(records.flat, outside, boot.clusters)
            broken_runs += count
            inode = inodes_of(records, outside)[runs.attribute]
            kind = outside.type[runs.attribute]
            file_offset = np.where(
                (kind == DATA) | (kind == INDEX_ALLOCATION), runs.virtual * boot.cluster_size, 0
            )
            if len(inode):
                yield _with_own(
                    Extents(
                        inode,
                        file_offset,
                        runs.cluster * boot.cluster_size,
                        runs.length * boot.cluster_size,
                        _what(kind),
                    ),
                    kind,
                )
        self._broken_records, self._broken_runs = sum(map(len, broken)), broken_runs

    def free(self) -> Iterator[Spans]:
        boot = self._boot
        records, _ = self._table.read(np.array([BITMAP_FILE], dtype=np.int64))
        attributes = attributes_of(records)
        wanted = (attributes.type == DATA) & attributes.is_outside & (attributes.name_length == 0)
        runs, _ = runs_of(records.flat, attributes.select(wanted), boot.clusters)
        pieces = Pieces.of(runs, boot.cluster_size).limited(boot.size)
        size, end = boot.cluster_size, min(pieces.end, -(-boot.clusters // 8))
        step = max(1, BITMAP_BYTES_AT_A_TIME // size) * size
        for at in range(0, end, step):
            offset = np.arange(at, min(at + step, end), size, dtype=np.int64)
            place = pieces.places(offset)
            known = place >= 0
            raw = np.full((len(offset), size), 0xFF, dtype=np.uint8)
            raw[known] = read_blocks(self._source, place[known], size)
            raw[self._source.are_holes(np.maximum(place, 0), size)] = 0xFF
            bits = np.unpackbits(raw.reshape(-1), bitorder="little")[: boot.clusters - at * 8]
            step_of = np.diff(np.concatenate(([0], bits == 0, [0])).astype(np.int8))
            start, stop = np.flatnonzero(step_of == 1), np.flatnonzero(step_of == -1)
            if len(start):
                yield Spans((start + at * 8) * size, (stop - start) * size)

    def sizes(self) -> Iterator[tuple[I64, I64]]:
        """Numbers of files, and how many bytes each has; of those outside of their records."""
        for records in self._table.walk():
            attributes = attributes_of(records)
            wanted = (attributes.type == DATA) & attributes.is_outside
            some = attributes.select(wanted & self._table.belongs(records)[attributes.row])
            # The first part of each says how long all of it is; none that is compressed or sparse.
            plain = little(records.flat, some.at + 12, 2) == 0
            some = some.select(plain & (little(records.flat, some.at + 16, 8) == 0))
            yield inodes_of(records, some), little(records.flat, some.at + 48, 8)

    def former_ends(self) -> I64:
        """Where files ended that were deleted, behind their last byte, as far as records of them
        are left; other files may have those clusters now."""
        size, found = self._boot.cluster_size, [np.zeros(0, dtype=np.int64)]
        for records in self._table.walk():
            is_gone = (records.flags & IN_USE == 0) & (records.base == 0)
            as_it_was = replace(records, flags=np.where(is_gone, IN_USE, 0))
            attributes = attributes_of(as_it_was)
            wanted = (attributes.type == DATA) & attributes.is_outside
            wanted &= little(records.flat, attributes.at + 12, 2) == 0
            some = attributes.select(wanted)
            runs, _ = runs_of(records.flat, some, self._boot.clusters)
            left = little(records.flat, some.at + 48, 8)[runs.attribute] - runs.virtual * size
            last = (left > 0) & (left <= runs.length * size)
            found.append((runs.cluster * size + left)[last])
        return np.concatenate(found)

    # ---- names ----

    def names(self) -> Iterator[Names]:
        return iter(Naming(self._source, self._boot, self._table, self._survey))

    def _survey(self) -> Survey:
        if self._known_survey is None:
            self._known_survey = survey(self._source, self._boot, self._table)
        return self._known_survey

    # ---- records ----

    def records(self, start: I64, length: I64) -> Extents:
        table, size = self._table, self._boot.record_size
        number = table.records_at(start, length)
        number = number[(number >= FIRST_FILE) | (number == ROOT)]
        found, rows = table.read(number)
        in_use, known = table.in_use(number)
        in_use |= ~known
        in_use[rows], known[rows] = (found.flags & IN_USE) != 0, True
        inode = number.copy()
        if len(rows) < len(number):
            left = self._survey()
            inode = left.goes_on.bases_of(number)
            known |= inode != number
            # What goes on a record that is lost too is in use, and no file.
            if left.is_whole:
                lost = (inode == number) & ~is_among(number, left.named)
                lost[rows] = False
                known &= ~lost
        inode[rows] = np.where(found.base > 0, found.base, found.number)
        place = table.pieces.places(number * size)
        kept = in_use & (place >= 0)
        count = int(kept.sum())
        return Extents(
            inode[kept],
            np.zeros(count, dtype=np.int64),
            place[kept],
            np.full(count, size, dtype=np.int64),
            np.where(known[kept], What.INODE_TABLE, What.UNKNOWN).astype(np.uint8),
        )

    def unlinked(self, inode: I64) -> Mask:
        result = np.zeros(len(inode), dtype=np.bool_)
        number = distinct(inode[inode >= 0] & NUMBER)
        found, _ = self._table.read(number)
        gone = found.number[((found.flags & IN_USE) != 0) & (found.links == 0)]
        result[:] = np.isin(inode & NUMBER, gone) & (inode >= 0)
        return result


def _what(kind: I64) -> U8:
    what = np.full(len(kind), What.DATA, dtype=np.uint8)
    what[(kind == INDEX_ALLOCATION) | (kind == BITMAP)] = What.DIRECTORY
    what[kind == ATTRIBUTE_LIST] = What.INODE_TABLE
    return what


def _with_own(extents: Extents, kind: I64) -> Extents:
    """*extents*, those of the file system's own files as such. *kind*: of what attributes."""
    own = (extents.inode < FIRST_FILE) & (extents.inode != ROOT)
    if not own.any():
        return extents
    inode, what = extents.inode.copy(), extents.what.copy()
    number = inode[own]
    sort = np.full(len(number), What.SUPERBLOCK, dtype=np.uint8)
    for each, of_data in OWN.items():
        sort[number == each] = of_data
    sort[(number == MFT) & (kind[own] == BITMAP)] = What.BITMAP
    what[own], inode[own] = sort, NO_INODE
    return Extents(inode, extents.file_offset, extents.start, extents.length, what)
