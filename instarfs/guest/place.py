"""What a guest has that can be read, and how long it is: names for it, without what reads it.

Shows a mount what to list before the rest of this room is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from planner.errors import ImageError
from planner.qcow2.geometry import SECTOR, Geometry

if TYPE_CHECKING:
    from planner.qcow2.snapshots import Snapshot

LARGEST = 1 << 61
"""Bytes of a disk: what an L1 table of the largest size maps with the largest clusters."""


class Part(StrEnum):
    """What a guest has that can be read."""

    DISK = "disk"
    SNAPSHOT = "snapshot"
    VMSTATE = "vmstate"
    LOST_TABLE = "lost table"
    LOST_SNAPSHOT = "lost snapshot"


@dataclass(frozen=True, slots=True)
class Place:
    """One of the things to be read: the active disk, or what the snapshot at ``index`` kept.

    Of what nothing leads to any more ``index`` is the host offset of its table: an L2 table, or an
    L1 table of so many ``entries``, of a disk of ``size`` bytes.
    """

    part: Part
    index: int = 0
    entries: int = 0
    size: int = 0


def size_of(place: Place, snapshot: Snapshot, geometry: Geometry) -> int:
    """Bytes of the disk or the machine state of a snapshot, of a disk in whole sectors.

    Where the snapshot does not say, its disk is as large as the image's. Raises `ImageError` for
    more than any disk has.
    """
    if place.part is Part.VMSTATE:
        field, size = "vm_state_size", snapshot.vm_state_size
    else:
        known = snapshot.disk_size
        size = (geometry.virtual_size if known is None else known) // SECTOR * SECTOR
        field = "disk size of a snapshot"
    if size > LARGEST:
        raise ImageError(field, size, "larger than any disk can be")
    return size
