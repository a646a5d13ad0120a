"""An image on the table: where its structures are, and single words of them to read and write.

The structures are located once, on the undamaged base, with `planner.qcow2`; damage then goes by
that map, however broken the image already is. Nothing here chooses what to damage.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from planner.qcow2.bitmaps import Bitmap, read_bitmaps
from planner.qcow2.entries import BITMAP_OFFSET, L1_OFFSET, REFTABLE_OFFSET
from planner.qcow2.extensions import BITMAPS, CRYPTO_HEADER, Extension
from planner.qcow2.geometry import Geometry
from planner.qcow2.header import Header
from planner.qcow2.layout import Layout
from planner.qcow2.snapshots import Snapshots, read_snapshots
from planner.source import Source, read_bytes
from tests.images.matrix import data_extents


@dataclass(frozen=True, slots=True)
class FileSource:
    """An open file as the planner's `Source`."""

    descriptor: int

    @property
    def size(self) -> int:
        return os.fstat(self.descriptor).st_size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        got = os.preadv(self.descriptor, [buffer], offset) if offset < self.size else 0
        buffer[got:] = bytes(len(buffer) - got)

    def data_extents(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        return data_extents(self.descriptor, offset, min(offset + length, self.size))


@dataclass(frozen=True, slots=True)
class Table:
    """A run of equally wide words."""

    offset: int
    count: int
    width: int = 8


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Where everything is in a base image. ``owners`` maps a structure to its cluster offsets."""

    header: Header
    geometry: Geometry
    size: int
    extensions: tuple[Extension, ...]
    extension_area: int
    l1: Table
    l2: tuple[Table, ...]
    reftable: Table
    refblocks: tuple[int, ...]
    snapshots: Snapshots
    snapshot_l1: tuple[Table, ...]
    snapshot_l2: tuple[Table, ...]
    bitmaps: tuple[Bitmap, ...]
    bitmap_tables: tuple[Table, ...]
    owners: dict[str, tuple[int, ...]]

    def extension(self, magic: int) -> int | None:
        """File offset of an extension's data."""
        return next((found.offset for found in self.extensions if found.magic == magic), None)

    @property
    def bitmaps_extension(self) -> int | None:
        return self.extension(BITMAPS)

    @property
    def crypto_extension(self) -> int | None:
        return self.extension(CRYPTO_HEADER)


def dissect(path: Path) -> Anatomy:
    """Locate the structures of an undamaged image."""
    with path.open("rb") as file:
        return _dissect(FileSource(file.fileno()))


def _dissect(source: Source) -> Anatomy:
    layout = Layout.read(source)
    header, geometry = layout.header, layout.geometry
    l1 = Table(header.l1_table_offset, header.l1_size)
    reftable = Table(header.refcount_table_offset, layout.reftable_entries)
    table = read_snapshots(source, header, geometry)
    snapshot_l1 = tuple(Table(snap.l1_table_offset, snap.l1_size) for snap in table.snapshots)
    pointer = layout.extensions.bitmaps
    bitmaps = tuple(read_bitmaps(source, pointer, geometry)) if pointer else ()
    bitmap_tables = tuple(Table(bm.bitmap_table_offset, bm.bitmap_table_size) for bm in bitmaps)
    l2 = _targets(source, [l1], L1_OFFSET)
    snapshot_l2 = _targets(source, snapshot_l1, L1_OFFSET)
    refblocks = _targets(source, [reftable], REFTABLE_OFFSET)
    owners = {
        "header": (0,),
        "l1": _clusters(l1, geometry),
        "l2": l2,
        "reftable": _clusters(reftable, geometry),
        "refblock": refblocks,
        "snapshot-table": (header.snapshots_offset,) if table.snapshots else (),
        "snapshot-l1": tuple(at for each in snapshot_l1 for at in _clusters(each, geometry)),
        "snapshot-l2": snapshot_l2,
        "bitmap-directory": (pointer.bitmap_directory_offset,) if pointer else (),
        "bitmap-table": tuple(at for each in bitmap_tables for at in _clusters(each, geometry)),
        "bitmap-data": _targets(source, bitmap_tables, BITMAP_OFFSET),
    }
    return Anatomy(
        header=header,
        geometry=geometry,
        size=source.size,
        extensions=layout.extensions.all,
        extension_area=header.header_length,
        l1=l1,
        l2=tuple(Table(at, geometry.l2_entries, geometry.l2_entry_size) for at in l2),
        reftable=reftable,
        refblocks=refblocks,
        snapshots=table.snapshots,
        snapshot_l1=snapshot_l1,
        snapshot_l2=tuple(
            Table(at, geometry.l2_entries, geometry.l2_entry_size) for at in snapshot_l2
        ),
        bitmaps=bitmaps,
        bitmap_tables=bitmap_tables,
        owners={name: clusters for name, clusters in owners.items() if clusters},
    )


def _targets(source: Source, tables: Iterable[Table], mask: int) -> tuple[int, ...]:
    """What the entries of tables point at, each once, in order."""
    found: dict[int, None] = {}
    for table in tables:
        raw = read_bytes(source, table.offset, table.count * 8)
        for (word,) in struct.iter_unpack(">Q", raw):
            if word & mask:
                found[word & mask] = None
    return tuple(found)


def _clusters(table: Table, geometry: Geometry) -> tuple[int, ...]:
    end = table.offset + table.count * table.width
    return tuple(range(table.offset, end, geometry.cluster_size))


class Scene:
    """An image open for damage. Words are big-endian; reads past the end give zeros."""

    def __init__(self, path: Path, anatomy: Anatomy) -> None:
        self.at = anatomy
        self._file = path.open("r+b", buffering=0)

    def __enter__(self) -> Scene:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    @property
    def size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    @property
    def cluster(self) -> int:
        return self.at.geometry.cluster_size

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._file.fileno(), length, offset).ljust(length, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        os.pwrite(self._file.fileno(), data, offset)

    def get(self, offset: int, width: int = 8) -> int:
        return int.from_bytes(self.read(offset, width), "big")

    def put(self, offset: int, value: int, width: int = 8) -> None:
        self.write(offset, (value & ((1 << 8 * width) - 1)).to_bytes(width, "big"))

    def resize(self, size: int) -> None:
        self._file.truncate(size)
