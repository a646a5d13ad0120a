"""The volumes of a disk, and what each of them holds: the front door of this room.

What has a file system is read by `planner.guestfs.known`; what has none is named by what it begins
with: encrypted, swap space, a part of a RAID.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from planner.arrays import I64
from planner.guestfs.known import behind_beginning, recognise
from planner.guestfs.protocol import FileSystem
from planner.guestfs.reading import NO_RANGES, Holes, Window
from planner.guestfs.volumes.lvm import Physical, read_physical
from planner.guestfs.volumes.partitions import Partition, Table, read_table
from planner.guestfs.volumes.space import Pieces, Segment, Space, linear
from planner.guestfs.work import Work, WorkSpent
from planner.source import Source, read_bytes

WHOLE_DISK = "whole disk"

MIN_SIZE = 4096
"""Of a volume in which something is looked for."""

MAX_VOLUMES = 1 << 10

SIGNATURES = (
    ("crypto_LUKS", 0, b"LUKS\xba\xbe"),
    ("crypto_LUKS", 0, b"SKUL\xba\xbe"),
    ("crypto_LUKS", 0x4000, b"SKUL\xba\xbe"),
    ("BitLocker", 3, b"-FVE-FS-"),
    ("swap", 4086, b"SWAPSPACE2"),
    ("swap", 4086, b"SWAP-SPACE"),
    ("linux_raid_member", 4096, b"\xfc\x4e\x2b\xa9"),
    ("zfs_member", 128 << 10, b"\x0c\xb1\xba\x00\x00\x00\x00\x00"),
    ("squashfs", 0, b"hsqs"),
    ("iso9660", 32769, b"CD001"),
    ("f2fs", 1024, b"\x10\x20\xf5\xf2"),
    ("apfs", 32, b"NXSB"),
    ("bcachefs", 4120, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca"),
    ("jfs", 32768, b"JFS1"),
    ("reiserfs", 65588, b"ReIsEr"),
)
"""What a volume is that is no file system for us: the word of blkid, where, and with what."""

ENCRYPTED = ("crypto_LUKS", "BitLocker")


@dataclass(frozen=True, slots=True)
class Volume:
    """A part of the disk with a name that people know.

    ``holds``: the file system's kind, or what else it is, in blkid's word; "" where nobody knows.
    ``source``: its bytes, holes where they are damaged.
    """

    name: str
    space: Space
    source: Holes
    filesystem: FileSystem | None
    holds: str
    notes: list[str] = field(default_factory=list)

    def pieces(self, start: I64, end: I64) -> Pieces:
        """What ranges of the disk are of it; see `Space.pieces`."""
        return self.space.pieces(start, end)


@dataclass(frozen=True, slots=True)
class Layout:
    """What is on a disk: its volumes, and (start, length) of what describes them.

    ``notes``: what could not be read of that.
    """

    volumes: list[Volume]
    own: list[tuple[int, int]]
    notes: list[str]


@dataclass(slots=True)
class _Disk:
    """The disk that is looked at, with its holes as ranges, and without them as it is.

    ``raw``: a failed read is to be a hole of the volume that it is in. ``work``: what is left to be
    done.
    """

    raw: Source
    source: Holes
    start: I64
    end: I64
    layout: Layout
    work: Work

    def add(self, name: str, segments: tuple[Segment, ...], notes: list[str], label: str) -> Volume:
        """The volume that *segments* are."""
        self.work.volume(len(self.start))
        space = Space(self.raw, segments)
        holes = space.pieces(self.start, self.end)
        source = Holes(space, holes.start, holes.start + holes.length, self.work)
        holds = _signature(source)
        # Below what is encrypted now lies what was there before.
        known = recognise(source) if holds not in ENCRYPTED and space.size >= MIN_SIZE else None
        holds = known.kind if known else holds
        shown = label or (known.label if known else "")
        volume = Volume(f"{name} ({shown})" if shown else name, space, source, known, holds, notes)
        if len(self.layout.volumes) < MAX_VOLUMES:
            self.layout.volumes.append(volume)
        return volume


def find_volumes(
    source: Source, start: I64 = NO_RANGES, end: I64 = NO_RANGES, work: Work | None = None
) -> Layout:
    """What the disk *source* has, of which the ranges *start* to *end* are not to be believed.

    The ranges ascend and are disjoint. What was found when there was no more *work* to be done is
    all, and a note says so.
    """
    work = work or Work()
    holes = Holes(source, start, end, work)
    disk = _Disk(source, holes, start, end, Layout([], [], []), work)
    try:
        table = read_table(holes)
        if table is None:
            _add_whole(disk, source.size)
            return disk.layout
        _add_partitions(disk, table)
        if not any(each.holds for each in disk.layout.volumes):
            whole = _Disk(source, holes, start, end, Layout([], [], []), work)
            _add_whole(whole, source.size)
            if any(each.filesystem for each in whole.layout.volumes):
                return whole.layout
    except WorkSpent as spent:
        disk.layout.notes.append(str(spent))
    return disk.layout


def _add_whole(disk: _Disk, size: int) -> None:
    physical = _physical(disk, 0, size)
    if physical is not None:
        _add_logical(disk, physical, 0, WHOLE_DISK)
        return
    volume = disk.add(WHOLE_DISK, linear(size, 0), [], "")
    if volume.holds:
        return
    found = list(_scattered(disk, size))
    if found:
        disk.layout.volumes.clear()
        disk.layout.notes.append(
            "there is no partition table that can be read: file systems were looked for where they"
            " usually begin"
        )
        for begin, length in found:
            disk.add(f"at offset {begin}", linear(length, begin), [], "")


def _add_partitions(disk: _Disk, table: Table) -> None:
    disk.layout.own.extend(table.own)
    disk.layout.notes.extend(table.notes)
    for each in table.partitions:
        physical = _physical(disk, each.start, each.length)
        if physical is not None:
            _add_logical(disk, physical, each.start, _named(each))
        else:
            disk.add(f"partition {each.number}", linear(each.length, each.start), [], each.label)


def _named(partition: Partition) -> str:
    label = f" ({partition.label})" if partition.label else ""
    return f"partition {partition.number}{label}"


def _physical(disk: _Disk, start: int, length: int) -> Physical | None:
    if length < MIN_SIZE:
        return None
    window = Window(disk.raw, start, length)
    first = int(np.searchsorted(disk.end, start, side="right"))
    last = int(np.searchsorted(disk.start, start + length, side="left"))
    low, high = disk.start[first:last] - start, disk.end[first:last] - start
    holes = Holes(window, np.maximum(low, 0), np.minimum(high, length), disk.work)
    return read_physical(holes, start, disk.work)


def _add_logical(disk: _Disk, physical: Physical, start: int, name: str) -> None:
    disk.layout.own.extend((start + at, length) for at, length in physical.own)
    disk.layout.notes.extend(f"{name}: {note}" for note in physical.notes)
    for each in physical.volumes:
        disk.add(each.name, tuple(each.segments), each.notes, "")


def _signature(source: Holes) -> str:
    for word, offset, signature in SIGNATURES:
        if read_bytes(source, offset, len(signature)) == signature:
            return word
    return ""


# ---- where the table is gone ----

SCANNED_STEPS = (1 << 20, 63 * 512)
"""Partitions begin at multiples of a mebibyte now; the first did at sector 63 of old."""

MAX_SCANNED = 1 << 15
"""Places that are looked at: those of the first 32 GiB."""

BTRFS_AT = 65600
LOOKED_AT = BTRFS_AT + 8
"""Bytes from such a place on in which there is a mark: of btrfs so far behind it."""

EXTENTS_A_TIME = 1 << 16


def _scattered(disk: _Disk, size: int) -> Iterator[tuple[int, int]]:
    """(start, length) of file systems that begin at likely places, ascending, none in another."""
    step, last = SCANNED_STEPS[0], min(size, MAX_SCANNED * SCANNED_STEPS[0])
    places = [SCANNED_STEPS[1], *range(step, last, step)]
    end = 0
    for begin in _with_data(disk.source, np.array(places)).tolist():
        if begin < end or begin + MIN_SIZE > size:
            continue
        if not _may_begin(disk.source, begin):
            continue
        # Copies of a superblock begin likely places too.
        window = Holes(Window(disk.source, begin, size - begin), work=disk.work)
        start = begin - behind_beginning(window)
        found = None
        if start >= end:
            found = recognise(Holes(Window(disk.source, start, size - start), work=disk.work))
        if found is not None and found.size:
            end = start + found.size
            yield start, found.size


def _with_data(source: Source, places: I64) -> I64:
    """Those of ascending *places* behind which there is more than a hole; asked once, for all."""
    starts = np.zeros(len(places) + 1, dtype=np.int64)
    extents = iter(source.data_extents(0, int(places[-1]) + LOOKED_AT))
    while some := list(islice(extents, EXTENTS_A_TIME)):
        low, high = np.array(some, dtype=np.int64).T
        np.add.at(starts, np.searchsorted(places, low - LOOKED_AT, side="right"), 1)
        np.add.at(starts, np.searchsorted(places, high, side="left"), -1)
    return places[np.cumsum(starts[:-1]) > 0]


def _may_begin(source: Holes, begin: int) -> bool:
    """Whether there are the first bytes of a file system, or of a group of one."""
    raw = read_bytes(source, begin, MIN_SIZE)
    return (
        b"\x53\xef" in (raw[1080:1082], raw[56:58])
        or raw[:4] == b"XFSB"
        or raw[3:11] in (b"NTFS    ", b"EXFAT   ")
        or raw[510:512] == b"\x55\xaa"
        or read_bytes(source, begin + BTRFS_AT, 8) == b"_BHRfS_M"
    )
