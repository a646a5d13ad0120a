"""What is mounted where, as the kernel tells: its table, and how a line of it is read.

The kernel writes blanks, tabs, newlines and backslashes in names as ``\\ooo`` (proc(5), mountinfo),
and every other byte as it is: lines end at newlines and at nothing else, fields at blanks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MOUNT_TABLE = Path("/proc/self/mountinfo")


@dataclass(frozen=True, slots=True)
class Mounted:
    """A line. ``device``: names what is mounted; ``options``: those of its superblock.

    As it is written there: ``written_point``, and ``entry``, which with it tells this mount from
    others: number, parent, device, root, file system, source.
    """

    number: int
    device: str
    point: bytes
    filesystem: str
    options: bytes
    written_point: bytes
    entry: bytes


def mounts_in(table: bytes) -> Iterator[Mounted]:
    """Its lines, in order: of those on one point the last counts."""
    for line in table.split(b"\n"):
        fields, _, rest = line.partition(b" - ")
        if not rest:
            continue
        number, parent, device, root, point, *_ = fields.split(b" ")
        filesystem, source, options = rest.split(b" ", 2)
        yield Mounted(
            int(number),
            device.decode(),
            _unescaped(point),
            filesystem.decode(),
            options,
            point,
            b" ".join((number, parent, device, root, filesystem, source)),
        )


def _unescaped(field: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field)
