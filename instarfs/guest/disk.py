"""Guest bytes by offset: through an L1 table, its data file, and what lies beneath in the chain.

Everything about turning runs into bytes is here: reading, unpacking, falling through to the backing
file. Where the runs come from is `planner.guest.mapping`'s business, which files there are that of
`instarfs.guest.chain`. Follows qcow2_co_preadv_part and bdrv_co_preadv: past the end of a file or
of a backing disk there are zeros.
"""

from __future__ import annotations

import functools
import os
import threading
from bisect import bisect_right
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass

import numpy as np

from instarfs.errors import GuestDamaged, GuestElsewhere
from instarfs.guest.unpack import NotUnpacked, unpack
from instarfs.image.file import FileSource, Image, WouldBlock
from planner.errors import as_value
from planner.guest.mapping import FLAW_SENTENCES, Flaw, Mapping, RunKind, Runs
from planner.qcow2.geometry import SECTOR
from planner.qcow2.layout import Layout
from planner.source import Patched

MAX_STORED_BYTES = 4 << 20
"""Of compressed clusters that lie next to each other: so much is fetched in one read."""

ANYWHERE = 1 << 62
"""The end of a file that is not read."""

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
    """What all disks of a qcow2 image are read from: its file, its data file, its backing disk.

    ``strict``: whether what is not there is an error, rather than the zeros that QEMU reads.
    """

    file: HostFile
    data: HostFile | Missing
    backing: RawLayer | Qcow2Layer | Missing | None
    layout: Layout
    strict: bool = False

    def mapping(self, l1_offset: int, l1_size: int) -> Mapping:
        """Of the disk whose L1 table is there."""
        source, geometry = self.file.source(), self.layout.geometry
        return Mapping(source, geometry, l1_offset, l1_size, data_end=self._data_end)

    def mapping_of_table(self, l2_offset: int) -> Mapping:
        """Of what the L2 table at *l2_offset* maps, as if it were the first of a disk."""
        # The entry that is missing, where no table can be.
        source = Patched(self.file.source(), 0, l2_offset.to_bytes(8, "big"))
        return Mapping(source, self.layout.geometry, 0, 1, data_end=self._data_end)

    @property
    def _data_end(self) -> int | None:
        if not self.strict:
            return None
        return ANYWHERE if isinstance(self.data, Missing) else self.data.source().size


class Qcow2Layer:
    """A disk that an L1 table of a qcow2 image maps, *size* bytes of it."""

    def __init__(self, beneath: Beneath, mapping: Mapping, size: int) -> None:
        self.beneath, self.mapping, self.size = beneath, mapping, size
        self.file, self.data, self.backing = beneath.file, beneath.data, beneath.backing
        self._unpacked = _Unpacked(UNPACKED_BYTES // mapping.geometry.cluster_size)
        self.unpacked_bytes = 0
        """How much came out of compressed clusters so far, or was to."""

    def fill(self, offset: int, view: memoryview, *, wait: bool) -> None:
        """Fill *view* from *offset* on, with zeros past the end of the disk.

        Raises `GuestDamaged`, `GuestElsewhere` and `ImageReadFailed`, and without *wait*
        `WouldBlock`.
        """
        end = min(offset + len(view), self.size)
        source = self.file.source(wait=wait)
        position = offset
        while position < end:
            runs = self.mapping.window(position // self.mapping.window_size, source)
            # Plain numbers out of these: comparing a number of numpy's own takes 4 microseconds.
            starts, lengths, kinds = runs.guest.data, runs.length.data, runs.kind.data
            at = bisect_right(starts, position) - 1
            while position < end and at < len(runs):
                packed = kinds[at] == RunKind.COMPRESSED
                last = self._packed_until(runs, at, end) if packed else at
                stop = min(end, starts[last] + lengths[last])
                part = view[position - offset : stop - offset]
                if packed:
                    self._fill_packed(runs, range(at, last + 1), position, part, wait)
                else:
                    self._fill_run(runs, at, position, part, wait)
                position, at = stop, last + 1
        if end - offset < len(view):
            _clear(view[max(0, end - offset) :])

    def _packed_until(self, runs: Runs, at: int, end: int) -> int:
        """The last of the compressed runs from *at* on, up to guest offset *end*."""
        beyond = int(np.searchsorted(runs.guest, end, side="left"))
        others = np.flatnonzero(runs.kind[at:beyond] != RunKind.COMPRESSED)
        return at + int(others[0]) - 1 if len(others) else beyond - 1

    def _fill_run(self, runs: Runs, at: int, position: int, view: memoryview, wait: bool) -> None:
        """Fill *view*, a part of run *at*, from guest offset *position* on."""
        kind = int(runs.kind[at])
        if kind == RunKind.DATA:
            if isinstance(self.data, Missing):
                raise self._elsewhere(position, self.data)
            inside = position - int(runs.guest[at])
            self.data.source(wait=wait).read_into(int(runs.host[at]) + inside, view)
        elif kind == RunKind.ZERO:
            _clear(view)
        elif kind == RunKind.UNALLOCATED:
            self._fill_from_backing(position, view, wait)
        else:
            sentence = FLAW_SENTENCES[Flaw(int(runs.flaw[at]))]
            raise GuestDamaged(self.file.image.path, position, sentence)

    def _fill_packed(
        self, runs: Runs, which: range, position: int, view: memoryview, wait: bool
    ) -> None:
        """Fill *view*, which the compressed runs *which* cover, from guest offset *position* on.

        Clusters are unpacked by as many threads as there are processors. One of which only a part
        is asked for is kept: the rest of it is likely to be next.
        """
        size = self.mapping.geometry.cluster_size
        places = {at: (int(runs.host[at]), int(runs.stored[at])) for at in which}
        known = {at: self._unpacked.get(place) for at, place in places.items()}
        unknown = [at for at, cluster in known.items() if cluster is None]
        raw = self._stored(runs, unknown) if wait else {}

        def unpack_each(some: range) -> None:
            for at in some:
                guest, place, cluster = int(runs.guest[at]), places[at], known[at]
                start, stop = max(guest, position), min(guest + size, position + len(view))
                if cluster is None:
                    if not wait:
                        raise WouldBlock
                    cluster = self._unpack(raw[at])
                    self.unpacked_bytes += size
                # Of one that cannot be read the halves are tried, down to single sectors.
                if stop - start < size or isinstance(cluster, NotUnpacked):
                    self._unpacked.keep(place, cluster)
                if isinstance(cluster, NotUnpacked):
                    raise GuestDamaged(self.file.image.path, guest, str(cluster))
                view[start - position : stop - position] = cluster[start - guest : stop - guest]

        if not wait or len(which) < 2:
            unpack_each(which)
        else:
            share = -(-len(which) // _processors())
            shares = [which[at : at + share] for at in range(0, len(which), share)]
            others = [_unpackers().submit(unpack_each, each) for each in shares[1:]]
            try:
                unpack_each(shares[0])
            finally:
                wait_for(others)
            for other in others:
                other.result()

    def _stored(self, runs: Runs, which: Iterable[int]) -> dict[int, memoryview]:
        """The stored bytes of compressed clusters, neighbours fetched in one read."""
        source, found = self.file.source(), {}
        order = sorted(which, key=lambda at: int(runs.host[at]))
        while order:
            start = int(runs.host[order[0]])
            end, count = start, 0
            for at in order:
                # The last sector of one cluster is often the first of the next.
                if int(runs.host[at]) > end or end - start > MAX_STORED_BYTES:
                    break
                end = max(end, int(runs.host[at] + runs.stored[at]))
                count += 1
            span = memoryview(bytearray(end - start))
            source.read_into(start, span)
            for at in order[:count]:
                low = int(runs.host[at]) - start
                found[at] = span[low : low + int(runs.stored[at])]
            order = order[count:]
        return found

    def _fill_from_backing(self, position: int, view: memoryview, wait: bool) -> None:
        if isinstance(self.backing, Missing):
            raise self._elsewhere(position, self.backing)
        if self.backing is None:
            _clear(view)
        else:
            self.backing.fill(position, view, wait=wait)

    def _unpack(self, stored: memoryview) -> bytes | NotUnpacked:
        size, layout = self.mapping.geometry.cluster_size, self.beneath.layout
        try:
            return unpack(stored, size, layout.header.compression_type)
        except NotUnpacked as error:
            return as_value(error)

    def _elsewhere(self, position: int, missing: Missing) -> GuestElsewhere:
        path = self.file.image.path
        return GuestElsewhere(path, position, missing.name, missing.refusal)


@functools.cache
def _unpackers() -> ThreadPoolExecutor:
    """Threads that decompress, shared by all reads; numpy and zlib let them run side by side."""
    return ThreadPoolExecutor(_processors(), "unpack")


def _processors() -> int:
    return os.cpu_count() or 1


def _clear(view: memoryview) -> None:
    if len(view):
        np.frombuffer(view, dtype=np.uint8).fill(0)


class _Unpacked:
    """The clusters that were decompressed last, by host offset and how much is stored, or why they
    cannot be; for several threads.
    """

    def __init__(self, count: int) -> None:
        self._count = max(1, count)
        self._clusters: dict[tuple[int, int], bytes | NotUnpacked] = {}
        self._lock = threading.Lock()

    def get(self, place: tuple[int, int]) -> bytes | NotUnpacked | None:
        return self._clusters.get(place)

    def keep(self, place: tuple[int, int], cluster: bytes | NotUnpacked) -> None:
        with self._lock:
            self._clusters[place] = cluster
            if len(self._clusters) > self._count:
                del self._clusters[next(iter(self._clusters))]


@dataclass(frozen=True, slots=True)
class Disk:
    """What a file of the mount shows: *size* bytes of a layer, from *start* on."""

    layer: Qcow2Layer
    size: int
    start: int = 0

    def read(self, offset: int, size: int, *, wait: bool = True) -> memoryview:
        """*size* bytes from *offset*, fewer only at the end. Raises as `Qcow2Layer.fill` does."""
        size = max(0, min(size, self.size - offset))
        # Not cleared first: that would take half as long as the read itself.
        view = np.empty(size, dtype=np.uint8).data
        self.layer.fill(self.start + offset, view, wait=wait)
        return view
