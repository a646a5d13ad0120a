"""Partition tables: MBR with its logical partitions, and GPT, from its backup where need be.

By the UEFI specification, sections 5.2 and 5.3; logical partitions as Linux counts them.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from planner.guestfs.reading import Holes
from planner.source import read_bytes

MBR_ENTRY = np.dtype(
    {
        "names": ["boot", "type", "start", "sectors"],
        "formats": ["u1", "u1", "<u4", "<u4"],
        "offsets": [0, 4, 8, 12],
        "itemsize": 16,
    }
)
TABLE_AT, SIGNATURE_AT, SIGNATURE = 446, 510, b"\x55\xaa"
EXTENDED = (0x05, 0x0F, 0x85)
PROTECTIVE = 0xEE
MAX_LOGICAL = 256

GPT_HEADER = np.dtype(
    {
        "names": [
            "signature", "size", "checksum", "here", "other", "entries_at", "entries",
            "entry_size", "entries_checksum",
        ],
        "formats": ["V8", "<u4", "<u4", "<u8", "<u8", "<u8", "<u4", "<u4", "<u4"],
        "offsets": [0, 12, 16, 24, 32, 72, 80, 84, 88],
        "itemsize": 92,
    }
)  # fmt: skip
GPT_SIGNATURE = b"EFI PART"
MAX_ENTRIES_BYTES = 1 << 20
SECTOR_SIZES = (512, 4096)


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition: its number, bytes of the disk, and its name where it has one."""

    number: int
    start: int
    length: int
    label: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A partition table: ``partitions`` by number, ``own``: (start, length) of the table itself.

    ``notes``: what could not be read of it.
    """

    scheme: str
    partitions: list[Partition]
    own: list[tuple[int, int]]
    notes: list[str] = field(default_factory=list)


def read_table(disk: Holes) -> Table | None:
    """The partition table of *disk*; None where there is none that makes sense."""
    return _read_gpt(disk) or _read_mbr(disk)


# ---- MBR ----


def _read_mbr(disk: Holes) -> Table | None:
    entries = _mbr_entries(disk, 0)
    if entries is None:
        return None
    primary, partitions, extended = [], [], None
    for number, (kind, start, length) in enumerate(entries, 1):
        if kind == 0 or length == 0:
            continue
        if start == 0 or start >= disk.size:
            return None
        primary.append((start, start + length))
        if kind in EXTENDED:
            extended = start if extended is None else extended
        else:
            partitions.append(Partition(number, start, min(length, disk.size - start)))
    primary.sort()
    overlaps = any(one[1] > other[0] for one, other in pairwise(primary))
    if not primary or overlaps:
        return None
    table = Table("MBR", partitions, [(0, 512)])
    if extended is not None:
        _add_logical(disk, extended, table)
    return table


def _mbr_entries(disk: Holes, offset: int) -> list[tuple[int, int, int]] | None:
    """(type, start, length) of the four entries of a sector, in bytes as it counts them."""
    sector = read_bytes(disk, offset, 512)
    if sector[SIGNATURE_AT:] != SIGNATURE:
        return None
    fields = np.frombuffer(sector[TABLE_AT:SIGNATURE_AT], dtype=MBR_ENTRY)
    if (fields["boot"] & 0x7F).any():
        return None
    return [
        (int(each["type"]), int(each["start"]) * 512, int(each["sectors"]) * 512) for each in fields
    ]


def _add_logical(disk: Holes, extended: int, table: Table) -> None:
    """The partitions in the extended one: a chain of sectors like the first, each with one."""
    at, seen, number = extended, set[int](), 5
    while at not in seen and len(seen) < MAX_LOGICAL:
        seen.add(at)
        table.own.append((at, 512))
        entries = _mbr_entries(disk, at)
        if entries is None:
            table.notes.append(
                f"the logical partitions from offset {at} on cannot be read: their table is gone"
            )
            return
        (kind, start, length), (kind_of_next, following, _), *_ = entries
        if kind and length and at + start < disk.size:
            begin = at + start
            table.partitions.append(Partition(number, begin, min(length, disk.size - begin)))
            number += 1
        if kind_of_next not in EXTENDED or not following or extended + following >= disk.size:
            return
        at = extended + following


# ---- GPT ----


def _read_gpt(disk: Holes) -> Table | None:
    for sector in SECTOR_SIZES:
        headers = [_gpt_header(disk, sector, sector)]
        last = disk.size // sector - 1
        if headers[0] is not None:
            last = int(headers[0]["other"])
        headers.append(_gpt_header(disk, last * sector, sector))
        if headers[1] is None and last != disk.size // sector - 1:
            headers[1] = _gpt_header(disk, (disk.size // sector - 1) * sector, sector)
        if any(header is not None for header in headers):
            return _gpt_table(disk, headers, sector)
    return None


def _gpt_header(disk: Holes, offset: int, sector: int) -> np.void | None:
    """The header at *offset*, if its checksum holds."""
    if not 0 < offset < disk.size:
        return None
    raw = read_bytes(disk, offset, sector)
    header = np.frombuffer(raw[: GPT_HEADER.itemsize], dtype=GPT_HEADER)[0]
    size = int(header["size"])
    if raw[:8] != GPT_SIGNATURE or not GPT_HEADER.itemsize <= size <= sector:
        return None
    if zlib.crc32(raw[:16] + bytes(4) + raw[20:size]) != int(header["checksum"]):
        return None
    if int(header["here"]) * sector != offset:
        return None
    sane = int(header["entry_size"]) >= 128 and int(header["entry_size"]) % 8 == 0
    bounded = int(header["entries"]) * int(header["entry_size"]) <= MAX_ENTRIES_BYTES
    found: np.void = header
    return found if sane and bounded else None


def _gpt_table(disk: Holes, headers: list[np.void | None], sector: int) -> Table:
    table = Table("GPT", [], [(0, 512)])
    first = headers[0]
    if first is None:
        table.notes.append("the primary partition table (GPT) cannot be read; its backup was used")
    for header in headers:
        if header is None:
            continue
        size = int(header["entries"]) * int(header["entry_size"])
        at = int(header["entries_at"]) * sector
        table.own.append((int(header["here"]) * sector, sector))
        if 0 < at < disk.size:
            table.own.append((at, min(size, disk.size - at)))
    candidates = [(header, _gpt_entries(disk, header, sector)) for header in headers
                  if header is not None]  # fmt: skip
    sound = [
        raw for header, raw in candidates if zlib.crc32(raw) == int(header["entries_checksum"])
    ]
    if sound and first is not None and sound[0] is not candidates[0][1]:
        table.notes.append("the partitions of the primary GPT cannot be read; its backup was used")
    if not sound:
        table.notes.append("the list of partitions (GPT) is damaged; some may be missing")
    header, raw = candidates[0][0], (sound or [candidates[0][1]])[0]
    size = int(header["entry_size"])
    for number in range(len(raw) // size):
        entry = raw[number * size : (number + 1) * size]
        start = int.from_bytes(entry[32:40], "little") * sector
        end = (int.from_bytes(entry[40:48], "little") + 1) * sector
        if any(entry[:16]) and sector <= start < min(end, disk.size):
            label = entry[56:128].decode("utf-16-le", "replace").split("\0")[0]
            length = min(end, disk.size) - start
            table.partitions.append(Partition(number + 1, start, length, label))
    return table


def _gpt_entries(disk: Holes, header: np.void, sector: int) -> bytes:
    at = int(header["entries_at"]) * sector
    size = int(header["entries"]) * int(header["entry_size"])
    return read_bytes(disk, at, size) if 0 < at < disk.size else b""
