"""Guest bytes by offset: through an L1 table, its data file, and what lies beneath in the chain.

Everything about turning runs into bytes is here: reading, unpacking, falling through to the
backing file. Where the runs come from is `planner.mapping`'s business, which files there are that
of `instarfs.guest.chain`. Follows qcow2_co_preadv_part and bdrv_co_preadv: past the end of a file
or of a backing disk there are zeros.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from dataclasses import dataclass

from instarfs.errors import GuestDamaged, GuestElsewhere
from instarfs.guest.unpack import NotUnpacked, unpack
from instarfs.image import FileSource, Image, WouldBlock
from planner.mapping import FLAW_SENTENCES, Flaw, Mapping, RunKind, Runs
from planner.qcow2.geometry import SECTOR
from planner.qcow2.layout import Layout

UNPACKED_BYTES = 8 << 20
"""Of decompressed clusters: so much is kept, for a cluster is read in parts."""


class HostFile:
    """A file that guest bytes are read from."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self._patient, self._hasty = image.source(), image.source(wait=False)

    def source(self, *, wait: bool = True) -> FileSource:
        """Its bytes; see `FileSource` for *wait*."""
        return self._patient if wait else self._hasty


@dataclass(frozen=True, slots=True)
class Missing:
    """A file that would be needed, by the name that is stored, and why it is not read."""

    name: str
    refusal: str


class RawLayer:
    """A disk that lies in a file byte for byte."""

    def __init__(self, file: HostFile) -> None:
        self.file = file
        # QEMU counts disks in whole sectors.
        self.size = -(-file.source().size // SECTOR) * SECTOR

    def fill(self, offset: int, view: memoryview, *, wait: bool) -> None:
        """As `Qcow2Layer.fill`."""
        self.file.source(wait=wait).read_into(offset, view)


@dataclass(frozen=True, slots=True)
class Beneath:
    """What all disks of a qcow2 image are read from: its file, its data file, its backing disk."""

    file: HostFile
    data: HostFile | Missing
    backing: RawLayer | Qcow2Layer | Missing | None
    layout: Layout


class Qcow2Layer:
    """A disk that an L1 table of a qcow2 image maps, *size* bytes of it."""

    def __init__(self, beneath: Beneath, mapping: Mapping, size: int) -> None:
        self.beneath, self.mapping, self.size = beneath, mapping, size
        self.file, self.data, self.backing = beneath.file, beneath.data, beneath.backing
        self._unpacked = _Unpacked(UNPACKED_BYTES // mapping.geometry.cluster_size)

    def fill(self, offset: int, view: memoryview, *, wait: bool) -> None:
        """Bring what is not zero from *offset* on into *view*, which is all zeros.

        What is past the end of the disk stays zeros. Raises `GuestDamaged`, `GuestElsewhere` and
        `ImageReadFailed`, and without *wait* `WouldBlock`.
        """
        end = min(offset + len(view), self.size)
        source = self.file.source(wait=wait)
        position = offset
        while position < end:
            runs = self.mapping.window(position // self.mapping.window_size, source)
            starts, lengths = runs.guest.data, runs.length.data
            at = bisect_right(starts, position) - 1
            while position < end and at < len(runs):
                stop = min(end, starts[at] + lengths[at])
                self._fill_run(runs, at, position, view[position - offset : stop - offset], wait)
                position, at = stop, at + 1

    def _fill_run(self, runs: Runs, at: int, position: int, view: memoryview, wait: bool) -> None:
        """Fill *view*, a part of run *at*, from guest offset *position* on."""
        kind = int(runs.kind[at])
        if kind == RunKind.DATA:
            if isinstance(self.data, Missing):
                raise self._elsewhere(position, self.data)
            inside = position - int(runs.guest[at])
            self.data.source(wait=wait).read_into(int(runs.host[at]) + inside, view)
        elif kind == RunKind.COMPRESSED:
            inside = position - int(runs.guest[at])
            cluster = self._cluster(position, int(runs.host[at]), int(runs.stored[at]), wait)
            view[:] = cluster[inside : inside + len(view)]
        elif kind == RunKind.UNALLOCATED:
            self._fill_from_backing(position, view, wait)
        elif kind == RunKind.DAMAGED:
            sentence = FLAW_SENTENCES[Flaw(int(runs.flaw[at]))]
            raise GuestDamaged(self.file.image.path, position, sentence)

    def _fill_from_backing(self, position: int, view: memoryview, wait: bool) -> None:
        if isinstance(self.backing, Missing):
            raise self._elsewhere(position, self.backing)
        if self.backing is not None:
            self.backing.fill(position, view, wait=wait)

    def _cluster(self, position: int, host: int, stored: int, wait: bool) -> bytes:
        """The decompressed cluster whose *stored* bytes begin at *host*."""
        cluster = self._unpacked.get(host)
        if cluster is None:
            if not wait:
                raise WouldBlock
            raw = bytearray(stored)
            self.file.source().read_into(host, memoryview(raw))
            try:
                size = self.mapping.geometry.cluster_size
                cluster = unpack(raw, size, self.beneath.layout.header.compression_type)
            except NotUnpacked as error:
                raise GuestDamaged(self.file.image.path, position, str(error)) from error
            self._unpacked.keep(host, cluster)
        return cluster

    def _elsewhere(self, position: int, missing: Missing) -> GuestElsewhere:
        path = self.file.image.path
        return GuestElsewhere(path, position, missing.name, missing.refusal)


class _Unpacked:
    """The clusters that were decompressed last, by host offset; for several threads."""

    def __init__(self, count: int) -> None:
        self._count = max(1, count)
        self._clusters: dict[int, bytes] = {}
        self._lock = threading.Lock()

    def get(self, host: int) -> bytes | None:
        return self._clusters.get(host)

    def keep(self, host: int, cluster: bytes) -> None:
        with self._lock:
            self._clusters[host] = cluster
            if len(self._clusters) > self._count:
                del self._clusters[next(iter(self._clusters))]


@dataclass(frozen=True, slots=True)
class Disk:
    """What a file of the mount shows: *size* bytes of a layer, from *start* on."""

    layer: Qcow2Layer
    size: int
    start: int = 0

    def read(self, offset: int, size: int, *, wait: bool = True) -> bytearray:
        """*size* bytes from *offset*, fewer only at the end. Raises as `Qcow2Layer.fill` does."""
        content = bytearray(max(0, min(size, self.size - offset)))
        self.layer.fill(self.start + offset, memoryview(content), wait=wait)
        return content
