"""All that must be known before any table is walked: header, extensions, where the tables are.

Follows qcow2_do_open: what stops QEMU from opening an image for a check stops `Layout.read`, but
for the files that the image names, which are never looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.arrays import I64, Mask
from planner.errors import ImageError
from planner.qcow2.extensions import Extensions, read_extensions
from planner.qcow2.geometry import Geometry
from planner.qcow2.header import (
    CRYPT_LUKS,
    KNOWN_INCOMPATIBLE,
    SIGNED_MAX,
    Header,
    check_features,
    check_header,
    read_header,
)
from planner.source import READABLE_END, Source, read_bytes

MAX_REFTABLE_BYTES = 8 << 20
MAX_L1_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Layout:
    """An image whose header makes sense. ``backing_file`` is the name as stored."""

    header: Header
    extensions: Extensions
    geometry: Geometry
    file_size: int
    backing_file: bytes | None

    @classmethod
    def read(cls, source: Source) -> Layout:
        """Read and judge what locates everything else.

        Raises `ImageError` with the field, the value and one sentence.
        """
        header = read_header(source)
        check_header(header)
        if header.incompatible_features & ~KNOWN_INCOMPATIBLE:
            check_features(header, _feature_names(source, header))
        check_features(header, {})
        geometry = header.geometry
        _check_tables(header, geometry)
        extensions = read_extensions(source, header)
        if header.crypt_method == CRYPT_LUKS and extensions.crypto is None:
            raise ImageError("crypt_method", CRYPT_LUKS, "LUKS without its crypto header extension")
        backing_file = None
        if header.backing_file_offset:
            backing_file = read_bytes(source, header.backing_file_offset, header.backing_file_size)
        return cls(header, extensions, geometry, source.size, backing_file)

    @property
    def host_clusters(self) -> int:
        """Clusters that the file reaches into. QEMU counts files in whole 512-byte sectors."""
        return -(-sector_end(self.file_size) // self.geometry.cluster_size)

    @property
    def whole_clusters(self) -> int:
        """Clusters that lie within the file to their last byte."""
        return self.file_size // self.geometry.cluster_size

    def is_past_end(self, offset: I64, size: I64 | int) -> Mask:
        """Which ranges of the file (bytes) reach a cluster or more past its end.

        QEMU counts nothing for those (qcow2_inc_refcounts_imrt).
        """
        past: Mask = offset + size - sector_end(self.file_size) >= self.geometry.cluster_size
        return past

    @property
    def reftable_entries(self) -> int:
        return self.header.refcount_table_clusters * self.geometry.cluster_size // 8


def sector_end(size: int) -> int:
    """A file's length as QEMU sees it: rounded up to 512 bytes, and no longer than any file."""
    return min((size + 511) & ~511, READABLE_END)


def _feature_names(source: Source, header: Header) -> dict[tuple[int, int], str]:
    """Names for unknown features; a broken extension area names none."""
    try:
        return read_extensions(source, header).names_of_features()
    except ImageError:
        return {}


def _check_tables(header: Header, geometry: Geometry) -> None:
    """qcow2_validate_table for the refcount table and the active L1 table."""
    check_table(
        "refcount_table",
        header.refcount_table_offset,
        header.refcount_table_clusters * geometry.cluster_size,
        MAX_REFTABLE_BYTES,
        geometry,
    )
    check_table("l1_table", header.l1_table_offset, header.l1_size * 8, MAX_L1_BYTES, geometry)
    if header.l1_size < geometry.l1_entries_needed:
        raise ImageError(
            "l1_size",
            header.l1_size,
            f"a disk of {header.size} bytes needs {geometry.l1_entries_needed} entries",
        )


def check_table(name: str, offset: int, size: int, limit: int, geometry: Geometry) -> None:
    """qcow2_validate_table, for *size* bytes at *offset*. Raises `ImageError`."""
    if size > limit:
        raise ImageError(f"{name} size", size, f"over the limit of {limit >> 20} MiB")
    if offset % geometry.cluster_size:
        raise ImageError(f"{name}_offset", offset, "not cluster aligned")
    if offset > (READABLE_END if size else SIGNED_MAX) - size:
        raise ImageError(f"{name}_offset", offset, "further than any file can reach")
