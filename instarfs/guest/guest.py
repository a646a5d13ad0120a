"""What the guest of one image has: its disk, and the disk and machine state of every snapshot.

An opened guest is the state of one moment: `instarfs.guest.reader` opens another when the image
has changed.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator
from dataclasses import replace
from functools import cached_property

from instarfs.errors import (
    GuestEncrypted,
    ImageReadFailed,
    SnapshotMissing,
    SnapshotUnknown,
)
from instarfs.guest.chain import Chain, open_chain
from instarfs.guest.disk import Disk, Missing, Qcow2Layer, RawLayer
from instarfs.guest.follow import Follow
from instarfs.guest.place import LARGEST, Part, Place, size_of
from instarfs.image.file import Generation, Image, Signature
from planner.errors import ImageError, ReadFailed
from planner.guest.chain import Member, Role, full_name
from planner.guest.extents import UNKNOWN, Extents, Stratum, extents, has_preallocated_metadata
from planner.guest.mapping import Reading, read_freely
from planner.qcow2.header import CRYPT_NAMES, CRYPT_NONE
from planner.qcow2.layout import MAX_L1_BYTES, Layout, check_table
from planner.qcow2.snapshots import Snapshot, SnapshotTable, read_reachable_snapshots

MAX_FOUND = 8
"""Disks that are kept ready."""

ROWS_OF_ANY, ROWS_OF_A_BYTE = 1 << 20, 2
"""Rows that a map may have: an L2 entry of 16 bytes makes up to 32 of them."""


class Guest:
    """The guest of *image*, as it is when this is made. Usable from several threads."""

    def __init__(self, image: Image, follow: Follow, *, strict: bool = False) -> None:
        """Raises `ImageError` where the layout makes no sense; of all else only a read tells.

        *strict*: as of `open_chain`.
        """
        self._image = image
        self.layout = Layout.read(image.source())
        self.chain: Chain = open_chain(image, self.layout, follow, strict=strict)
        self._found: dict[Place, Disk] = {}

    @property
    def members(self) -> tuple[Member, ...]:
        """What became of the files that the image needs, and of those that they need."""
        return self.chain.members

    def generations(self) -> tuple[Generation, ...]:
        """Of the other files that it is read from, as they are now. Raises `ImageReadFailed`."""
        return tuple(image.generation() for image in self.chain.images)

    @property
    def answers_at_once(self) -> bool:
        """Of the image itself: see `Image.answers_at_once`."""
        return self._image.answers_at_once

    @property
    def follows(self) -> bool:
        """Whether it is read from other files too: whoever serves these may not answer."""
        return bool(self.chain.images)

    def state_beneath(self) -> Hashable:
        """Of the other files; see `Generation.state`. Waits for whoever serves them."""
        try:
            return tuple(generation.state() for generation in self.generations())
        except ImageReadFailed:
            return object()

    def signature(self) -> Signature | None:
        """Of the image itself: see `Image.signature`."""
        return self._image.signature()

    def extents(self, offset: int = 0, end: int = LARGEST) -> Iterator[Extents]:
        """The map of the active disk from *offset* to *end*, or as long as it is.

        Raises `ImageReadFailed`, and `ImageError` where it has more rows than anything in the files
        can account for: where tables are at thousands of places.
        """
        most = ROWS_OF_ANY
        for image in (self._image, *self.chain.images):
            most += ROWS_OF_A_BYTE * image.source().stored_bytes()
        disk = _qcow2_stratum(self.chain.disk)
        for rows in extents(disk.marked(offset, end), offset, end):
            most -= len(rows)
            if most < 0:
                problem = "it leads to the same L2 tables again and again; the map ends here"
                raise ImageError("l1_table_offset", self.layout.header.l1_table_offset, problem)
            yield rows

    def data_files(self, path: str) -> list[bytes]:
        """Where the data of each member of the chain is, in QEMU's words, *path* being the image.

        Members that are not read are missing at the end.
        """
        holder = os.fsencode(path)
        files = [holder]
        for each in self.members:
            full = full_name(holder, each.named.name)
            if each.named.role is Role.DATA:
                files[-1] = full
            else:
                holder = full
                files.append(full)
        return files

    def known(self, place: Place) -> Disk | None:
        """What `find` has found already. Reads nothing."""
        return self._found.get(place)

    def find(self, place: Place) -> Disk:
        """What is at *place*. Raises `GuestEncrypted`, `SnapshotMissing` and `ImageError`."""
        disk = self._found.get(place)
        if disk is None:
            self._require_plain()
            disk = self._make(place)
            if len(self._found) >= MAX_FOUND:
                self._found.clear()
            self._found[place] = disk
        return disk

    def index_of(self, word: str) -> int:
        """Which snapshot is meant: by its index, or its name. Raises `SnapshotUnknown`."""
        table, error = self._snapshot_table
        if word.isdecimal() and int(word) < len(table.snapshots):
            return int(word)
        name = os.fsencode(word)
        named = [at for at, snapshot in enumerate(table.snapshots) if snapshot.name == name]
        if not named and error is not None:
            raise error
        if len(named) != 1:
            raise SnapshotUnknown(self._image.path, word)
        return named[0]

    @cached_property
    def _snapshot_table(self) -> tuple[SnapshotTable, ImageError | None]:
        """Read once: there may be 65,536 of them, and whoever looks at all asks for each."""
        layout = self.layout
        return read_reachable_snapshots(self._image.source(), layout.header, layout.geometry)

    def _make(self, place: Place) -> Disk:
        if place.part is Part.DISK:
            return Disk(self.chain.disk, self.chain.disk.size)
        if place.part in (Part.LOST_TABLE, Part.LOST_SNAPSHOT):
            return self._make_lost(place)
        table, error = self._snapshot_table
        if place.index >= len(table.snapshots):
            if error is not None:
                raise error
            raise SnapshotMissing(self._image.path, place.index)
        snapshot, geometry = table.snapshots[place.index], self.layout.geometry
        size = size_of(place, snapshot, geometry)
        start = 0
        if place.part is Part.VMSTATE:
            # Behind the disk, from where the next L1 entry begins: qcow2_vm_state_offset.
            end = size_of(Place(Part.SNAPSHOT, place.index), snapshot, geometry)
            start = -(-end // geometry.l2_coverage) * geometry.l2_coverage
        return Disk(self._layer(snapshot, start + size), size, start)

    def _make_lost(self, place: Place) -> Disk:
        """What a table maps that nothing leads to: what of it cannot be read is an error."""
        beneath = replace(self.chain.disk.beneath, strict=True)
        if place.part is Part.LOST_SNAPSHOT:
            mapping = beneath.mapping(place.index, place.entries)
        else:
            if self.layout.backing_file:
                name = os.fsdecode(self.layout.backing_file)
                why = "where the table belongs is not known"
                beneath = replace(beneath, backing=Missing(name, why))
            mapping = beneath.mapping_of_table(place.index)
        return Disk(Qcow2Layer(beneath, mapping, place.size), place.size)

    def _layer(self, snapshot: Snapshot, size: int) -> Qcow2Layer:
        offset, entries = snapshot.l1_table_offset, snapshot.l1_size
        geometry = self.layout.geometry
        check_table("snapshot L1 table", offset, entries * 8, MAX_L1_BYTES, geometry)
        beneath = self.chain.disk.beneath
        return Qcow2Layer(beneath, beneath.mapping(offset, entries), size)

    def _require_plain(self) -> None:
        method = self.layout.header.crypt_method
        if method != CRYPT_NONE:
            raise GuestEncrypted(self._image.path, CRYPT_NAMES[method])


def disk_extents(
    disk: Disk, offset: int, end: int, reading: Reading = read_freely
) -> Iterator[Extents]:
    """The map of a part of *disk*, whatever it is of; rows start where its layer has them.

    *reading*: see `planner.guest.extents.extents`.
    """
    return extents(disk_stratum(disk), disk.start + offset, disk.start + end, reading)


def disk_stratum(disk: Disk) -> Stratum:
    """What `disk_extents` has to know, for one who asks many times: to find it out reads tables."""
    return _qcow2_stratum(disk.layer)


def stratum_of(layer: RawLayer | Qcow2Layer | Missing | None) -> Stratum | int | None:
    """What the map has to know of a disk, and of those beneath it. Raises `ImageReadFailed`."""
    if layer is None:
        return None
    if isinstance(layer, Missing):
        return UNKNOWN
    if isinstance(layer, RawLayer):
        return Stratum(None, layer.file.source(), layer.size)
    return _qcow2_stratum(layer)


def _qcow2_stratum(layer: Qcow2Layer) -> Stratum:
    beneath = layer.beneath
    return Stratum(
        layer.mapping,
        None if isinstance(beneath.data, Missing) else beneath.data.source(),
        layer.size,
        sparse=_has_preallocated_metadata(layer),
        hidden=beneath.layout.header.crypt_method != CRYPT_NONE,
        backing=stratum_of(beneath.backing),
    )


def _has_preallocated_metadata(layer: Qcow2Layer) -> bool:
    beneath = layer.beneath
    source, allocated = beneath.file.source(), beneath.file.image.allocated_size()
    try:
        return has_preallocated_metadata(source, beneath.layout, allocated)
    except ReadFailed:
        if not beneath.strict:
            raise
        return True  # holes are looked for then, which is slow and does no harm
