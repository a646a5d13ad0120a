"""The names of NTFS: those in the records of files, and of lost records those in the directories.

A name stands twice, in the record of its file and in the index of its directory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from planner.arrays import I64, U8, Mask, distinct, expand_ranges, is_among
from planner.guestfs.checksums import crc
from planner.guestfs.columns import little
from planner.guestfs.ntfs.attributes import (
    ATTRIBUTE_LIST,
    DATA,
    FILE_NAME,
    FIRST_FILE,
    IN_USE,
    NUMBER,
    NUMBER_BITS,
    Attributes,
    Records,
    attributes_of,
    values_of,
)
from planner.guestfs.ntfs.boot import Boot
from planner.guestfs.ntfs.indexes import Indexes
from planner.guestfs.ntfs.lists import GoesOn, listed_in
from planner.guestfs.ntfs.streams import inodes_of
from planner.guestfs.ntfs.table import NONE, Table
from planner.guestfs.protocol import Names
from planner.guestfs.reading import Holes

NAME_AT, DOS = 66, 2
"""Where in a `FILE_NAME` the name begins; the namespace of the names that are only for DOS."""

IS_DIRECTORY = 0x10000000
ENCODING = "utf-16-le"


@dataclass(frozen=True, slots=True)
class Survey:
    """What is left of lost records: ``goes_on``; ``names`` that directories have of those in holes,
    and which of them are for DOS; ``is_whole``: all directories are, and no others are files.
    """

    goes_on: GoesOn
    names: list[tuple[Names, Mask]]
    is_whole: bool

    @property
    def named(self) -> I64:
        """The records that have a name, ascending."""
        return distinct(np.concatenate([NONE, *(names.child for names, _ in self.names)]))


class Naming:
    """One walk over all names. *survey*: what `survey` says, asked for if need be."""

    def __init__(
        self, source: Holes, boot: Boot, table: Table, survey: Callable[[], Survey]
    ) -> None:
        self._source, self._boot, self._table, self._survey = source, boot, table, survey
        self._parent_uses = (NONE, NONE)
        # Of files that have other records too: what of their names was told, and their numbers.
        self._told, self._told_of = [NONE], [NONE]

    def __iter__(self) -> Iterator[Names]:
        broken = [NONE]
        for records in self._table.walk(broken):
            attributes = attributes_of(records)
            attributes = attributes.select(self._table.belongs(records)[attributes.row])
            names = self._of_records(records, attributes)
            yield names
            self._note(records, attributes, names)
            yield from self._streams(records, attributes, names)
        lost = np.concatenate(broken)
        if len(lost) or self._table.has_holes:
            yield from self._of_lost(lost)

    # ---- in records ----

    def _of_records(self, records: Records, attributes: Attributes) -> Names:
        flat = records.flat
        some = attributes.select((attributes.type == FILE_NAME) & ~attributes.is_outside)
        start, length = values_of(flat, some)
        fits = _hold_names(flat, start, length)
        some, start = some.select(fits), start[fits]
        # A name for DOS stands beside another of the same file.
        is_dos = flat[start + 65] == DOS
        has_other = np.zeros(len(records), dtype=np.bool_)
        has_other[some.row[~is_dos]] = True
        fits = ~is_dos | ~has_other[some.row]
        some, start = some.select(fits), start[fits]
        child = np.where(records.base > 0, records.base, records.number)[some.row]
        reference = little(flat, start, 8)
        parent, use = reference & NUMBER, (reference >> NUMBER_BITS) & 0xFFFF
        kept = self._are_parents(parent, use) & (child >= FIRST_FILE)
        return _names_at(flat, start[kept], parent[kept], child[kept])

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
        inode = inodes_of(records, streams)
        streams, inode = streams.select(inode >> NUMBER_BITS > 0), inode[inode >> NUMBER_BITS > 0]
        if not len(streams):
            return
        base = inode & NUMBER
        lacking = distinct(base[~np.isin(base, names.child)])
        found, _ = self._table.read(lacking)
        others = self._of_records(found, attributes_of(found))
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
                ENCODING,
            )

    def _note(self, records: Records, attributes: Attributes, names: Names) -> None:
        """Note what is told of files with more than one record: not all of them may be there."""
        listed = attributes.row[attributes.type == ATTRIBUTE_LIST]
        several = distinct(np.concatenate((records.base[records.base > 0], records.number[listed])))
        rows = np.flatnonzero(is_among(names.child, several))
        self._told.append(_keys(names, rows))
        self._told_of.append(names.child[rows])

    # ---- in directories ----

    def _of_lost(self, broken: I64) -> Iterator[Names]:
        """The names of files that have lost a record, those in *broken* or in a hole."""
        left = self._survey()
        goes_on = left.goes_on
        gone = self._table.are_lost(goes_on.record) | is_among(goes_on.record, broken)
        lacking = distinct(np.concatenate((broken, goes_on.base[gone])))
        told, named, for_dos = np.sort(np.concatenate(self._told)), self._told_of, list[Names]()
        for names, is_dos in self._in_directories(lacking) if len(lacking) else left.names:
            rows = np.flatnonzero(~is_among(_keys(names, np.arange(len(names))), told))
            dos = is_dos[rows]
            for_dos.append(_taken(names, rows[dos]))
            rows = rows[~dos]
            named.append(names.child[rows])
            yield _taken(names, rows)
        known = distinct(np.concatenate(named))
        for names in for_dos:
            yield _taken(names, np.flatnonzero(~is_among(names.child, known)))

    def _in_directories(self, lacking: I64) -> Iterator[tuple[Names, Mask]]:
        indexes = Indexes(self._source, self._boot)
        for records in self._table.walk():
            attributes = attributes_of(records)
            yield from _in_indexes(self._table, indexes, records, attributes, lacking)


def survey(source: Holes, boot: Boot, table: Table) -> Survey:
    """What is left of lost records, in one walk."""
    indexes, is_whole = Indexes(source, boot), True
    goes_on, names = list[tuple[I64, I64]](), list[tuple[Names, Mask]]()
    for records in table.walk():
        attributes = attributes_of(records)
        goes_on += listed_in(source, boot, records, attributes)
        for found, is_dos in _in_indexes(table, indexes, records, attributes, NONE):
            is_whole &= not found.is_directory.any()
            names.append((_taken(found, np.arange(len(found))), is_dos))
    return Survey(GoesOn.of(goes_on), names, is_whole and not indexes.lost)


def _in_indexes(
    table: Table, indexes: Indexes, records: Records, attributes: Attributes, lacking: I64
) -> Iterator[tuple[Names, Mask]]:
    """What indexes say of lost records and of *lacking*; which names are for DOS."""
    attributes = attributes.select(table.belongs(records)[attributes.row])
    for found in indexes.entries(records, attributes):
        wanted = table.are_lost(found.child) | is_among(found.child, lacking)
        at = np.flatnonzero(wanted & (found.child >= FIRST_FILE))
        at = at[_hold_names(found.flat, found.start[at], found.length[at])]
        if len(at):
            start = found.start[at]
            names = _names_at(found.flat, start, found.parent[at], found.child[at])
            yield names, found.flat[start + 65] == DOS


def _hold_names(flat: U8, start: I64, length: I64) -> Mask:
    """Which of the values at *start* are names with at least a character."""
    result: Mask = length >= NAME_AT
    at = np.flatnonzero(result)
    many = flat[start[at] + 64].astype(np.int64)
    result[at] = (many > 0) & (NAME_AT + 2 * many <= length[at])
    return result


def _names_at(flat: U8, start: I64, parent: I64, child: I64) -> Names:
    is_directory = (little(flat, start + 56, 4) & IS_DIRECTORY) != 0
    length = 2 * flat[start + 64].astype(np.int64)
    return Names(parent, child, is_directory, flat, start + NAME_AT, length, ENCODING)


def _taken(names: Names, rows: I64) -> Names:
    """Some rows, without the bytes that they lie among."""
    start, length = names.start[rows], names.length[rows]
    raw = names.raw[expand_ranges(start, start + length - 1)] if len(rows) else names.raw[:0]
    return Names(
        names.parent[rows],
        names.child[rows],
        names.is_directory[rows],
        raw,
        np.cumsum(length) - length,
        length,
        ENCODING,
    )


def _keys(names: Names, rows: I64) -> I64:
    """A number for each of the names that parent, child and name give."""
    if not len(rows):
        return NONE
    length = names.length[rows]
    column = np.arange(int(length.max()))
    within = column < length[:, None]
    place = np.where(within, names.start[rows][:, None] + column, 0)
    value = crc(np.where(within, names.raw[place], 0).astype(np.uint8), 0).astype(np.int64)
    return value ^ (names.child[rows] << 31) ^ (names.parent[rows] * 0x9E3779B97F4A7C1)
