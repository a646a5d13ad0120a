"""An image of a guest whose every name is an attack: of partitions, volumes and files."""

from __future__ import annotations

import os
import struct
import tempfile
import zlib
from functools import cache
from pathlib import Path

from planner.qcow2 import entries
from planner.source import SECTOR
from tests.images.builder import MIB, Image, ImageBuilder
from tests.images.guest_filled import mtools, run
from tests.images.poison import POISON, cut

CONTENT = b"what is hit " * 10_000
"""Of every file: its clusters are those that are lost."""

PARTITIONS = 6
"""The first ext4, the second FAT, then some that hold nothing that is known."""

SHORT = b"PLANTED TXT"
"""The one name on the FAT, as it stands in its directory until it is another."""

_NAME_CHARACTERS = 36


def planted_guest() -> Image:
    """All clusters of files lead past the end of the image; so do some of no file system."""
    builder = ImageBuilder(size=9 * MIB)
    disk, size = _disk(), builder.geometry.cluster_size
    pieces = {at // size: disk[at : at + size] for at in range(0, len(disk), size)}
    for cluster, piece in pieces.items():
        if any(piece):
            builder.write(cluster, piece)
    image = builder.build()
    past = (image.host_clusters + 16) * size
    for cluster, piece in pieces.items():
        if piece[: size // 2] in 2 * CONTENT:
            past += size
            image.set_word(image.l2_at(cluster), past | entries.COPIED)
    return image


@cache
def _disk() -> bytes:
    """A partition a MiB, but for the first."""
    disk = bytearray(_gpt(9 * MIB))
    with tempfile.TemporaryDirectory() as folder:
        disk[1 * MIB : 3 * MIB] = _ext4(Path(folder))
        disk[3 * MIB : 4 * MIB] = _fat(Path(folder))
    for number in range(2, PARTITIONS):
        start = (number + 2) * MIB
        disk[start : start + len(CONTENT)] = CONTENT
    return bytes(disk)


def _ext4(folder: Path) -> bytes:
    """With POISON for a name, in a directory of that name, and again in pieces."""
    whole = POISON.replace(b"/", b"")
    below = folder / "tree" / os.fsdecode(whole)
    below.mkdir(parents=True)
    for name in (whole, *cut(60)):
        (below / os.fsdecode(name.replace(b"/", b""))).write_bytes(CONTENT)
    image = folder / "ext4"
    image.write_bytes(bytes(2 * MIB))
    label = os.fsdecode(next(cut(16)))
    run(
        "mke2fs",
        "-q",
        "-F",
        "-t",
        "ext4",
        "-b",
        "1024",
        "-O",
        "^has_journal",
        "-L",
        label,
        "-d",
        below.parent,
        image,
    )
    return image.read_bytes()


def _fat(folder: Path) -> bytes:
    image, file = folder / "fat", folder / "content"
    image.write_bytes(bytes(MIB))
    run("mkfs.fat", "-F", "12", "-n", "A LABEL", image)
    file.write_bytes(CONTENT)
    mtools("mcopy", image, file, "::PLANTED.TXT")
    return (
        image.read_bytes()
        .replace(SHORT, b"\x1b]\n\x7f\t\xff\x9bm'\"\\")
        .replace(b"A LABEL    ", b"\x1b]0;FORGED\x07")
    )


def _gpt(size: int) -> bytes:
    names = POISON.decode("utf-8", "replace")
    parts = [names[at : at + _NAME_CHARACTERS] for at in range(0, len(names), _NAME_CHARACTERS)]
    table = b""
    for number in range(PARTITIONS):
        start = (1 + number + bool(number)) * MIB
        end = start + MIB * (2 if not number else 1)
        name = parts[number % len(parts)].encode("utf-16-le")[: 2 * _NAME_CHARACTERS]
        entry = struct.pack(
            "<16s16sQQQ",
            b"\1" * 16,
            bytes([number + 1] * 16),
            start // SECTOR,
            end // SECTOR - 1,
            0,
        )
        table += entry + name.ljust(2 * _NAME_CHARACTERS, b"\0")
    table = table.ljust(128 * 128, b"\0")
    last = size // SECTOR - 1

    def header(crc: int) -> bytes:
        return struct.pack(
            "<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, crc, 0, 1, last, 34, last - 33,
            b"\2" * 16, 2, 128, 128, zlib.crc32(table),
        )  # fmt: skip

    protective = struct.pack("<446x4s4sII48x2s", bytes(4), b"\xee" + bytes(3), 1, last, b"\x55\xaa")
    whole = protective + header(zlib.crc32(header(0))).ljust(SECTOR, b"\0") + table
    return whole.ljust(size, b"\0")
