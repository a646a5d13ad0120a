"""Entries of directories of FAT and of exFAT, of many directories at a time.

An entry has 32 bytes. A long name is in entries before the file's own in FAT, and after it in
exFAT; either way a name is put together here, as UTF-16.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.arrays import I64, U8, U16, Mask
from planner.guestfs.columns import little

ENTRY = 32
DELETED = 0xE5

READ_ONLY, VOLUME, DIRECTORY, LONG = 0x01, 0x08, 0x10, 0x0F
LONG_PARTS, LONG_LAST = 20, 0x40
CHARACTERS = np.array([1, 3, 5, 7, 9, 14, 16, 18, 20, 22, 24, 28, 30], dtype=np.int64)
"""Where those of a part of a long name are."""

FILE, STREAM, NAME, LABEL, BITMAP, UPCASE = 0x85, 0xC0, 0xC1, 0x83, 0x81, 0x82
IN_PART = 15
"""Characters in a `NAME` of exFAT."""

NOT_CHAINED = 2
"""Of a stream's flags: its clusters follow each other, and the FAT says nothing of them."""

CP437 = np.array([ord(bytes([each]).decode("cp437")) for each in range(256)], dtype=np.uint16)


@dataclass(frozen=True, slots=True)
class Entries:
    """Entries that are files: in which ``row`` of all that were looked at, and what they say.

    ``size``: bytes. ``name``: UTF-16 in rows of equal length, of which ``length`` characters count.
    """

    row: I64
    first: I64
    size: I64
    is_directory: Mask
    is_chained: Mask
    name: U16
    length: I64

    def __len__(self) -> int:
        return len(self.row)


def fat_entries(raw: U8, directory: I64, *, is_32: bool) -> Entries:
    """The files in entries *raw*, shape (n, 32), in order; *directory* says of which each is."""
    kind, head = raw[:, 11], raw[:, 0]
    is_file = (head != 0) & (head != DELETED) & (kind & VOLUME == 0) & (head != ord("."))
    row = np.flatnonzero(is_file)
    flat, base = raw.reshape(-1), row * ENTRY
    first = little(flat, base + 26, 2)
    if is_32:
        first |= (little(flat, base + 20, 2) & 0xFFF) << 16
    name, length = _short_names(raw[row])
    long_name, long_length = _long_names(raw, row, directory)
    is_long = long_length > 0
    wide = np.zeros((len(row), LONG_PARTS * len(CHARACTERS)), dtype=np.uint16)
    wide[:, : name.shape[1]] = name
    wide[is_long] = long_name[is_long]
    return Entries(
        row,
        first,
        little(flat, base + 28, 4),
        (kind[row] & DIRECTORY) != 0,
        np.ones(len(row), dtype=np.bool_),
        wide,
        np.where(is_long, long_length, length),
    )


def _short_names(raw: U8) -> tuple[U16, I64]:
    """Names of 8 and 3 characters, in lower case where the entry says so."""
    text = raw[:, :11].copy()
    text[text[:, 0] == 0x05, 0] = DELETED
    for bit, part in ((0x08, slice(0, 8)), (0x10, slice(8, 11))):
        lower = (raw[:, 12:13] & bit != 0) & (text[:, part] >= 65) & (text[:, part] <= 90)
        text[:, part] += np.where(lower, 32, 0).astype(np.uint8)
    used = text != 0x20
    stem = np.where(used[:, :8], np.arange(1, 9), 0).max(axis=1, initial=0)
    extension = np.where(used[:, 8:], np.arange(1, 4), 0).max(axis=1, initial=0)
    wide = CP437[text]
    result = np.zeros((len(raw), 12), dtype=np.uint16)
    column = np.arange(12)
    result[:, :8] = np.where(column[:8] < stem[:, None], wide[:, :8], 0)
    row = np.flatnonzero(extension)
    result[row, stem[row]] = ord(".")
    for at in range(3):
        some = row[extension[row] > at]
        result[some, stem[some] + 1 + at] = wide[some, 8 + at]
    return result, stem + np.where(extension > 0, 1 + extension, 0)


def _long_names(raw: U8, row: I64, directory: I64) -> tuple[U16, I64]:
    """The names in the parts before the entries in rows *row*; length 0 where there is none."""
    checksum = np.zeros(len(row), dtype=np.uint8)
    for at in range(11):
        checksum = ((checksum >> 1) | ((checksum & 1) << 7)) + raw[row, at]
    parts = np.zeros(len(row), dtype=np.int64)
    live = np.arange(len(row))
    for number in range(1, LONG_PARTS + 1):
        live = live[row[live] >= number]
        part = row[live] - number
        order = raw[part, 0]
        good = (raw[part, 11] == LONG) & (raw[part, 13] == checksum[live])
        good &= (order & 0x3F) == number
        good &= directory[part] == directory[row[live]]
        is_last = good & (order & LONG_LAST != 0)
        parts[live[is_last]] = number
        live = live[good & ~is_last]
    width = len(CHARACTERS)
    result = np.zeros((len(row), LONG_PARTS * width), dtype=np.uint16)
    for number in range(1, int(parts.max(initial=0)) + 1):
        some = np.flatnonzero(parts >= number)
        place = ((row[some] - number) * ENTRY)[:, None] + CHARACTERS
        values = little(raw.reshape(-1), place, 2).astype(np.uint16)
        result[some, (number - 1) * width : number * width] = values
    ends = (result == 0) | (np.arange(result.shape[1]) >= (parts * width)[:, None])
    length = np.where(ends.any(axis=1), ends.argmax(axis=1), result.shape[1])
    return result, length


def exfat_entries(raw: U8, directory: I64) -> Entries:
    """As `fat_entries`, of exFAT."""
    row = np.flatnonzero(raw[:, 0] == FILE)
    row = row[row + 2 < len(raw)]
    stream = row + 1
    row = row[(raw[stream, 0] == STREAM) & (directory[stream] == directory[row])]
    base, flat = (row + 1) * ENTRY, raw.reshape(-1)
    length = flat[base + 3].astype(np.int64)
    name = np.zeros((len(row), 17 * IN_PART), dtype=np.uint16)
    whole = (length > 0) & (raw[row, 1] >= 2)
    for part in range(17):
        some = np.flatnonzero(whole & (length > part * IN_PART))
        at = row[some] + 2 + part
        inside = at < len(raw)
        good = inside & (raw[np.minimum(at, len(raw) - 1), 0] == NAME)
        good &= directory[np.minimum(at, len(raw) - 1)] == directory[row[some]]
        whole[some[~good]] = False
        some, at = some[good], at[good]
        place = (at * ENTRY)[:, None] + 2 + 2 * np.arange(IN_PART)
        values = little(flat, place, 2).astype(np.uint16)
        name[some, part * IN_PART : (part + 1) * IN_PART] = values
    row, base, length, name = row[whole], base[whole], length[whole], name[whole]
    return Entries(
        row,
        little(flat, base + 20, 4),
        np.maximum(little(flat, base + 24, 8), 0),
        (little(flat, row * ENTRY + 4, 2) & DIRECTORY) != 0,
        (flat[base + 1] & NOT_CHAINED) == 0,
        name,
        length,
    )
