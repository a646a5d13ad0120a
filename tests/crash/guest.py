"""What the guest reads, of the active disk and of every snapshot: for comparing two images.

Follows QEMU's reading (qcow2_get_host_offset), without its code and without ours that checks.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from hashlib import blake2b

from planner.errors import ImageError
from planner.qcow2 import entries
from planner.qcow2.layout import Layout
from planner.qcow2.snapshots import read_snapshots
from planner.source import Bytes

Disk = dict[int, tuple[object, ...]]
"""By guest cluster, what is there; clusters that cannot be read are missing."""


def disks(content: bytes) -> dict[str, Disk]:
    """By name: ``active``, and the snapshots by their ids. Raises `ImageError`."""
    source = Bytes(content)
    layout = Layout.read(source)
    found = {"active": _disk(content, layout, layout.header.l1_table_offset)}
    try:
        snapshots = read_snapshots(source, layout.header, layout.geometry).snapshots
    except ImageError:
        return found
    for snapshot in snapshots:
        if not (snapshot.l1_size or snapshot.id_str or snapshot.name):
            continue  # an entry of zeros is no snapshot
        if snapshot.l1_table_offset % layout.geometry.cluster_size == 0:
            name = f"{snapshot.id_str!r} {snapshot.name!r}"
            found[name] = _disk(content, layout, snapshot.l1_table_offset, snapshot.l1_size)
    return found


def _disk(content: bytes, layout: Layout, offset: int, size: int | None = None) -> Disk:
    geometry = layout.geometry
    needed = geometry.l1_entries_needed
    words = _words(content, offset, needed if size is None else min(size, needed))
    disk: Disk = {}
    for l1_index, word in enumerate(words):
        table = word & entries.L1_OFFSET
        first = l1_index * geometry.l2_entries
        if not table:
            disk[first] = ("no L2 table",)
        elif table % geometry.cluster_size == 0 and table < len(content):
            count = geometry.cluster_size // 8
            for index, read in _entries(content, layout, _words(content, table, count)):
                disk[first + index] = read
    return disk


def _entries(
    content: bytes, layout: Layout, words: tuple[int, ...]
) -> Iterator[tuple[int, tuple[object, ...]]]:
    """(index, what is read) of the L2 entries that are not simply empty and can be read."""
    geometry = layout.geometry
    step = geometry.l2_entry_size // 8
    for index, at in enumerate(range(0, len(words), step)):
        word = words[at]
        bitmap = words[at + 1] if step == 2 else 0
        if not word and not bitmap:
            continue
        if word & entries.COMPRESSED:
            low = (1 << geometry.compressed_shift) - 1
            sectors = (word & ~entries.COPIED & ~entries.COMPRESSED) >> geometry.compressed_shift
            start = word & low
            end = start - start % 512 + (sectors + 1) * 512
            if end <= len(content):
                yield index, ("compressed", _digest(content[start:end]))
        elif not geometry.extended_l2 and word & entries.ZERO:
            yield index, ("zeros",)
        else:
            host = word & entries.L2_OFFSET
            if geometry.external_data:
                yield index, ("external", host, bitmap)
            elif not host:
                yield index, ("nothing", bitmap)
            elif host % geometry.cluster_size == 0 and host < len(content):
                data = content[host : host + geometry.cluster_size]
                yield index, ("data", bitmap, _digest(data))


def _words(content: bytes, offset: int, count: int) -> tuple[int, ...]:
    raw = content[offset : offset + 8 * count].ljust(8 * count, b"\0")
    return struct.unpack(f">{count}Q", raw)


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=12).digest()
