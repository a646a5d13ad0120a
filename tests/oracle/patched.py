"""A guest's disk as we read it, with zeros where it cannot be read."""

from __future__ import annotations

from collections.abc import Iterable

from instarfs.errors import GuestDamaged, GuestElsewhere
from instarfs.guest.disk import Disk
from planner.guest.mapping import RunKind
from planner.source import SECTOR


class Patched:
    """A disk of ours as a source, with zeros for what cannot be read.

    ``unreadable``: the sectors that were zeros for that reason.
    """

    def __init__(self, disk: Disk) -> None:
        self.disk, self.size = disk, disk.size
        self.unreadable: set[int] = set()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        try:
            content = self.disk.read(offset, len(buffer))
        except (GuestDamaged, GuestElsewhere):
            self._read_around(offset, buffer)
        else:
            buffer[:] = bytes(content).ljust(len(buffer), b"\0")

    def _read_around(self, offset: int, buffer: memoryview) -> None:
        if len(buffer) <= SECTOR:
            self.unreadable.add(offset // SECTOR)
            buffer[:] = bytes(len(buffer))
            return
        half = -(-len(buffer) // 2 // SECTOR) * SECTOR
        self.read_into(offset, buffer[:half])
        self.read_into(offset + half, buffer[half:])

    def data_extents(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        for runs in self.disk.layer.mapping.walk(offset, offset + length):
            held = runs.select((runs.kind == RunKind.DATA) | (runs.kind == RunKind.COMPRESSED))
            for start, size in zip(held.guest.tolist(), held.length.tolist(), strict=True):
                yield start, start + size
