"""How large a disk was of which the header is gone: what its partitions or file system say.

An L1 table tells it only to the coverage of a table, 512 MiB with clusters of 64 KiB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from planner.errors import ReadFailed
from planner.guest.mapping import Mapping, RunKind
from planner.guestfs.known import MARKS, recognise
from planner.guestfs.reading import Holes
from planner.guestfs.volumes.partitions import read_table
from planner.guestfs.work import Work, WorkSpent
from planner.qcow2.header import SIGNED_MAX, Header
from planner.qcow2.snapshots import Snapshots, read_reachable_snapshots
from planner.source import SECTOR, Source, read_bytes


@dataclass(frozen=True, slots=True)
class DiskSize:
    """Bytes of a disk, and what tells. ``is_exact``: that it is no more."""

    size: int
    evidence: str
    is_exact: bool


class GuestBytes:
    """The disk that *header* maps in *source*, as a source; what is compressed fails.

    *work*: what reading it is taken from; raises `WorkSpent` where that is done.
    """

    def __init__(self, source: Source, header: Header, size: int, work: Work | None = None) -> None:
        self._source, self._size, self._work = source, size, work or Work()
        self._mapping = Mapping(source, header.geometry, header.l1_table_offset, header.l1_size)

    @property
    def size(self) -> int:
        return self._size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Raises `ReadFailed` for what is compressed or damaged."""
        self._work.ask()  # the tables
        self._work.read(len(buffer))
        buffer[:] = bytes(len(buffer))
        end = min(offset + len(buffer), self._size)
        if end <= offset:
            return
        runs = self._mapping.runs(offset, end)
        for at in np.flatnonzero(~np.isin(runs.kind, _ZEROS)).tolist():
            if runs.kind[at] != RunKind.DATA:
                raise ReadFailed
            start, length = int(runs.guest[at]) - offset, int(runs.length[at])
            self._source.read_into(int(runs.host[at]), buffer[start : start + length])

    def data_extents(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        """All of it: nothing of what asks here depends on holes."""
        end = min(offset + length, self._size)
        return [(offset, end)] if offset < end else []

    def first_compressed(self, count: int) -> list[int]:
        """Where the data of the first compressed clusters begins in the file."""
        found: list[int] = []
        for runs in self._mapping.walk(0, self._size, packed=True):
            found += runs.host[runs.kind == RunKind.COMPRESSED].tolist()
            if len(found) >= count:
                break
        return found[:count]

    def allocated(self) -> Iterator[tuple[int, int]]:
        """The ranges that have data in the file, ascending."""
        for runs in self._mapping.walk(0, self._size):
            for at in np.flatnonzero(runs.kind == RunKind.DATA).tolist():
                yield int(runs.guest[at]), int(runs.guest[at] + runs.length[at])

    def mapped_end(self) -> int:
        """Where the last byte ends that is more than unallocated."""
        # From the end, in ever larger steps: before that most of a disk need not be looked at.
        step = end = 0
        coverage = self._mapping.geometry.l2_coverage
        start = -(-self._size // coverage) * coverage
        while start > 0:
            step = max(coverage, 2 * step)
            start, end = max(0, start - step), min(start, self._size)
            last = 0
            for runs in self._mapping.walk(start, end):
                used = np.flatnonzero(runs.kind != RunKind.UNALLOCATED)
                if len(used):
                    last = int(runs.guest[used[-1]] + runs.length[used[-1]])
            if last:
                return last
        return 0


_LOOKED_AT = 16
_ZSTD_FRAME = b"\x28\xb5\x2f\xfd"

_ZEROS = (RunKind.UNALLOCATED, RunKind.ZERO)


def disk_size(source: Source, header: Header, work: Work | None = None) -> DiskSize:
    """Of the disk under *header*, whose L1 table is as long as its clusters allow.

    *work*: what reading the disk is taken from; where that is done, it tells no more.
    """
    # Partitions may end behind all that was ever written.
    most = min(header.l1_size * header.geometry.l2_coverage, SIGNED_MAX // SECTOR * SECTOR)
    guest = GuestBytes(source, header, most, work)
    mapped = guest.mapped_end()
    with suppress(WorkSpent):
        told = _told(Holes(guest), mapped)
        if told is not None:
            return told
    sizes = [size for each in _snapshots(source, header) if (size := each.disk_size) is not None]
    if sizes and sizes[-1] >= mapped:
        return DiskSize(sizes[-1], "its last snapshot says so of itself", False)
    return DiskSize(max(mapped, SECTOR), "nothing is mapped behind it", False)


def _told(disk: Holes, mapped: int) -> DiskSize | None:
    """What *disk* says of itself, if anything; *mapped*: where the last byte of it ends."""
    table = read_table(disk)
    if table is not None:
        last = max((each.start + each.length for each in table.partitions), default=0)
        own = max(start + length for start, length in table.own)
        if table.scheme == "GPT" and own > last:
            return DiskSize(max(own, mapped), "the backup of its partition table is its end", True)
        return DiskSize(max(last, mapped), "its last partition ends there", False)
    # Copies of superblocks say no more, and to look for them takes long on a disk of mere holes.
    is_marked = any(read_bytes(disk, at, len(mark)) == mark for at, mark, _ in MARKS)
    found = recognise(disk) if is_marked else None
    if found is None or found.size < mapped:
        return None
    return DiskSize(-(-found.size // SECTOR) * SECTOR, f"the {found.kind} on it has that", True)


def _snapshots(source: Source, header: Header) -> Snapshots:
    return read_reachable_snapshots(source, header, header.geometry)[0].snapshots


def is_zstd(source: Source, header: Header) -> bool:
    """Whether what is compressed begins as frames of zstd do; RFC 8878, 3.1.1."""
    guest = GuestBytes(source, header, header.size)
    first = guest.first_compressed(_LOOKED_AT)
    return bool(first) and all(read_bytes(source, at, 4) == _ZSTD_FRAME for at in first)
