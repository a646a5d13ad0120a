"""Bombs on the guest's disk: file systems with fields at their limits, of which one place is many.

Each occupies less than `FILE_BYTES`. Whatever a file system claims may be there: the tables of the
image lead many times to the clusters in which it is, so that a disk of any length can be full of
inodes, directories and boot sectors that make sense.
"""

from __future__ import annotations

import random
import struct
import zlib

import numpy as np

from planner.qcow2.entries import COPIED
from planner.qcow2.header import MAGIC
from planner.source import SECTOR
from tests.fuzz.filesystems import MAKERS, disk_of, seeds
from tests.fuzz.holed import HEADER_LENGTH, LARGEST, Holed

MOST_BLOCKS = 180
"""Of 4 KiB, that are there of a file system."""

MOST_TEXT = 16
"""Of 4 KiB, that are there of the metadata of LVM."""

MOST_TABLES = 200
"""Of the second level."""

BLOCK = 4096
"""What a file system gives at a time."""

EXTREMES = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 1 << 16, 1 << 20, 1 << 31, (1 << 32) - 1)


def make_guest_bomb(seed: int) -> Holed:
    """The bomb of that number; what mkfs chooses, UUIDs and times, is another in each process."""
    rng = random.Random(seed)
    blocks = _filesystem(rng)
    if rng.random() < 0.4:
        blocks = _partitioned(rng, blocks)
    return _Laid(rng, blocks).image()


def make_aliased_bomb(seed: int) -> Holed:
    """One of whose file system the entries of directories, extents, inodes and blocks are the same
    again and again, in volumes of any sort."""
    rng = random.Random(f"aliased {seed}")
    blocks = _filesystem(rng)
    for _ in range(rng.choice((1, 2, 4, 16))):
        blocks[rng.choice(list(blocks))] = _repeated(rng, rng.choice(list(blocks.values())))
    around = rng.choice((None, None, _partitioned, _chained, _logical))
    return _Laid(rng, around(rng, blocks) if around else blocks).image()


def _filesystem(rng: random.Random) -> dict[int, bytes]:
    """What is there of a disk with a file system: blocks by their number, not as it was made."""
    disk = disk_of(rng.choice(seeds(rng.choice(tuple(MAKERS)))))
    blocks: dict[int, bytearray] = {}
    for sector, content in sorted(disk.blocks.items()):
        at, within = divmod(sector * SECTOR, BLOCK)
        if at not in blocks and len(blocks) >= MOST_BLOCKS:
            continue
        block = blocks.setdefault(at, bytearray(BLOCK))
        block[within : within + len(content)] = content
    for _ in range(rng.choice((0, 1, 1, 2, 4, 16))):
        # The first block has the superblock or boot sector in it, the others what it leads to.
        block = blocks[0 if rng.random() < 0.6 and 0 in blocks else rng.choice(list(blocks))]
        width = rng.choice((1, 2, 4, 4, 8))
        filled = [at for at in range(0, BLOCK, width) if any(block[at : at + width])]
        at = rng.choice(filled or [0])
        value = rng.choice(EXTREMES) & ((1 << 8 * width) - 1)
        block[at : at + width] = value.to_bytes(width, rng.choice(("little", "big")))
    return {at: bytes(block) for at, block in blocks.items()}


def _partitioned(rng: random.Random, blocks: dict[int, bytes]) -> dict[int, bytes]:
    """The same a mebibyte further, beneath a table with partitions that all begin there."""
    count = rng.choice((1, 4, 128, 1024))
    step = rng.choice((0, 0, 1, 2048))
    last = rng.choice((1 << 21, 1 << 31, 1 << 34))
    kind, table = bytes(range(16)), bytearray()
    for number in range(count):
        first = 2048 + step * number
        table += kind + number.to_bytes(16, "big") + struct.pack("<QQQ", first, last, 0)
        table += "name".encode("utf-16-le").ljust(72, b"\0")
    header = struct.pack(
        "<8sIIIIQQQQ16sQIII",
        *(b"EFI PART", 1 << 16, 92, 0, 0, 1, last + 64, 34, last, bytes(16), 2, count, 128),
        zlib.crc32(table),
    )
    header = header[:16] + zlib.crc32(header).to_bytes(4, "little") + header[20:]
    mbr = bytearray(SECTOR)
    mbr[446:462] = bytes([0, 0, 2, 0, 0xEE, 255, 255, 255]) + struct.pack("<II", 1, 0xFFFF_FFFF)
    mbr[510:] = b"\x55\xaa"
    return _shifted(blocks, bytes(mbr) + header.ljust(SECTOR, b"\0") + bytes(table))


def _repeated(rng: random.Random, block: bytes) -> bytes:
    """*block*, from somewhere on full of the record that is there: as it is, or counting up."""
    length = rng.choice((2, 4, 8, 12, 16, 24, 32, 64, 128, 256, 512, 1024))
    filled = [at for at in range(0, BLOCK - length, length) if any(block[at : at + length])]
    at = rng.choice(filled or [0])
    records = np.frombuffer(block[at : at + length] * ((BLOCK - at) // length), dtype=np.uint8)
    rows = records.reshape(-1, length).copy()
    if rng.random() < 0.4:
        width = rng.choice([width for width in (1, 2, 4, 8) if length % width == 0])
        words = rows.view(rng.choice("<>") + f"u{width}")
        words[:, rng.randrange(words.shape[1])] += np.arange(len(rows)).astype(words.dtype)
    return (block[:at] + rows.tobytes()).ljust(BLOCK, b"\0")


def _shifted(blocks: dict[int, bytes], head: bytes) -> dict[int, bytes]:
    """*blocks* a mebibyte further, and *head* before them."""
    shifted = {at + (1 << 20) // BLOCK: block for at, block in blocks.items()}
    for at in range(0, len(head), BLOCK):
        shifted[at // BLOCK] = head[at : at + BLOCK].ljust(BLOCK, b"\0")
    return shifted


def _chained(rng: random.Random, blocks: dict[int, bytes]) -> dict[int, bytes]:
    """Beneath logical partitions, each of whose tables leads to the next, or back."""
    count, step = rng.choice((4, 255, 2040)), rng.choice((0, 1, 1))
    head = bytearray()
    for number in range(count + 1):
        first = 2048 - number if number else 0
        following = number + step if number else 1
        table = struct.pack("<B3xB3xII", 0, 0x83, first or 2048, 1 << 31) if number else b""
        table += struct.pack("<B3xB3xII", 0, 0x05, following - (number > 0), 2047)
        head += bytes(446) + table.ljust(64, b"\0") + b"\x55\xaa"
    return _shifted(blocks, bytes(head))


def _logical(rng: random.Random, blocks: dict[int, bytes]) -> dict[int, bytes]:
    """Beneath LVM: volumes of segments that are all of one place, or a text that makes no sense."""
    mark = 'contents = "Text Format Volume Group"\n'
    count = rng.choice((1, 4, 1000, 20_000))
    stripes = ", ".join(['"p", 0'] * rng.choice((1, 1, 2, 64)))
    segments = "".join(
        f'segment{n} {{start_extent = {n} extent_count = 64 type = "striped" stripe_size = 8'
        f" stripes = [{stripes}]}}\n"
        for n in range(rng.choice((1, 1, 100)))
    )
    volumes = "".join(f"l{n} {{\n{segments}}}\n" for n in range(count // 1000 + 1))
    group = (
        f"{mark}vg {{ seqno = 1 extent_size = 8 physical_volumes {{ p {{ pe_start = 2048 }} }}\n"
        f"logical_volumes {{\n{volumes}}} }}\n"
    )
    text = rng.choice((group, group, mark * count, mark + "#" * count, mark + "a {} " * count))
    area = rng.choice((BLOCK, 2 * BLOCK))
    label = b"LABELONE" + struct.pack("<QII", 1, 0, 32) + b"LVM2 001" + b"u" * 32 + bytes(8)
    label += bytes(16) + struct.pack("<QQ", area, 1 << 40) * rng.choice((0, 1, 1, 20))
    header = bytes(4) + b" LVM2 x[5A%r0N*>" + struct.pack("<IQQ", 1, area, 1 << 40)
    length = rng.choice((len(text), len(text), 4 << 20))
    header += struct.pack("<QQII", SECTOR, length, 0, 0)
    head = bytes(SECTOR) + label.ljust(SECTOR, b"\0")
    head = head.ljust(area, b"\0") + header.ljust(SECTOR, b"\0") + text.encode()
    return _shifted(blocks, head[: MOST_TEXT * BLOCK])


class _Laid:
    """The blocks of a disk in an image: mapped where they are, and again and again behind that."""

    def __init__(self, rng: random.Random, blocks: dict[int, bytes]) -> None:
        self._rng, self._bits = rng, rng.choice((12, 16, 16, 16, 21))
        self._cluster, self._blocks = 1 << self._bits, blocks
        self._file = Holed(size=rng.choice((0, 1 << 36, LARGEST)))
        self._next = 4

    def image(self) -> Holed:
        rng, cluster = self._rng, self._cluster
        host: dict[int, int] = {}
        for at, block in self._blocks.items():
            guest, within = divmod(at * BLOCK, cluster)
            if guest not in host:
                host[guest] = self._take(1)
            self._file.parts.append((host[guest] * cluster + within, block))
        l1_offset, l1_size, size = self._tables(host)
        refcounts = self._refcounts() if rng.random() < 0.5 else 0
        header = struct.pack(
            ">IIQIIQIIQQIIQQQQII8x",
            *(MAGIC, 3, 0, 0, self._bits, size, 0, l1_size, l1_offset),
            *(refcounts, 1 if refcounts else 0, 0, 0, 0, 0, 0, 4, HEADER_LENGTH),
        )
        self._file.parts.append((0, header))
        ends = (at + len(part) for at, part in self._file.parts)
        self._file.size = max(self._file.size, *ends)
        return self._file

    def _take(self, clusters: int) -> int:
        at = self._next
        self._next += clusters
        return at

    def _tables(self, host: dict[int, int]) -> tuple[int, int, int]:
        """The L1 table, its entries, and the bytes of the disk."""
        rng, entries = self._rng, self._cluster // 8
        firsts = sorted({guest // entries for guest in host})[:MOST_TABLES]
        repeated = self._table(host, firsts[0] * entries, is_filled=rng.random() < 0.8)
        tables = {first: self._table(host, first * entries, is_filled=False) for first in firsts}
        most = (1 << 17) // 8 if self._bits < 21 else 4096
        count = max(firsts[-1] + 1, rng.choice((1, 8, 1000, most)))
        l1 = np.full(count, repeated if rng.random() < 0.8 else 0, dtype=">u8")
        for first, table in tables.items():
            l1[first] = table
        if rng.random() < 0.5:
            l1[firsts[0]] = repeated
        at = self._take(-(-count * 8 // self._cluster)) * self._cluster
        self._file.parts.append((at, l1.tobytes()))
        return at, count, min(count * entries * self._cluster, (1 << 62))

    def _table(self, host: dict[int, int], first: int, *, is_filled: bool) -> int:
        """An L2 table for guest clusters *first* and on, as an L1 entry."""
        rng, entries = self._rng, self._cluster // 8
        words = np.zeros(entries, dtype=">u8")
        if is_filled:
            them = np.array(sorted(host.values()))
            if rng.random() < 0.5:
                them = them[: rng.choice((1, 2, 8))]
            shown = min(entries, 8192)
            words[:shown] = np.resize(them, shown) * self._cluster
            words[:shown] |= np.uint64(COPIED)
        for guest, cluster in host.items():
            if first <= guest < first + entries:
                words[guest - first] = np.uint64(COPIED | cluster * self._cluster)
        filled = np.flatnonzero(words)
        for at in rng.choices(filled, k=rng.choice((0, 1, 20))):
            words[at] |= np.uint64(512)  # damaged
        table = self._take(1)
        last = int(filled[-1]) + 1 if len(filled) else 1
        self._file.parts.append((table * self._cluster, words[:last].tobytes()))
        return COPIED | table * self._cluster

    def _refcounts(self) -> int:
        """A refcount table with a block, by which each cluster is used once."""
        table, block = self._take(1), self._take(1)
        self._file.parts.append((block * self._cluster, b"\0\1" * (BLOCK // 2)))
        self._file.parts.append((table * self._cluster, struct.pack(">Q", block * self._cluster)))
        return table * self._cluster
