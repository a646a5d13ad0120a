"""The boot sector of NTFS: what it says, whether that makes sense, and where its copy is."""

from __future__ import annotations

from dataclasses import dataclass

from planner.guestfs.reading import Holes
from planner.source import SECTOR, read_bytes

MAGIC = b"NTFS    "
MAX_CLUSTER = 2 << 20
RECORD_SIZES = (512, 1024, 2048, 4096)
MAX_INDEX = 64 << 10


@dataclass(frozen=True, slots=True)
class Boot:
    """``size``: in bytes, with the copy of the boot sector behind the last cluster, cut at the end
    of the source as ``clusters`` is, the number of them. ``index_size``: of a block of directories,
    0 where that makes no sense. ``offset``: where this was read.
    """

    offset: int
    cluster_size: int
    clusters: int
    record_size: int
    index_size: int
    mft: int
    mirror: int
    serial: int
    size: int
    claimed_size: int


def find_boot(source: Holes) -> Boot | None:
    """What the boot sector says, or its copy, in the last sector of the volume."""
    last = source.size // SECTOR * SECTOR - SECTOR
    for offset in (0, last, last - 7 * SECTOR):
        if offset >= 0:
            boot = _decode(read_bytes(source, offset, SECTOR), offset, source.size)
            if boot is not None:
                return boot
    return None


def _decode(raw: bytes, offset: int, source_size: int) -> Boot | None:
    if raw[3:11] != MAGIC or raw[510:512] != b"\x55\xaa":
        return None

    def number(at: int, size: int) -> int:
        return int.from_bytes(raw[at : at + size], "little")

    sector, sectors = number(0x0B, 2), number(0x28, 8)
    per_cluster = raw[0x0D] if raw[0x0D] <= 128 else 1 << (256 - raw[0x0D])
    cluster = sector * per_cluster
    record_size, index_size = (
        raw[at] * cluster if raw[at] < 128 else 1 << (256 - raw[at]) for at in (0x40, 0x44)
    )
    is_sound = (
        sector in (512, 1024, 2048, 4096)
        and per_cluster > 0
        and cluster & (cluster - 1) == 0
        and cluster <= MAX_CLUSTER
        and record_size in RECORD_SIZES
        and 0 < sectors < 1 << 55
    )
    # The copy is behind the last cluster: so it says itself whether it is one.
    if not is_sound or offset not in (0, sectors * sector):
        return None
    claimed = (sectors + 1) * sector
    clusters = sectors // per_cluster
    return Boot(
        offset,
        cluster,
        min(clusters, source_size // cluster),
        record_size,
        index_size if SECTOR <= index_size <= MAX_INDEX and index_size % SECTOR == 0 else 0,
        number(0x30, 8),
        number(0x38, 8),
        number(0x48, 8),
        min(claimed, source_size),
        claimed,
    )
