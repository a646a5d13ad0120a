"""Boot sectors of FAT and exFAT: what they say, whether it makes sense, and where copies are."""

from __future__ import annotations

from dataclasses import dataclass

from planner.guestfs.reading import Holes
from planner.source import SECTOR, read_bytes

EXFAT_MAGIC = b"EXFAT   "
EXFAT_COPY = 12
"""The sector of exFAT's second boot sector."""

FAT32_COPY = 6
"""The sector where mkfs.fat and Windows put FAT32's, if the first does not say where."""

FAT12_CLUSTERS, FAT16_CLUSTERS = 4085, 65525
"""With fewer clusters it is that one."""

FIRST = 2
"""The number of the first cluster."""


@dataclass(frozen=True, slots=True)
class Volume:
    """``bits`` of an entry of the FAT; ``is_exfat``. Offsets and sizes are bytes: ``tables``, where
    each copy of the FAT is, the one in use first; ``heap``, where the first cluster is.
    ``clusters``: how many the source holds. ``root``: its first cluster, or 0, and then it is a
    fixed region. ``offset``: where this boot sector was found.
    """

    offset: int
    is_exfat: bool
    bits: int
    cluster_size: int
    clusters: int
    tables: tuple[int, ...]
    table_size: int
    heap: int
    root: int
    root_region: tuple[int, int]
    label: str
    serial: int
    size: int
    claimed_size: int


def find_fat(source: Holes) -> Volume | None:
    """What the boot sector of a FAT says, or of FAT32 its copy."""
    for offset in (0, FAT32_COPY * SECTOR, FAT32_COPY * 4096):
        volume = _decode_fat(read_bytes(source, offset, SECTOR), offset, source.size)
        if volume is not None and (not offset or volume.bits == 32):
            return volume
    return None


def find_exfat(source: Holes) -> Volume | None:
    """What the boot sector of an exFAT says, or its copy."""
    for offset in (0, *(EXFAT_COPY << shift for shift in (9, 12, 10, 11))):
        volume = _decode_exfat(read_bytes(source, offset, SECTOR), offset, source.size)
        if volume is not None:
            return volume
    return None


def _decode_fat(raw: bytes, offset: int, source_size: int) -> Volume | None:
    def number(at: int, size: int) -> int:
        return int.from_bytes(raw[at : at + size], "little")

    sector, per_cluster, reserved = number(11, 2), raw[13], number(14, 2)
    copies, entries, table = raw[16], number(17, 2), number(22, 2)
    is_32 = table == 0
    table = table or number(36, 4)
    sectors = number(19, 2) or number(32, 4)
    is_sound = (
        raw[510:512] == b"\x55\xaa"
        and raw[0] in (0xEB, 0xE9)
        and sector in (512, 1024, 2048, 4096)
        and per_cluster > 0
        and per_cluster & (per_cluster - 1) == 0
        and reserved > 0
        and 1 <= copies <= 4
        and (raw[21] == 0xF0 or raw[21] >= 0xF8)
        and table > 0
        and (entries > 0) != is_32
    )
    root_sectors = -(-entries * 32 // sector) if is_sound else 0
    heap = reserved + copies * table + root_sectors
    if not is_sound or sectors <= heap:
        return None
    clusters = (sectors - heap) // per_cluster
    bits = 32 if is_32 else 12 if clusters < FAT12_CLUSTERS else 16
    cluster = sector * per_cluster
    # As many as the FAT has entries for, and the source has bytes.
    clusters = min(clusters, table * sector * 8 // bits - FIRST)
    there = min(clusters, (source_size - heap * sector) // cluster)
    if clusters <= 0 or there <= 0:
        return None
    extended = 64 if is_32 else 36
    has_label = raw[extended + 2] == 0x29
    label = raw[extended + 7 : extended + 18].decode("cp437").rstrip() if has_label else ""
    tables = [(reserved + table * copy) * sector for copy in range(copies)]
    flags = number(40, 2) if is_32 else 0
    if flags & 0x80 and flags & 0xF < copies:
        tables.insert(0, tables.pop(flags & 0xF))
    return Volume(
        offset,
        False,
        bits,
        cluster,
        there,
        tuple(tables),
        table * sector,
        heap * sector,
        number(44, 4) if is_32 else 0,
        ((heap - root_sectors) * sector, root_sectors * sector),
        "" if label == "NO NAME" else label,
        number(extended + 3, 4) if has_label else 0,
        min(sectors * sector, source_size),
        sectors * sector,
    )


def _decode_exfat(raw: bytes, offset: int, source_size: int) -> Volume | None:
    def number(at: int, size: int) -> int:
        return int.from_bytes(raw[at : at + size], "little")

    shift, per_cluster, copies = raw[108], raw[109], raw[110]
    if (
        raw[3:11] != EXFAT_MAGIC
        or raw[510:512] != b"\x55\xaa"
        or any(raw[11:64])
        or not 9 <= shift <= 12
        or shift + per_cluster > 25
        or copies not in (1, 2)
    ):
        return None
    table, table_sectors, heap, clusters = (number(at, 4) for at in (80, 84, 88, 92))
    cluster, claimed = 1 << (shift + per_cluster), number(72, 8) << shift
    if table < 24 or heap < table + table_sectors * copies or claimed >> 63:
        return None
    clusters = min(clusters, (table_sectors << shift) // 4 - FIRST)
    there = min(clusters, (min(claimed, source_size) - (heap << shift)) // cluster)
    if clusters <= 0 or there <= 0:
        return None
    tables = [(table + table_sectors * copy) << shift for copy in range(copies)]
    if number(106, 2) & 1:
        tables.reverse()
    return Volume(
        offset,
        True,
        32,
        cluster,
        there,
        tuple(tables),
        table_sectors << shift,
        heap << shift,
        number(96, 4),
        (0, 0),
        "",
        number(100, 4),
        min(claimed, source_size),
        claimed,
    )
