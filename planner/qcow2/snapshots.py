"""The snapshot table: reading it, whole or entry by entry, and its encoding.

There may be 65,536 entries: what is held of a table are its bytes, and a `Snapshot` is made of one
when somebody asks for it.

Source: docs/interop/qcow2.txt, "Snapshots"; qcow2_do_read_snapshots for what QEMU refuses.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np
import numpy.typing as npt
from construct import Int16ub, Int32ub, Int64ub, Struct

from planner.arrays import I64, U8, U64
from planner.errors import ImageError, as_value
from planner.qcow2.fixed import Fixed
from planner.qcow2.geometry import Geometry
from planner.qcow2.header import SIGNED_MAX, Header
from planner.qcow2.layout import MAX_L1_BYTES
from planner.source import READABLE_END, Source, read_bytes

MAX_SNAPSHOTS = 65536
MAX_TABLE_BYTES = MAX_SNAPSHOTS * 1024
MAX_EXTRA_DATA = 1024
KNOWN_EXTRA_DATA = 24
"""Bytes of extra data that have a meaning: VM state size, disk size, icount."""

REQUIRED_EXTRA_DATA = 16
"""Bytes of extra data that every entry of a version 3 image must have."""

SKIPPED_BYTES = 2048
"""So far behind an entry that is garbage the next one is looked for."""

_LIKELY_EXTRA_DATA = (KNOWN_EXTRA_DATA, REQUIRED_EXTRA_DATA)
"""What QEMU writes, and wrote before version 6.0."""

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
_SIZES = struct.Struct(">12xHH20xI")
"""Of an entry's fixed part what says how long it is: id_str_size, name_size, extra_data_size."""
_SIZES_AT = (12, 13, 14, 15, 36, 37, 38, 39)

READ_BYTES = 64 << 10
"""So much of a table is read at a time, or an entry that is longer."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One entry of the snapshot table; ``offset`` is where it stands in the file, bytes."""

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


@dataclass(frozen=True, slots=True, eq=False)
class Snapshots(Sequence[Snapshot]):
    """The entries of a snapshot table, in its order.

    ``raw``: their bytes, one after the other, without what pads them. ``start``: where each begins
    in there, int64. ``offset``: where it stands in the file, int64.
    """

    raw: bytes = b""
    start: I64 = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    offset: I64 = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.start)

    @overload
    def __getitem__(self, at: int) -> Snapshot: ...

    @overload
    def __getitem__(self, at: slice) -> tuple[Snapshot, ...]: ...

    def __getitem__(self, at: int | slice) -> Snapshot | tuple[Snapshot, ...]:
        if isinstance(at, slice):
            return tuple(map(self.__getitem__, range(*at.indices(len(self)))))
        at = range(len(self))[at]
        return _decode(self.raw, int(self.start[at]), int(self.offset[at]))

    def __iter__(self) -> Iterator[Snapshot]:
        for start, offset in zip(self.start.tolist(), self.offset.tolist(), strict=True):
            yield _decode(self.raw, start, offset)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Snapshots):
            return NotImplemented
        return self.raw == other.raw and np.array_equal(self.offset, other.offset)

    __hash__ = None  # type: ignore[assignment]

    def fields(self) -> npt.NDArray[np.void]:
        """The fixed part of each entry: a structured array with the fields of `ENTRY`."""
        return _FIXED.rows(self.raw, self.start)

    def vm_state_sizes(self) -> U64:
        """`Snapshot.vm_state_size` of each."""
        fields = self.fields()
        sizes = fields["vm_state_size"].astype(np.uint64)
        at = np.flatnonzero(fields["extra_data_size"] >= 8)
        if len(at):
            raw = np.frombuffer(self.raw, dtype=np.uint8)
            words = np.lib.stride_tricks.sliding_window_view(raw, 8)[self.start[at] + ENTRY_BYTES]
            sizes[at] = words.view(">u8").reshape(-1)
        return sizes

    def names(self) -> list[bytes]:
        """ID and name of each, one behind the other."""
        fields = self.fields()
        start = self.start + ENTRY_BYTES + fields["extra_data_size"]
        end = start + fields["id_str_size"] + fields["name_size"]
        return [self.raw[low:high] for low, high in zip(start.tolist(), end.tolist(), strict=True)]

    def without_zeros(self) -> Snapshots:
        """Without those of zeros: what QEMU reads past the end of the file, or of the table."""
        at = self._there_at()
        return Snapshots(self.raw, self.start[at], self.offset[at])

    def there(self) -> list[Snapshot]:
        """Those that are not zeros."""
        return list(self.without_zeros())

    @property
    def used(self) -> int:
        """How many there are up to the last one that is not zeros."""
        there = self._there_at()
        return int(there[-1]) + 1 if len(there) else 0

    def _there_at(self) -> I64:
        words = self.fields().view(np.uint8).reshape(-1, ENTRY_BYTES)
        return np.flatnonzero(words.any(axis=1))


@dataclass(frozen=True, slots=True)
class SnapshotTable:
    """All snapshots, and the length in bytes of the table that lists them."""

    offset: int = 0
    length: int = 0
    snapshots: Snapshots = field(default_factory=Snapshots)


def encode_snapshot(snapshot: Snapshot) -> bytes:
    """One entry, padded to eight bytes: the inverse of decoding."""
    raw = _FIXED.build(
        l1_table_offset=snapshot.l1_table_offset,
        l1_size=snapshot.l1_size,
        id_str_size=len(snapshot.id_str),
        name_size=len(snapshot.name),
        date_sec=snapshot.date_sec,
        date_nsec=snapshot.date_nsec,
        vm_clock_nsec=snapshot.vm_clock_nsec,
        vm_state_size=snapshot.vm_state_size_32,
        extra_data_size=len(snapshot.extra_data),
    )
    raw += snapshot.extra_data + snapshot.id_str + snapshot.name
    return raw.ljust(-(-len(raw) // 8) * 8, b"\0")


def decode_snapshot(source: Source, offset: int) -> Snapshot:
    """The entry at *offset*. Raises `ImageError` where its extra data is over the limit."""
    raw, _ = _Reader(source).entry(offset, left=1)
    return _decode(raw, 0, offset)


def _decode(raw: bytes, start: int, offset: int) -> Snapshot:
    """The entry that begins at *start* in *raw*."""
    (
        l1_table_offset, l1_size, id_str_size, name_size,
        date_sec, date_nsec, vm_clock_nsec, vm_state_size, extra_data_size,
    ) = _FIXED.values(raw, start)  # fmt: skip
    id_at = start + ENTRY_BYTES + extra_data_size
    name_at = id_at + id_str_size
    return Snapshot(
        offset,
        l1_table_offset,
        l1_size,
        date_sec,
        date_nsec,
        vm_clock_nsec,
        vm_state_size,
        raw[start + ENTRY_BYTES : id_at],
        raw[id_at:name_at],
        raw[name_at : name_at + name_size],
    )


class _Reader:
    """Reads entries that stand one after the other, ahead, and never what is behind the last one.

    What lies there may not be readable, and is no part of the table.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._ahead, self._start = b"", 0

    def entry(self, offset: int, left: int) -> tuple[bytes, int]:
        """The bytes of the entry at *offset*, and where it ends.

        *left*: so many entries, this one included, are still to come. Raises `ImageError`.
        """
        if offset >= self._source.size:  # where a header can claim very many
            return bytes(ENTRY_BYTES), offset + ENTRY_BYTES
        at = offset - self._start
        if at + ENTRY_BYTES > len(self._ahead):
            self._ahead = read_bytes(self._source, offset, min(left * ENTRY_BYTES, READ_BYTES))
            self._start, at = offset, 0
        id_size, name_size, extra = _SIZES.unpack_from(self._ahead, at)
        if extra > MAX_EXTRA_DATA:
            raise ImageError(
                "extra_data_size",
                extra,
                f"the snapshot table entry at {offset} may have at most {MAX_EXTRA_DATA} bytes",
            )
        names_at = offset + ENTRY_BYTES + extra
        if names_at > READABLE_END:
            raise ImageError("extra_data_size", extra, "past the end of any file")
        end = names_at + id_size + name_size
        if end - self._start <= len(self._ahead):
            return self._ahead[at : end - self._start], end
        return read_bytes(self._source, offset, end - offset), end

    def alike(self, offset: int, length: int, step: int, most: int) -> U8:
        """Entries behind the one at *offset*, as long as their sizes are its: (entries, length).

        *step*: from where one begins to where the next does. *most*: of them; of those that were
        read by now. There may be 65,536, and of most no more is to be known.
        """
        if offset >= self._source.size:
            return np.zeros((most, length), dtype=np.uint8)
        at = offset - self._start
        count = min(most, (len(self._ahead) - at - length) // step)
        if count <= 0 or not self._are_alike(at, at + step):
            return np.zeros((0, length), dtype=np.uint8)
        ahead = np.frombuffer(self._ahead, dtype=np.uint8, offset=at)
        rows = np.lib.stride_tricks.sliding_window_view(ahead, length)[: count * step + 1 : step]
        others = np.flatnonzero((rows[:, _SIZES_AT] != rows[0, _SIZES_AT]).any(axis=1))
        return rows[1 : int(others[0]) if len(others) else None]

    def _are_alike(self, one: int, other: int) -> bool:
        return _SIZES.unpack_from(self._ahead, one) == _SIZES.unpack_from(self._ahead, other)


def read_snapshots(source: Source, header: Header, geometry: Geometry) -> SnapshotTable:
    """The whole snapshot table. Raises `ImageError` where a check cannot go on.

    Entries past the end of the file are zeros, as for QEMU: snapshots of nothing.
    """
    offset, count = header.snapshots_offset, header.nb_snapshots
    if count > MAX_SNAPSHOTS:
        raise ImageError("nb_snapshots", count, f"at most {MAX_SNAPSHOTS} are allowed")
    if offset % geometry.cluster_size or offset + count * ENTRY_BYTES > SIGNED_MAX:
        raise ImageError("snapshots_offset", offset, "not cluster aligned, or too large")
    reader = _Reader(source)
    raw = bytearray()
    starts: list[I64] = [np.zeros(0, dtype=np.int64)]
    offsets: list[I64] = [np.zeros(0, dtype=np.int64)]
    end, left = offset, count
    while left:
        position = (end + 7) & ~7
        if position > READABLE_END - ENTRY_BYTES:
            raise ImageError("snapshots_offset", offset, "past the end of any file")
        entry, end = reader.entry(position, left)
        if end - offset > MAX_TABLE_BYTES:
            raise ImageError("snapshot table", end - offset, "over 64 MiB")
        step = (end + 7 & ~7) - position
        room = min(MAX_TABLE_BYTES - (end - offset), READABLE_END - end)
        more = reader.alike(position, len(entry), step, max(0, min(left - 1, room // step)))
        each = np.arange(1 + len(more))
        starts.append(len(raw) + each * len(entry))
        offsets.append(position + each * step)
        raw += entry + more.tobytes()
        end += len(more) * step
        left -= len(each)
    columns = map(np.concatenate, (starts, offsets))
    return SnapshotTable(offset, end - offset, Snapshots(bytes(raw), *columns))


def read_reachable_snapshots(
    source: Source, header: Header, geometry: Geometry
) -> tuple[SnapshotTable, ImageError | None]:
    """The whole snapshot table; where QEMU would not load it, what is whole in it, and the reason.

    Those are the entries whose L1 table lies in the file, also behind one that is garbage. Of one
    with too much extra data the rest is kept: at fault is mostly the word that says how much.
    """
    try:
        return read_snapshots(source, header, geometry), None
    except ImageError as error:
        if header.snapshots_offset % geometry.cluster_size:
            return SnapshotTable(), as_value(error)
        return _Reachable(source, header, geometry).read(), as_value(error)


class _Reachable:
    """Reads the entries of a table that make sense."""

    def __init__(self, source: Source, header: Header, geometry: Geometry) -> None:
        self._source, self._header, self._geometry = source, header, geometry
        self._reader = _Reader(source)

    def read(self) -> SnapshotTable:
        start = position = end = self._header.snapshots_offset
        raw = bytearray()
        starts: list[int] = []
        offsets: list[int] = []
        for left in range(min(self._header.nb_snapshots, MAX_SNAPSHOTS), 0, -1):
            found = self._entry(position, left)
            if found is None:
                position = self._next_named(position)
                found = self._entry(position, left)
            if found is None or found[1] - start > MAX_TABLE_BYTES:
                break
            starts.append(len(raw))
            offsets.append(position)
            raw += found[0]
            end = found[1]
            position = (end + 7) & ~7
        columns = (np.array(each, dtype=np.int64) for each in (starts, offsets))
        return SnapshotTable(start, end - start, Snapshots(bytes(raw), *columns))

    def _entry(self, position: int, left: int) -> tuple[bytes, int] | None:
        """The bytes of an entry, and where it ends; None where it is none."""
        if position + ENTRY_BYTES > self._source.size:
            return None
        fixed = read_bytes(self._source, position, ENTRY_BYTES)
        if not self._has_l1(_decode(fixed, 0, position)):
            return None
        *_, extra = _SIZES.unpack_from(fixed)
        if extra <= MAX_EXTRA_DATA:
            return self._reader.entry(position, left)
        declared = self._with_extra_data(position, fixed, extra)
        guesses = (self._with_extra_data(position, fixed, size) for size in _LIKELY_EXTRA_DATA)
        likely = (each for each in (declared, *guesses) if each and _is_named(each[0]))
        return next(likely, None) or declared or (_without_names(fixed), position + ENTRY_BYTES)

    def _next_named(self, position: int) -> int:
        """Where behind garbage at *position* an entry stands as QEMU writes it, or else that."""
        if self._header.nb_snapshots > MAX_SNAPSHOTS:
            return position  # What is behind the table may be anything.
        for at in range(position + 8, position + SKIPPED_BYTES, 8):
            fixed = read_bytes(self._source, at, ENTRY_BYTES)
            *_, extra = _SIZES.unpack_from(fixed)
            if extra in _LIKELY_EXTRA_DATA and self._has_l1(_decode(fixed, 0, at)):
                entry = self._with_extra_data(at, fixed, extra)
                if entry and _is_named(entry[0]):
                    return at
        return position

    def _with_extra_data(self, position: int, fixed: bytes, size: int) -> tuple[bytes, int] | None:
        """The entry if it has *size* bytes of extra data; None where it is not in the file then."""
        id_size, name_size, _ = _SIZES.unpack_from(fixed)
        kept = size if size <= MAX_EXTRA_DATA else KNOWN_EXTRA_DATA
        names_at = position + ENTRY_BYTES + size
        end = names_at + id_size + name_size
        if end > self._source.size:
            return None
        raw = fixed[:-4] + kept.to_bytes(4, "big")
        raw += read_bytes(self._source, position + ENTRY_BYTES, kept)
        return raw + read_bytes(self._source, names_at, end - names_at), end

    def _has_l1(self, snapshot: Snapshot) -> bool:
        offset, length = snapshot.l1_table_offset, snapshot.l1_size * 8
        is_place = offset != 0 and offset % self._geometry.cluster_size == 0
        return is_place and 0 < length <= min(MAX_L1_BYTES, self._source.size - offset)


def is_named_as_by_qemu(snapshot: Snapshot) -> bool:
    """Whether an entry's ID is a number, and its name text."""
    name = snapshot.name.decode(errors="replace")
    return snapshot.id_str.isdigit() and name.isprintable() and "\ufffd" not in name


def _is_named(raw: bytes) -> bool:
    return is_named_as_by_qemu(_decode(raw, 0, 0))


def _without_names(fixed: bytes) -> bytes:
    """The entry with its fixed part alone: no ID, no name, no extra data."""
    return fixed[:12] + bytes(4) + fixed[16:36] + bytes(4)
