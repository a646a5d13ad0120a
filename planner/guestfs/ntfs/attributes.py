"""Records of the MFT in columns: their attributes, and the runs that those are in.

Of many records one attribute each is looked at in a step, and of many attributes one run.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from planner.arrays import I64, U8, Mask
from planner.guestfs.columns import little

MAGIC = b"FILE"
IN_USE, HAS_INDEX = 1, 2
UPDATED_SECTOR = 512
"""The last two bytes of each are elsewhere, and a number that changes with each write is there."""

ATTRIBUTE_LIST, FILE_NAME, DATA = 0x20, 0x30, 0x80
INDEX_ROOT, INDEX_ALLOCATION, BITMAP = 0x90, 0xA0, 0xB0
END = 0xFFFFFFFF

MFT, ROOT = 0, 5
FIRST_FILE = 11
"""Records before it are of the file system itself, but for the root."""

NUMBER_BITS = 48
NUMBER = (1 << NUMBER_BITS) - 1
"""Of a reference to a record its number; above it how often that was used anew."""


@dataclass(frozen=True, slots=True)
class Records:
    """Some records that make sense: ``number``, and what they say of themselves; int64.

    ``base``, ``base_use``: the record that this one goes on, and how often that was used: 0, this
    is none that goes on. ``flat``: their bytes, as they are meant, one after the other.
    """

    number: I64
    use: I64
    links: I64
    flags: I64
    base: I64
    base_use: I64
    flat: U8
    size: int

    def __len__(self) -> int:
        return len(self.number)


@dataclass(frozen=True, slots=True)
class Attributes:
    """Attributes of `Records`: in which ``row``, where in their bytes (``at``, up to ``end``)."""

    row: I64
    at: I64
    end: I64
    type: I64
    is_outside: Mask
    name: I64
    name_length: I64

    def __len__(self) -> int:
        return len(self.row)

    def select(self, which: Mask | I64) -> Attributes:
        """Some of them."""
        return Attributes(*(getattr(self, each.name)[which] for each in fields(self)))


@dataclass(frozen=True, slots=True)
class Runs:
    """Clusters of attributes: ``attribute`` is a row of them, ``virtual`` the number of the first
    cluster within it, ``cluster`` that on the disk. Holes are left out.
    """

    attribute: I64
    virtual: I64
    cluster: I64
    length: I64


def mended(raw: U8, magic: bytes) -> tuple[I64, U8]:
    """Of structures *raw*, shape (n, bytes), the rows of those that begin with *magic* and were
    written as a whole, and their bytes as they are meant: each sector with its own last two.
    """
    count, size = raw.shape
    flat, base = raw.reshape(-1), np.arange(count, dtype=np.int64) * size
    sound = (raw[:, :4] == np.frombuffer(magic, dtype=np.uint8)).all(axis=1)
    sectors = size // UPDATED_SECTOR
    updates, many = little(flat, base + 4, 2), little(flat, base + 6, 2)
    sound &= (many == sectors + 1) & (updates % 2 == 0) & (updates + 2 * many <= UPDATED_SECTOR)
    rows = np.flatnonzero(sound)
    raw, updates = np.ascontiguousarray(raw[rows]), updates[rows]
    flat, base = raw.reshape(-1), np.arange(len(rows), dtype=np.int64) * size
    expected = little(flat, base + updates, 2)
    whole = np.ones(len(rows), dtype=np.bool_)
    for sector in range(sectors):
        last = base + (sector + 1) * UPDATED_SECTOR - 2
        whole &= little(flat, last, 2) == expected
        for byte in (0, 1):
            flat[last + byte] = flat[base + updates + 2 * (sector + 1) + byte]
    return rows[whole], np.ascontiguousarray(raw[whole])


def decode_records(raw: U8, number: I64) -> tuple[Records, I64]:
    """Those of *raw*, shape (n, bytes), that make sense and are whole, and their rows."""
    size = raw.shape[1]
    rows, raw = mended(raw, MAGIC)
    flat, base = raw.reshape(-1), np.arange(len(rows), dtype=np.int64) * size
    reference = little(flat, base + 32, 8)
    records = Records(
        number[rows],
        little(flat, base + 16, 2),
        little(flat, base + 18, 2),
        little(flat, base + 22, 2),
        reference & NUMBER,
        (reference >> NUMBER_BITS) & 0xFFFF,
        flat,
        size,
    )
    return records, rows


def attributes_of(records: Records) -> Attributes:
    """All attributes of the records in use; what makes no sense ends its record."""
    flat, size = records.flat, records.size
    row = np.flatnonzero(records.flags & IN_USE)
    base = np.arange(len(records), dtype=np.int64) * size
    at = little(flat, base + 20, 2)
    limit = np.minimum(little(flat, base + 24, 4), size)
    found: list[tuple[I64, ...]] = []
    row = row[at[row] + 24 <= limit[row]]
    while len(row):
        place = base[row] + at[row]
        kind, length = little(flat, place, 4), little(flat, place + 4, 4)
        sound = (kind != END) & (kind > 0) & (length >= 24) & (length % 8 == 0)
        sound &= at[row] + length <= limit[row]
        row, place, kind, length = row[sound], place[sound], kind[sound], length[sound]
        is_outside, many = flat[place + 8], flat[place + 9].astype(np.int64)
        name = little(flat, place + 10, 2)
        good = (name + 2 * many <= length) & ((is_outside == 0) | (length >= 64))
        columns = (row, place, place + length, kind, is_outside, place + name, many)
        found.append(tuple(column[good] for column in columns))
        at[row] += length
        row = row[at[row] + 24 <= limit[row]]
    if not found:
        none = np.zeros(0, dtype=np.int64)
        return Attributes(none, none, none, none, none.astype(np.bool_), none, none)
    row, place, end, kind, is_outside, name, many = (
        np.concatenate(column) for column in zip(*found, strict=True)
    )
    return Attributes(row, place, end, kind, is_outside != 0, name, many)


def values_of(flat: U8, attributes: Attributes) -> tuple[I64, I64]:
    """Where the values of attributes that are in their records begin, and how long they are."""
    start = attributes.at + little(flat, attributes.at + 20, 2)
    length = little(flat, attributes.at + 16, 4)
    return start, np.clip(np.minimum(length, attributes.end - start), 0, None)


def runs_of(flat: U8, attributes: Attributes, clusters: int) -> tuple[Runs, int]:
    """The runs of attributes that are outside of their records, and of how many attributes they
    make no sense. *clusters*: how many there are.
    """
    # Numbers are read 8 bytes at a time: the last may reach behind the end.
    flat = np.concatenate((flat, np.zeros(16, dtype=np.uint8)))
    at = attributes.at + little(flat, attributes.at + 32, 2)
    virtual = little(flat, attributes.at + 16, 8)
    cluster = np.zeros(len(at), dtype=np.int64)
    broken = (virtual < 0) | (virtual > 1 << 52)
    live = np.flatnonzero(~broken & (at < attributes.end))
    found: list[tuple[I64, ...]] = []
    while len(live):
        place, head = at[live], flat[at[live]].astype(np.int64)
        wide, far = head & 15, head >> 4
        is_end = head == 0
        stop = place + 1 + wide + far
        length = _signed(flat, place + 1, wide)
        good = (wide > 0) & (wide <= 8) & (far <= 8) & (stop <= attributes.end[live])
        good &= (length > 0) & (length < 1 << 52)
        step = np.where(good & (far > 0), _signed(flat, place + 1 + wide, far), 0)
        good &= np.abs(step) < 1 << 52
        target = cluster[live] + np.where(good, step, 0)
        inside = (target >= 0) & (target < clusters)
        good &= inside | (far == 0)
        broken[live[~good & ~is_end]] = True
        live, far, length, target, stop = (each[good] for each in (live, far, length, target, stop))
        cluster[live] = target
        is_there = far > 0
        kept = np.minimum(length, clusters - target)
        rows = (live, virtual[live], target, kept)
        found.append(tuple(column[is_there] for column in rows))
        virtual[live] += length
        at[live] = stop
        live = live[(stop < attributes.end[live]) & (virtual[live] < 1 << 52)]
    none = np.zeros(0, dtype=np.int64)
    columns = (
        [np.concatenate(column) for column in zip(*found, strict=True)] if found else [none] * 4
    )
    return Runs(*columns), int(broken.sum())


def _signed(flat: U8, at: I64, width: I64) -> I64:
    """Numbers with a sign of *width* bytes, of 0 bytes 0."""
    value = little(flat, np.minimum(at, len(flat) - 8), 8)
    shift = 64 - 8 * np.clip(width, 1, 8)
    return np.where(width > 0, (value << shift) >> shift, 0)
