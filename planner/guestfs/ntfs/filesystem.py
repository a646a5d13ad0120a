"""NTFS as one file system of the protocol.

An alternate stream of a file is shown as a file of its own, ``name:stream``. Its number is that of
the file's record and, above `NUMBER_BITS`, one that the stream's name gives.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from planner.arrays import I64, U8, Mask, distinct
from planner.guestfs.checksums import CRC16, crc
from planner.guestfs.columns import little
from planner.guestfs.ntfs.attributes import (
    ATTRIBUTE_LIST,
    BITMAP,
    DATA,
    FILE_NAME,
    IN_USE,
    INDEX_ALLOCATION,
    NUMBER,
    NUMBER_BITS,
    Attributes,
    Records,
    attributes_of,
    runs_of,
    values_of,
)
from planner.guestfs.ntfs.boot import Boot, find_boot
from planner.guestfs.ntfs.table import NONE, Pieces, Table
from planner.guestfs.protocol import NO_INODE, Extents, Names, Spans, What, own_extents
from planner.guestfs.reading import Holes, read_blocks

MFT, MIRROR, LOG, VOLUME, ROOT, BITMAP_FILE, BAD_CLUSTERS = 0, 1, 2, 3, 5, 6, 8
FIRST_FILE = 11
"""Records before it are of the file system itself, but for the root."""

OWN = {
    MFT: What.INODE_TABLE,
    MIRROR: What.INODE_TABLE,
    LOG: What.JOURNAL,
    BITMAP_FILE: What.BITMAP,
    BAD_CLUSTERS: What.UNKNOWN,
}
"""What the data of its own files is, where it is not `What.SUPERBLOCK`."""

VOLUME_NAME = 0x60
NAME_AT, DOS = 66, 2
"""Where in a `FILE_NAME` the name begins; the namespace of the names that are only for DOS."""

IS_DIRECTORY = 0x10000000
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
        self._broken_records = self._broken_runs = 0
        self._parent_uses = (NONE, NONE)
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
        broken, broken_runs = [0], 0
        for records in self._table.walk(broken):
            attributes = attributes_of(records)
            attributes = attributes.select(self._belongs(records)[attributes.row])
            outside = attributes.select(attributes.is_outside)
            runs, count = runs_of(records.flat, outside, boot.clusters)
            broken_runs += count
            inode = self._inodes(records, outside)[runs.attribute]
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
        self._broken_records, self._broken_runs = sum(broken), broken_runs

    def _inodes(self, records: Records, attributes: Attributes) -> I64:
        """Of each attribute the number of its file, or of its stream."""
        base = np.where(records.base > 0, records.base, records.number)[attributes.row]
        # The MFT's own records that go on have it as their base, whose number is 0.
        goes_on = (records.base == 0) & (records.base_use > 0)
        base[goes_on[attributes.row]] = MFT
        is_stream = (attributes.type == DATA) & (attributes.name_length > 0)
        at = np.flatnonzero(is_stream & ((base >= FIRST_FILE) | (base == ROOT)))
        return _with_streams(base, records.flat, attributes, at)

    def _belongs(self, records: Records) -> Mask:
        """Which records are a file's, or go on one that still says what they do."""
        belongs: Mask = (records.flags & IN_USE) != 0
        at = np.flatnonzero((records.base > 0) & belongs)
        if len(at):
            wanted = distinct(records.base[at])
            found, rows = self._table.read(wanted)
            place = np.searchsorted(wanted, records.base[at])
            use, in_use = np.full(len(wanted), -1, np.int64), np.ones(len(wanted), np.bool_)
            use[rows], in_use[rows] = found.use, (found.flags & IN_USE) != 0
            # Of a base that is lost nothing is known against it.
            belongs[at] = in_use[place] & ((use[place] == records.base_use[at]) | (use[place] < 0))
        return belongs

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

    # ---- names ----

    def names(self) -> Iterator[Names]:
        for records in self._table.walk():
            belongs = self._belongs(records)
            attributes = attributes_of(records)
            attributes = attributes.select(belongs[attributes.row])
            names = self._names_of(records, attributes)
            yield names
            yield from self._streams(records, attributes, names)

    def _names_of(self, records: Records, attributes: Attributes) -> Names:
        flat = records.flat
        some = attributes.select((attributes.type == FILE_NAME) & ~attributes.is_outside)
        start, length = values_of(flat, some)
        fits = length >= NAME_AT
        some, start, length = some.select(fits), start[fits], length[fits]
        many = flat[start + 64].astype(np.int64)
        fits = (many > 0) & (NAME_AT + 2 * many <= length)
        # A name for DOS stands beside another of the same file.
        is_dos = flat[start + 65] == DOS
        has_other = np.zeros(len(records), dtype=np.bool_)
        has_other[some.row[~is_dos & fits]] = True
        fits &= ~is_dos | ~has_other[some.row]
        some, start, many = some.select(fits), start[fits], many[fits]
        child = np.where(records.base > 0, records.base, records.number)[some.row]
        reference = little(flat, start, 8)
        parent, use = reference & NUMBER, (reference >> NUMBER_BITS) & 0xFFFF
        is_directory = (little(flat, start + 56, 4) & IS_DIRECTORY) != 0
        kept = self._are_parents(parent, use) & (child >= FIRST_FILE)
        return Names(
            parent[kept],
            child[kept],
            is_directory[kept],
            flat,
            start[kept] + NAME_AT,
            2 * many[kept],
            "utf-16-le",
        )

    def _are_parents(self, parent: I64, use: I64) -> Mask:
        """Which of the references lead to a directory that is still there, if any is known."""
        known, uses = self._parent_uses
        wanted = distinct(parent)
        at = np.searchsorted(known, wanted)
        if len(known):
            wanted = wanted[known[np.minimum(at, len(known) - 1)] != wanted]
        if len(wanted):
            found, rows = self._table.read(wanted)
            # -1: nothing is known of it; -2: it is in use no more.
            fresh = np.full(len(wanted), -1, dtype=np.int64)
            fresh[rows] = np.where((found.flags & IN_USE) != 0, found.use, -2)
            order = np.argsort(np.concatenate((known, wanted)), kind="stable")
            known = np.concatenate((known, wanted))[order]
            uses = np.concatenate((uses, fresh))[order]
            self._parent_uses = known, uses
        if not len(parent):
            return np.zeros(0, dtype=np.bool_)
        found_use = uses[np.searchsorted(known, parent)]
        result: Mask = (found_use == -1) | (found_use == use)
        return result

    def _streams(self, records: Records, attributes: Attributes, names: Names) -> Iterator[Names]:
        """The names of streams whose data is outside of the records; there are few of them."""
        wanted = (attributes.type == DATA) & attributes.is_outside & (attributes.name_length > 0)
        # The first part of each.
        wanted[wanted] = little(records.flat, attributes.at[wanted] + 16, 8) == 0
        streams = attributes.select(wanted)
        inode = self._inodes(records, streams)
        streams, inode = streams.select(inode >> NUMBER_BITS > 0), inode[inode >> NUMBER_BITS > 0]
        if not len(streams):
            return
        base = inode & NUMBER
        lacking = distinct(base[~np.isin(base, names.child)])
        found, _ = self._table.read(lacking)
        others = self._names_of(found, attributes_of(found))
        for each in (names, others):
            order = np.argsort(each.child, kind="stable")
            low = np.searchsorted(each.child[order], base, side="left")
            high = np.searchsorted(each.child[order], base, side="right")
            raw, rows, stream = bytearray(), [], []
            ends = []
            for row in np.flatnonzero(high > low).tolist():
                start = int(streams.name[row])
                suffix = records.flat[start : start + 2 * int(streams.name_length[row])].tobytes()
                for at in order[int(low[row]) : int(high[row])].tolist():
                    begin = int(each.start[at])
                    raw += each.raw[begin : begin + int(each.length[at])].tobytes()
                    raw += b":\0" + suffix
                    rows.append(at)
                    stream.append(row)
                    ends.append(len(raw))
            end = np.array(ends, dtype=np.int64)
            begin_of = np.append(np.zeros(1, dtype=np.int64), end)[: len(end)]
            yield Names(
                each.parent[rows],
                inode[stream],
                np.zeros(len(rows), dtype=np.bool_),
                np.frombuffer(bytes(raw), dtype=np.uint8),
                begin_of,
                end - begin_of,
                "utf-16-le",
            )

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


def _with_streams(base: I64, flat: U8, attributes: Attributes, at: I64) -> I64:
    """*base*, of the streams in rows *at* with a number that their names give above it."""
    if not len(at):
        return base
    many = attributes.name_length[at]
    column = np.arange(2 * int(many.max()))
    within = column < 2 * many[:, None]
    place = np.where(within, attributes.name[at][:, None] + column, 0)
    value = crc(np.where(within, flat[place], 0).astype(np.uint8), 0xFFFF, CRC16).astype(np.int64)
    base[at] |= (1 + value % ((1 << 15) - 1)) << NUMBER_BITS
    return base


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
