"""What the guest reads of an image, as QEMU reads it: before a repair, and after.

Nothing here repairs, and nothing knows what a repair may do.
"""

from __future__ import annotations

import heapq
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from planner.qcow2.snapshots import Snapshot
from planner.source import SECTOR, Source, read_bytes
from tests.images.matrix import Row, convert_command
from tests.oracle.scene import FileSource

READING_SECONDS = 20
"""For one disk: QEMU reads what it cannot read a sector at a time."""
CHUNK = 1 << 20

_UNREADABLE = re.compile(rb"error while reading (?:block status at )?offset (\d+)")
_PLAIN_ID = re.compile(r"[\w.-]+")
"""Snapshot ids that need no quoting in a QEMU option."""


@dataclass(frozen=True, slots=True)
class Disk:
    """One disk in a raw file; the sectors that could not be read are zeros there."""

    raw: Path
    unreadable: frozenset[int]


class Disks:
    """The guest's disk and every snapshot of an image, read when first compared.

    ``unread``: how many of them could not be read at all.
    """

    def __init__(self, row: Row, image: Path, snapshots: Iterable[Snapshot]) -> None:
        self._row, self._image = row, image
        ids = (each.id_str.decode(errors="replace") for each in snapshots)
        self._ids = (None, *dict.fromkeys(each for each in ids if _PLAIN_ID.fullmatch(each)))
        self._before: list[Disk | None] = []

    @property
    def unread(self) -> int:
        return self._before.count(None)

    def faults_of(self, repaired: Path) -> Iterator[str]:
        """What reads otherwise in *repaired*, of all that could be read."""
        if not self._before:
            self._before = [
                read_disk(self._row, self._image, each, self._image.with_name(f"before{at}.raw"))
                for at, each in enumerate(self._ids)
            ]
        for each, before in zip(self._ids, self._before, strict=True):
            if before is not None:
                raw = repaired.with_name("after.raw")
                # What could be read before must be read now, also where the machine is busier.
                after = read_disk(self._row, repaired, each, raw, 10 * READING_SECONDS)
                shown = f"snapshot {each}" if each else "the disk"
                yield from (
                    f"the guest: {shown} {fault}" for fault in faults_between(before, after)
                )


def faults_between(before: Disk, after: Disk | None) -> Iterator[str]:
    """What of *before* is lost, or otherwise, *after*."""
    if after is None:
        yield "cannot be read any more"
        return
    if lost := after.unreadable - before.unreadable:
        yield f"cannot be read at {min(lost) * SECTOR} any more"
    with before.raw.open("rb") as was, after.raw.open("rb") as now:
        sources = FileSource(was.fileno()), FileSource(now.fileno())
        at = first_difference(*sources, ignored=before.unreadable | after.unreadable)
    if at is not None:
        yield f"reads otherwise at {at}"


def read_disk(
    row: Row, image: Path, snapshot: str | None, raw: Path, seconds: float = READING_SECONDS
) -> Disk | None:
    """Convert a disk to a raw file, around what cannot be read; None where that fails."""
    try:
        done = subprocess.run(
            convert_command(row, image, snapshot, raw),
            check=False,
            capture_output=True,
            cwd=image.parent,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        return None
    return Disk(raw, frozenset(int(at) // SECTOR for at in _UNREADABLE.findall(done.stderr)))


def first_difference(one: Source, other: Source, ignored: Iterable[int] = ()) -> int | None:
    """Offset of the first sector that differs and is not *ignored* (sector numbers).

    A hole is zeros. Sources of different sizes differ where the shorter ends.
    """
    if one.size != other.size:
        return min(one.size, other.size)
    skip = np.fromiter(ignored, dtype=np.int64)
    reached = 0
    for start, end in heapq.merge(one.data_extents(0, one.size), other.data_extents(0, one.size)):
        for offset in range(max(reached, start // SECTOR * SECTOR), end, CHUNK):
            length = -(-min(CHUNK, end - offset) // SECTOR) * SECTOR
            rows = [
                np.frombuffer(read_bytes(each, offset, length), dtype=np.uint8).reshape(-1, SECTOR)
                for each in (one, other)
            ]
            wrong = np.flatnonzero((rows[0] != rows[1]).any(axis=1)) + offset // SECTOR
            wrong = wrong[~np.isin(wrong, skip)]
            if len(wrong):
                return int(wrong[0]) * SECTOR
        reached = max(reached, -(-end // SECTOR) * SECTOR)
    return None
