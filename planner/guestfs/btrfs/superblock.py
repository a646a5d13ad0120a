"""The superblock of btrfs: its fields, whether they make sense, and which copy is the newest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.guestfs.checksums import crc_of_long
from planner.guestfs.reading import Holes
from planner.source import read_bytes

MAGIC_AT, MAGIC = 64, b"_BHRfS_M"
SIZE = 4096
PLACES = (64 << 10, 64 << 20, 256 << 30)
"""Where a device that is large enough has a copy."""

CRC32C_TYPE = 0
METADATA_UUID = 1 << 10
"""Of the incompatible features: nodes have another UUID than the file system shows."""

CHUNKS_AT, MAX_CHUNKS_BYTES = 811, 2048
BACKUPS_AT, BACKUP_SIZE, BACKUPS = 2859, 168, 4
MAX_LEVEL = 7


@dataclass(frozen=True, slots=True)
class Root:
    """A tree's root: its logical address, level and generation."""

    logical: int
    level: int
    generation: int


@dataclass(frozen=True, slots=True)
class Superblock:
    """``offset``: where this copy is; ``size``: of the device in bytes, as far as the source holds
    it. ``roots``, ``chunk_roots``: of the root tree and the chunk tree, the newest first, then
    older ones that are remembered; ``extent_roots``, ``file_roots``: what is remembered of two of
    the trees that the root tree leads to; ``log``: of the tree of logs, logical 0 where there is
    none.
    ``node_uuid``: what its nodes have. ``chunks``: where the chunk tree lies, as items.
    """

    offset: int
    is_whole: bool
    generation: int
    sector_size: int
    node_size: int
    size: int
    claimed_size: int
    device: int
    devices: int
    checksum: int
    roots: tuple[Root, ...]
    chunk_roots: tuple[Root, ...]
    extent_roots: tuple[Root, ...]
    file_roots: tuple[Root, ...]
    log: Root
    raw_uuid: bytes
    node_uuid: bytes
    raw_label: bytes
    chunks: bytes


def find_superblock(source: Holes) -> Superblock | None:
    """The copy of the highest generation among those that are whole; else one that makes sense."""
    found = []
    for place in PLACES:
        if place + SIZE <= source.size:
            superblock = _decode(read_bytes(source, place, SIZE), place, source.size)
            if superblock is not None:
                found.append(superblock)
    return max(found, key=lambda each: (each.is_whole, each.generation, -each.offset), default=None)


def _decode(raw: bytes, place: int, source_size: int) -> Superblock | None:
    def number(at: int, size: int = 8) -> int:
        return int.from_bytes(raw[at : at + size], "little")

    sector, node, chunks = number(144, 4), number(148, 4), number(160, 4)
    is_sound = (
        raw[MAGIC_AT : MAGIC_AT + 8] == MAGIC
        and number(48) == place
        and _is_size(sector)
        and _is_size(node)
        and node >= sector
        and chunks <= MAX_CHUNKS_BYTES
        and max(raw[198:201]) <= MAX_LEVEL
    )
    if not is_sound:
        return None
    checksum, incompat = number(196, 2), number(188)
    rest = np.frombuffer(raw, dtype=np.uint8)[None, 32:]
    stored = np.uint32(number(0, 4))
    is_whole = checksum != CRC32C_TYPE or bool(~crc_of_long(rest, 0xFFFFFFFF)[0] == stored)
    claimed = number(201 + 8)
    roots, chunk_roots, extent_roots, file_roots = (_backups(raw, which) for which in range(4))
    uuid = raw[32:48]
    return Superblock(
        place,
        is_whole,
        number(72),
        sector,
        node,
        min(claimed, source_size) // sector * sector,
        claimed,
        number(201),
        number(136),
        checksum,
        (Root(number(80), raw[198], number(72)), *roots),
        (Root(number(88), raw[199], number(164)), *chunk_roots),
        extent_roots,
        file_roots,
        Root(number(96), raw[200], 0),
        uuid,
        raw[571:587] if incompat & METADATA_UUID else uuid,
        raw[299:555].split(b"\0")[0],
        raw[CHUNKS_AT : CHUNKS_AT + chunks],
    )


def _is_size(value: int) -> bool:
    return 4096 <= value <= 65536 and value & (value - 1) == 0


def _backups(raw: bytes, which: int) -> tuple[Root, ...]:
    """Roots as they were, the newest first: of one of the trees that are remembered."""
    found = []
    for at in range(BACKUPS_AT, BACKUPS_AT + BACKUPS * BACKUP_SIZE, BACKUP_SIZE):
        words = np.frombuffer(raw[at : at + 64], dtype="<u8").tolist()
        found.append(Root(words[2 * which], raw[at + 152 + which], words[2 * which + 1]))
    found.sort(key=lambda root: -root.generation)
    return tuple(root for root in found if root.logical and root.level <= MAX_LEVEL)
