"""A guest's disk, copied into a sparse file: what can be read, and a list of what cannot.

How a part of the disk is copied, and in which order, is here; what the tables say of it is
`instarfs.guest`'s business, the file and its list that of `instarfs.guest.outfile`. Parts are read
by several threads, and written and accounted for in order: up to where the list says so, everything
was tried.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

import numpy as np

from instarfs.errors import (
    ExportEncrypted,
    ExportStopped,
    ExportTorn,
    GuestDamaged,
    GuestElsewhere,
    GuestEncrypted,
    ImageReadFailed,
    OutFailed,
)
from instarfs.guest.disk import Disk, Missing, Qcow2Layer, RawLayer
from instarfs.guest.follow import Follow
from instarfs.guest.guest import Guest, disk_extents
from instarfs.guest.outfile import Origin, OutFile
from instarfs.guest.place import Part, Place
from instarfs.image.file import Generation, Image
from planner.arrays import I64, U8
from planner.errors import Cancelled, ReadFailed
from planner.guest.extents import UNKNOWN, Extents
from planner.guest.mapfile import BAD, READ, UNTRIED
from planner.guest.mapping import Flaw
from planner.progress import Progress, tell_nobody

PART_BYTES = 2 << 20
"""Of the disk's data: so much is read by one thread at a time."""

PART_PIECES = 256
"""No more stretches than this, however short."""

HOLE_BYTES = 4096
"""So many zeros that lie together are not written."""

PAGE = 4096
"""What is given up together where a disk cannot be read: the kernel reads no less."""

NOTED_TOGETHER = 1 << 14
"""Blocks of the list that are held one by one: as columns they take a tenth of the memory."""

SAVE_SECONDS = 2.0
FLUSH_SECONDS = 20.0
"""How often the list is written, and what is copied flushed to the disk."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an export has come to: bytes of the disk, and of those that could not be read.

    ``elsewhere``: how many of these are in files that are not read, and ``refusal`` why.
    """

    size: int
    unread: int
    elsewhere: int
    refusal: str = ""


class Export:
    """What is to be exported: one disk of an opened image. Reads only."""

    def __init__(self, image: Image, follow: Follow, snapshot: str | None = None) -> None:
        """*snapshot*: its index or its name; None: the active disk.

        Raises `ImageError` and `SnapshotUnknown`; `ExportEncrypted` where no byte can be read.
        """
        self._image = image
        self._guest = Guest(image, follow, strict=True)
        self._place = Place(Part.DISK)
        if snapshot is not None:
            self._place = Place(Part.SNAPSHOT, self._guest.index_of(snapshot))
        try:
            self._disk = self._guest.find(self._place)
        except GuestEncrypted as error:
            raise ExportEncrypted(error.path, error.method) from error
        self._generations = self._all_generations()

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._disk.size

    @property
    def refusal(self) -> str:
        """Why a file that the disk is in is not read; empty where all are."""
        refusals = [each.refusal for each in self._guest.members if each.refusal is not None]
        return refusals[-1] if refusals else ""

    def origin(self) -> Origin:
        """What it is read from, as it was when this was made."""
        members = [each for each in self._guest.members if each.path is not None]
        roles = ["image", *(f"{each.named.role} {each.depth}" for each in members)]
        files = dict(zip(roles, map(_shown, self._generations), strict=True))
        disk = "disk" if self._place.part is Part.DISK else f"snapshot {self._place.index}"
        return Origin(self._image.path, disk + self._image.edition, self.size, files)

    def has_changed(self) -> bool:
        """Whether any of the files is not what it was when this was made."""
        return self._all_generations() != self._generations

    def _all_generations(self) -> tuple[Generation, ...]:
        return (self._image.generation(), *self._guest.generations())

    def run(self, out: OutFile, progress: Progress = tell_nobody) -> Outcome:
        """Copy all of the disk that *out* does not have. *progress*: bytes of the disk tried.

        Raises `ExportStopped`, `ExportTorn` and `OutFailed`; what was copied by then is listed.
        """
        return _Run(self, self._disk, out, progress).run()


def _shown(generation: Generation) -> str:
    """What tells a file from any other, and from what it is after it was written to.

    Not when its inode was changed, as by a new name, nor its file system's number, which another
    start of the machine may change.
    """
    if generation.written:
        return f"device {generation.device}, {generation.size} bytes, {generation.written} written"
    return f"inode {generation.inode}, {generation.size} bytes, written at {generation.mtime_ns}"


@dataclass(slots=True)
class _PartOfDisk:
    """Guest bytes from ``start`` to ``end``: stretches to be read, and those that cannot be.

    What is in neither is zeros. ``found``: what was read and is no zeros, by guest offset; in
    ``buffer``, as long as that is not another's.
    """

    start: int
    end: int
    data: list[tuple[int, int]] = field(default_factory=list)
    bad: list[tuple[int, int]] = field(default_factory=list)
    elsewhere: int = 0
    found: list[tuple[int, memoryview]] = field(default_factory=list)
    buffer: U8 | None = None

    @property
    def is_full(self) -> bool:
        pieces = len(self.data) + len(self.bad)
        return pieces >= PART_PIECES or sum(end - start for start, end in self.data) >= PART_BYTES


class _Run:
    """One run of an export."""

    def __init__(self, export: Export, disk: Disk, out: OutFile, progress: Progress) -> None:
        self._export, self._disk, self._out = export, disk, out
        self._progress = progress
        self._reader = _Reader(disk)
        self._base = out.mapfile
        # What became of which: the last of them, and those before, (start, end, status) a row.
        self._blocks: list[tuple[int, int, int]] = []
        self._noted: list[I64] = []
        self._elsewhere, self._tried = 0, 0
        self._flushing: tuple[Future[None], int] | None = None
        self._saved_at = self._flushed_at = time.monotonic()

    def run(self) -> Outcome:
        threads = min(4, 1 + (os.cpu_count() or 1))
        with (
            ThreadPoolExecutor(threads, "instarfs-export") as readers,
            ThreadPoolExecutor(1, "instarfs-flush") as flusher,
        ):
            pending: deque[tuple[_PartOfDisk, Future[_PartOfDisk]]] = deque()
            try:
                self._copy_all(readers, flusher, pending)
            finally:
                for _, left in pending:
                    left.cancel()
        self._save()
        if self._export.has_changed():
            raise self._torn()
        mapfile = self._out.mapfile
        return Outcome(mapfile.size, mapfile.bytes_of(BAD), self._elsewhere, self._export.refusal)

    def _copy_all(
        self,
        readers: ThreadPoolExecutor,
        flusher: ThreadPoolExecutor,
        pending: deque[tuple[_PartOfDisk, Future[_PartOfDisk]]],
    ) -> None:
        try:
            for part in self._parts():
                pending.append((part, readers.submit(self._reader.read, part)))
                while len(pending) > 8 or (pending and pending[0][1].done()):
                    self._account(pending.popleft()[1].result())
                self._tell()
                self._keep(flusher)
            while pending:
                self._account(pending.popleft()[1].result())
                self._tell()
        except Cancelled:
            for _, reading in pending:
                self._account(reading.result())
            self._save()
            left = self._out.mapfile.bytes_of(UNTRIED)
            size = self._out.mapfile.size
            raise ExportStopped(self._out.path, size - left, size) from None

    # ---- what is where ----

    def _parts(self) -> Iterator[_PartOfDisk]:
        for low, high in self._base.blocks(UNTRIED, BAD):
            self._tried = low
            part = _PartOfDisk(low, low)
            for rows in disk_extents(self._disk, low, high):
                for start, end, flaw in _stretches(rows, self._unread_depths()):
                    stretch = start - self._disk.start, end - self._disk.start
                    for first, last in [stretch] if flaw else _cut(*stretch):
                        if flaw:
                            part.bad.append((first, last))
                            part.elsewhere += last - first if flaw == UNKNOWN else 0
                        else:
                            part.data.append((first, last))
                        part.end = last
                        if part.is_full:
                            yield part
                            part = _PartOfDisk(last, last)
                part.end = int(rows.start[-1] + rows.length[-1]) - self._disk.start
            yield part

    def _unread_depths(self) -> list[int]:
        """How deep in the chain are the disks the data files of which are not read."""
        found, layer, depth = [], self._disk.layer, 0
        below: RawLayer | Qcow2Layer | Missing | None = layer
        while isinstance(below, Qcow2Layer):
            if isinstance(below.data, Missing):
                found.append(depth)
            below, depth = below.backing, depth + 1
        return found

    # ---- what became of it ----

    def _account(self, part: _PartOfDisk) -> None:
        """*part* was read: write what was found, and note what of it is bad."""
        for offset, content in part.found:
            self._out.write(offset, content)
        self._reader.give_back(part)
        position = part.start
        for start, end in sorted(part.bad):
            self._note(position, start, READ)
            self._note(start, end, BAD)
            position = end
        self._note(position, part.end, READ)
        self._elsewhere += part.elsewhere
        self._tried = part.end

    def _tell(self) -> None:
        self._progress("export", self._tried, self._export.size)

    def _note(self, start: int, end: int, status: int) -> None:
        if start >= end:
            return
        if self._blocks and self._blocks[-1][1:] == (start, status):
            start = self._blocks.pop()[0]
        self._blocks.append((start, end, status))
        if len(self._blocks) >= NOTED_TOGETHER:
            self._put_away()

    def _put_away(self) -> None:
        """Hold the blocks that were noted in columns: there may be millions."""
        self._noted.append(np.array(self._blocks, dtype=np.int64).reshape(-1, 3))
        self._blocks.clear()

    def _keep(self, flusher: ThreadPoolExecutor) -> None:
        """Write the list, and have the copy flushed, when it is time."""
        now = time.monotonic()
        if self._flushing is not None and self._flushing[0].done():
            try:
                self._flushing[0].result()
            except OutFailed:
                self._out.forget_unflushed()
                raise
            self._save(self._flushing[1])
            self._flushing = None
        elif self._flushing is None and now > self._flushed_at + FLUSH_SECONDS:
            self._flushing = flusher.submit(self._out.flush), self._tried
            self._flushed_at = now
        if now > self._saved_at + SAVE_SECONDS:
            if self._export.has_changed():
                raise self._torn()
            self._save()
            # A list of a million bad blocks takes long to write.
            self._saved_at = time.monotonic() + 20 * (time.monotonic() - now)

    def _save(self, flushed: int | None = None) -> None:
        self._put_away()
        self._noted = [np.concatenate(self._noted)]
        self._out.save(self._base.overlaid(self._noted[0]), self._tried, flushed)

    def _torn(self) -> ExportTorn:
        return ExportTorn(self._export.origin().image, self._out.path, self._out.map_path)


def _stretches(rows: Extents, unread: list[int]) -> Iterator[tuple[int, int, int]]:
    """Start, end and flaw of what in *rows* is no zeros, neighbours together.

    *unread*: at these depths the data is in a file that is not read.
    """
    held = rows.data & ~rows.zero
    flaw = np.where(held & np.isin(rows.depth, unread), UNKNOWN, rows.flaw)
    sort = np.where(flaw != Flaw.NONE, flaw.astype(np.int64), np.where(held, 0, -1))
    first = np.flatnonzero(np.diff(sort, prepend=-2))
    starts = rows.start[first]
    ends = np.append(starts[1:], rows.start[-1] + rows.length[-1])
    sort = sort[first]
    some = sort >= 0
    yield from zip(starts[some].tolist(), ends[some].tolist(), sort[some].tolist(), strict=True)


def _cut(start: int, end: int) -> Iterator[tuple[int, int]]:
    """The stretch in parts that one thread reads; those within begin where a multiple ends."""
    while start < end:
        stop = min(end, start // PART_BYTES * PART_BYTES + PART_BYTES)
        yield start, stop
        start = stop


class _Reader:
    """Reads parts, in several threads."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._smallest = _smallest_cluster(disk.layer)
        self._buffers: SimpleQueue[U8] = SimpleQueue()

    def read(self, part: _PartOfDisk) -> _PartOfDisk:
        """*part* with what was found. What could not be read of its data is bad."""
        part.buffer = self._buffer()
        at = 0
        for start, end in part.data:
            self._read(part, start, end, part.buffer[at : at + end - start])
            at += end - start
        return part

    def _read(self, part: _PartOfDisk, start: int, end: int, content: U8) -> None:
        try:
            self._disk.layer.fill(self._disk.start + start, content.data, wait=True)
        except (GuestDamaged, GuestElsewhere, ImageReadFailed) as error:
            unit = PAGE if isinstance(error, ReadFailed) else self._smallest
            middle = (start + end) // 2 // unit * unit
            if middle <= start:
                middle = start // unit * unit + unit
            if middle >= end:
                part.bad.append((start, end))
                part.elsewhere += end - start if isinstance(error, GuestElsewhere) else 0
                return
            self._read(part, start, middle, content[: middle - start])
            self._read(part, middle, end, content[middle - start :])
        else:
            for low, high in _without_zeros(content):
                part.found.append((start + low, content[low:high].data))

    def _buffer(self) -> U8:
        """One that was given back: memory that is new costs as much as what is done with it."""
        try:
            return self._buffers.get_nowait()
        except Empty:
            return np.empty(2 * PART_BYTES, dtype=np.uint8)

    def give_back(self, part: _PartOfDisk) -> None:
        """What was found in *part* is no longer needed."""
        if part.buffer is not None:
            self._buffers.put(part.buffer)
        part.found, part.buffer = [], None


def _smallest_cluster(layer: Qcow2Layer) -> int:
    """Bytes of the smallest cluster in a chain."""
    sizes, below = [layer.mapping.geometry.cluster_size], layer.backing
    while isinstance(below, Qcow2Layer):
        sizes.append(below.mapping.geometry.cluster_size)
        below = below.backing
    return min(sizes)


def _without_zeros(content: U8) -> list[tuple[int, int]]:
    """The stretches of *content* that are not `HOLE_BYTES` of zeros, in such steps."""
    whole = len(content) // HOLE_BYTES
    holds = np.ones(whole + 1, dtype=np.bool_)
    holds[whole] = content[whole * HOLE_BYTES :].any()
    words = content[: whole * HOLE_BYTES].view(np.uint64).reshape(whole, HOLE_BYTES // 8)
    # Of most data the first word says enough.
    unsure = np.flatnonzero((words[:, 0] == 0) & (words[:, -1] == 0))
    holds[unsure] = [bool(words[at].any()) for at in unsure.tolist()]
    edges = np.flatnonzero(np.diff(holds, prepend=False, append=False)).reshape(-1, 2)
    return [
        (low * HOLE_BYTES, min(high * HOLE_BYTES, len(content))) for low, high in edges.tolist()
    ]
