"""How much of a disk is more than zeros, for `du`, `tar -S` and all that ask a file for its blocks.

Never less than there is: a program may take a file without blocks for zeros and not read it. What
lies in a backing file counts as a whole, read or not, and so does what cannot be read.

Listing a folder reads nothing for this that is not in memory already: a small disk is counted at
once, of a large one the L1 table gives a bound. The exact number is there once the file was opened.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import trio

from instarfs.errors import InstarfsError
from instarfs.guest.place import Part, Place, size_of
from instarfs.image.file import FileSource, Image, WouldBlock
from planner.errors import ImageError, PlannerError
from planner.qcow2.geometry import SECTOR
from planner.qcow2.layout import MAX_L1_BYTES, Layout, check_table
from planner.source import nonzero_words

if TYPE_CHECKING:  # what a mount loads once it answers
    from planner.qcow2.snapshots import Snapshots

SnapshotsOf = Callable[[FileSource, Layout], "Snapshots"]
"""The snapshots of an image; raises `ImageError`."""

AT_ONCE_TABLES = 16
"""L2 tables that are looked through in passing: some milliseconds' work."""

AT_ONCE_L1_BYTES = 1 << 20

REST = 1.0
"""Seconds between two such looks: an image that is written to is another each time it is asked."""

MAX_KNOWN = 64
"""Disks of which the number is kept."""

PATIENCE = 0.2
"""Seconds that opening a file waits for the number; the count goes on without it."""


@dataclass(frozen=True, slots=True)
class _Known:
    state: Hashable
    size: int


class AllocatedBytes:
    """Of the disks of an image, as it is now."""

    def __init__(self, look: Callable[[], tuple[Image, Hashable]]) -> None:
        """*look* gives the image and what changes when it does; it may raise a domain error.

        Asked in the event loop alone.
        """
        self._look = look
        self._known: dict[Place, _Known] = {}
        self._passing: _Known | None = None
        self._snapshots: tuple[Hashable, Snapshots] | None = None
        self._looked_at = -REST
        # One that waits for a disk that does not answer is enough.
        self._limiter = trio.CapacityLimiter(1)

    def known(self, place: Place) -> int | None:
        """Bytes that are more than zeros, or a bound for them; None where neither is at hand."""
        try:
            image, state = self._look()
        except InstarfsError:
            return None
        known = self._known.get(place)
        if known is None and place.part is Part.DISK:
            known = self._passing
        if known is not None and known.state == state:
            return known.size
        now = time.monotonic()
        if place.part is not Part.DISK or now < self._looked_at + REST:
            return None
        if not image.answers_at_once:
            return None
        self._looked_at = now
        try:
            of = partial(self._snapshots_of, state)
            size = _count(image.source(wait=False), place, of, in_passing=True)
        except (WouldBlock, InstarfsError, PlannerError):
            return None
        self._passing = _Known(state, size)
        return size

    async def learn(self, place: Place) -> None:
        """Count exactly, for a while at least; what fails is told by whoever reads."""
        try:
            image, state = self._look()
        except InstarfsError:
            return
        known = self._known.get(place)
        if known is not None and known.state == state:
            return
        with trio.move_on_after(PATIENCE):
            await trio.to_thread.run_sync(
                self._learn, place, image, state, abandon_on_cancel=True, limiter=self._limiter
            )

    def _learn(self, place: Place, image: Image, state: Hashable) -> None:
        of = partial(self._snapshots_of, state)
        try:
            size = _count(image.source(), place, of, in_passing=False)
        except (InstarfsError, PlannerError):
            return
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        self._known[place] = _Known(state, size)

    def _snapshots_of(self, state: Hashable, source: FileSource, layout: Layout) -> Snapshots:
        """Read once for all places: there may be 65,536 of them."""
        from planner.qcow2.snapshots import read_snapshots  # noqa: PLC0415

        kept = self._snapshots
        if kept is None or kept[0] != state:
            table = read_snapshots(source, layout.header, layout.geometry)
            kept = self._snapshots = state, table.snapshots
        return kept[1]


def _count(source: FileSource, place: Place, of: SnapshotsOf, *, in_passing: bool) -> int:
    """*in_passing*: a bound is enough where more would be work. Raises as a source and a layout."""
    from planner.guest.allocation import allocation  # noqa: PLC0415
    from planner.qcow2 import entries  # noqa: PLC0415

    layout = Layout.read(source)
    geometry = layout.geometry
    offset, count, low, high = _extent(source, layout, place, of)
    if in_passing and count * 8 > AT_ONCE_L1_BYTES:
        return high - low
    l1 = nonzero_words(source, offset, count)
    if place.part is Part.LOST_TABLE:
        l1 = np.zeros(1, dtype=np.int64), np.array([place.index], dtype=np.uint64)
    size, coverage = high - low, geometry.l2_coverage
    index = l1[0][l1[1] & np.uint64(entries.L1_OFFSET) != 0]
    inside = index[(index >= low // coverage) & (index * coverage < high)]
    if in_passing and len(inside) > AT_ONCE_TABLES:
        return size if layout.backing_file else min(size, len(inside) * coverage)
    found = allocation(source, geometry, l1, low, high)
    return found.mapped + (found.unallocated if layout.backing_file else 0)


def _extent(
    source: FileSource, layout: Layout, place: Place, of: SnapshotsOf
) -> tuple[int, int, int, int]:
    """Where the L1 table of a disk is, its entries, and the guest bytes that are the disk's."""
    header, geometry = layout.header, layout.geometry
    if place.part is Part.DISK:
        return header.l1_table_offset, header.l1_size, 0, header.size // SECTOR * SECTOR
    if place.part is Part.LOST_TABLE:
        return 0, 0, 0, geometry.l2_coverage
    if place.part is Part.LOST_SNAPSHOT:
        return place.index, place.entries, 0, place.size
    snapshots = of(source, layout)
    if place.index >= len(snapshots):
        raise ImageError("snapshot", place.index, "it is gone")
    snapshot = snapshots[place.index]
    table = snapshot.l1_table_offset, snapshot.l1_size
    check_table("snapshot L1 table", table[0], table[1] * 8, MAX_L1_BYTES, geometry)
    size = size_of(Place(Part.SNAPSHOT, place.index), snapshot, geometry)
    if place.part is Part.SNAPSHOT:
        return *table, 0, size
    start = -(-size // geometry.l2_coverage) * geometry.l2_coverage
    return *table, start, start + size_of(place, snapshot, geometry)
