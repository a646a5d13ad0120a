"""The snapshot table: reading it, entry by entry, and its encoding.

Source: docs/interop/qcow2.txt, "Snapshots"; qcow2_do_read_snapshots for what QEMU refuses.
"""

from __future__ import annotations

from dataclasses import dataclass

from construct import Int16ub, Int32ub, Int64ub, Struct

from planner.errors import ImageError
from planner.qcow2.fixed import Fixed
from planner.qcow2.geometry import Geometry
from planner.qcow2.header import SIGNED_MAX, Header
from planner.source import READABLE_END, Source, read_bytes

MAX_SNAPSHOTS = 65536
MAX_TABLE_BYTES = MAX_SNAPSHOTS * 1024
MAX_EXTRA_DATA = 1024
KNOWN_EXTRA_DATA = 24
"""Bytes of extra data that have a meaning: VM state size, disk size, icount."""

REQUIRED_EXTRA_DATA = 16
"""Bytes of extra data that every entry of a version 3 image must have."""

ENTRY = Struct(
    "l1_table_offset" / Int64ub,
    "l1_size" / Int32ub,
    "id_str_size" / Int16ub,
    "name_size" / Int16ub,
    "date_sec" / Int32ub,
    "date_nsec" / Int32ub,
    "vm_clock_nsec" / Int64ub,
    "vm_state_size" / Int32ub,
    "extra_data_size" / Int32ub,
)
ENTRY_BYTES = ENTRY.sizeof()
_FIXED = Fixed(ENTRY)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One entry of the snapshot table; ``offset`` is where it stands in the file, bytes.

    ``cut``: how many bytes of extra data it has beyond ``extra_data``, where there are too many.
    """

    offset: int
    l1_table_offset: int
    l1_size: int
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size_32: int
    extra_data: bytes
    id_str: bytes
    name: bytes
    cut: int = 0

    @property
    def vm_state_size(self) -> int:
        if len(self.extra_data) >= 8:
            return int.from_bytes(self.extra_data[:8], "big")
        return self.vm_state_size_32

    @property
    def disk_size(self) -> int | None:
        """Virtual size when the snapshot was taken; None where the entry does not say."""
        if len(self.extra_data) >= 16:
            return int.from_bytes(self.extra_data[8:16], "big")
        return None

    @property
    def icount(self) -> int | None:
        if len(self.extra_data) >= 24:
            value = int.from_bytes(self.extra_data[16:24], "big")
            return None if value == (1 << 64) - 1 else value
        return None


@dataclass(frozen=True, slots=True)
class SnapshotTable:
    """All snapshots, and the length in bytes of the table that lists them."""

    offset: int = 0
    length: int = 0
    snapshots: tuple[Snapshot, ...] = ()


def encode_snapshot(snapshot: Snapshot) -> bytes:
    """One entry, padded to eight bytes: the inverse of decoding."""
    raw: bytes = ENTRY.build(
        {
            "l1_table_offset": snapshot.l1_table_offset,
            "l1_size": snapshot.l1_size,
            "id_str_size": len(snapshot.id_str),
            "name_size": len(snapshot.name),
            "date_sec": snapshot.date_sec,
            "date_nsec": snapshot.date_nsec,
            "vm_clock_nsec": snapshot.vm_clock_nsec,
            "vm_state_size": snapshot.vm_state_size_32,
            "extra_data_size": len(snapshot.extra_data),
        }
    )
    raw += snapshot.extra_data + snapshot.id_str + snapshot.name
    return raw.ljust(-(-len(raw) // 8) * 8, b"\0")


def decode_snapshot(source: Source, offset: int, *, may_cut: bool = False) -> Snapshot:
    """The entry at *offset*.

    Raises `ImageError` where its extra data is over the limit; with *may_cut* what is known of it
    is kept.
    """
    raw = read_bytes(source, offset, ENTRY_BYTES) if offset < source.size else b""
    if not any(raw):  # Past the end or in a hole, where a header can claim very many.
        return _of_nothing(offset)
    fixed = _FIXED.parse(raw)
    extra = fixed.extra_data_size
    if extra > MAX_EXTRA_DATA and not may_cut:
        raise ImageError(
            "extra_data_size",
            fixed.extra_data_size,
            f"the snapshot table entry at {offset} may have at most {MAX_EXTRA_DATA} bytes",
        )
    kept = extra if extra <= MAX_EXTRA_DATA else KNOWN_EXTRA_DATA
    names_at = offset + ENTRY_BYTES + extra
    if names_at > READABLE_END:
        raise ImageError("extra_data_size", extra, "past the end of any file")
    names = read_bytes(source, names_at, fixed.id_str_size + fixed.name_size)
    return Snapshot(
        offset=offset,
        l1_table_offset=fixed.l1_table_offset,
        l1_size=fixed.l1_size,
        date_sec=fixed.date_sec,
        date_nsec=fixed.date_nsec,
        vm_clock_nsec=fixed.vm_clock_nsec,
        vm_state_size_32=fixed.vm_state_size,
        extra_data=read_bytes(source, offset + ENTRY_BYTES, kept),
        id_str=names[: fixed.id_str_size],
        name=names[fixed.id_str_size :],
        cut=extra - kept,
    )


def _of_nothing(offset: int) -> Snapshot:
    """An entry that is all zeros."""
    return Snapshot(offset, 0, 0, 0, 0, 0, 0, b"", b"", b"")


def read_snapshots(
    source: Source, header: Header, geometry: Geometry, *, may_cut: bool = False
) -> SnapshotTable:
    """The whole snapshot table. Raises `ImageError` where a check cannot go on.

    Entries past the end of the file are zeros, as for QEMU: snapshots of nothing.
    """
    offset, count = header.snapshots_offset, header.nb_snapshots
    if count > MAX_SNAPSHOTS:
        raise ImageError("nb_snapshots", count, f"at most {MAX_SNAPSHOTS} are allowed")
    if offset % geometry.cluster_size or offset + count * ENTRY_BYTES > SIGNED_MAX:
        raise ImageError("snapshots_offset", offset, "not cluster aligned, or too large")
    if not count:
        return SnapshotTable(offset)
    snapshots: list[Snapshot] = []
    position = offset
    while len(snapshots) < count:
        position = (position + 7) & ~7
        there = position < source.size
        missing = 1 if there else count - len(snapshots)
        if position > READABLE_END - missing * ENTRY_BYTES:
            raise ImageError("snapshots_offset", offset, "past the end of any file")
        if there:
            snapshot = decode_snapshot(source, position, may_cut=may_cut)
            snapshots.append(snapshot)
            position += ENTRY_BYTES + len(snapshot.extra_data) + snapshot.cut
            position += len(snapshot.id_str) + len(snapshot.name)
        else:
            end = position + missing * ENTRY_BYTES
            snapshots += map(_of_nothing, range(position, end, ENTRY_BYTES))
            position = end
        if position - offset > MAX_TABLE_BYTES:
            raise ImageError("snapshot table", position - offset, "over 64 MiB")
    return SnapshotTable(offset, position - offset, tuple(snapshots))
