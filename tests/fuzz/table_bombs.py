"""Bombs of tables in a certain order: what `make_bomb` hits upon by chance, if at all."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field

import numpy as np

from planner.arrays import U64
from planner.qcow2 import extensions
from planner.qcow2.entries import COPIED
from planner.qcow2.header import MAGIC, Autoclear, Incompatible
from tests.fuzz.holed import BLOCK, HEADER_LENGTH, LARGEST, ROOM, Holed, extension


@dataclass
class _Header:
    """What a header says; ``more``: its extensions."""

    cluster_bits: int
    size: int = 0
    l1: int = 0
    l1_size: int = 0
    reftable: int = 0
    reftable_clusters: int = 0
    incompatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    more: bytes = field(default=b"")

    def encoded(self) -> bytes:
        fields = (MAGIC, 3, 0, 0, self.cluster_bits, self.size, 0, self.l1_size, self.l1)
        head = struct.pack(">IIQIIQIIQ", *fields)
        head += struct.pack(">QIIQ", self.reftable, self.reftable_clusters, 0, 0)
        head += struct.pack(">QQQ", self.incompatible, 0, self.autoclear)
        return head + struct.pack(">II8x", self.refcount_order, HEADER_LENGTH) + self.more


def make_turns(seed: int) -> Holed:
    """An external data file, and L1 entries that lead to several tables, one after the other."""
    rng = random.Random(f"turns {seed}")
    bits = rng.choice((12, 14, 16, 16, 18, 21, 21))
    is_extended = bits >= 14 and rng.random() < 0.2
    each = (1 << bits) // (16 if is_extended else 8)
    tables = rng.choice((1, 2, 3, 8, 8, 64))
    count = rng.choice((100, 3000, 30_000, 60_000))
    count = min(count, ((1 << 63) - (1 << 31)) // (each << bits))
    room = (ROOM - 8 * count) // BLOCK * BLOCK - 4 * BLOCK
    length = min(1 << bits, max(BLOCK, room // tables // BLOCK * BLOCK))
    tables = min(tables, room // length)
    header = _Header(bits, count * each << bits, 1 << bits, count)
    header.incompatible = Incompatible.DATA_FILE
    header.incompatible |= Incompatible.EXTENDED_L2 if is_extended else 0
    header.autoclear = rng.choice((0, Autoclear.DATA_FILE_RAW))
    header.more = extension(extensions.DATA_FILE, b"data") + bytes(8)
    first = max(1 << 30, 2 << bits)
    order = np.arange(count, dtype=np.uint64) % np.uint64(tables)
    if rng.random() < 0.3:
        np.random.default_rng(seed).shuffle(order)
    l1 = np.uint64(COPIED | first) + (order << np.uint64(bits))
    parts = [(0, header.encoded()), (1 << bits, l1.astype(">u8").tobytes())]
    for number in range(tables):
        words = _words_of_a_data_file(rng, length // 8, bits, count, number)
        if is_extended:
            words[1::2] = rng.choice((0, 0xFFFF_FFFF, 0x5555_5555, 0xAAAA_5555_0000_FFFF))
        at = rng.choice((0, 0, 0, (1 << bits) - length))
        parts.append((first + (number << bits) + at, words.astype(">u8").tobytes()))
    return Holed(parts, first + (tables << bits), {"data": Holed(size=LARGEST)})


def _words_of_a_data_file(
    rng: random.Random, count: int, bits: int, entries: int, number: int
) -> U64:
    """Each in its place at one of the L1 entries, in order or not, or here and there."""
    index = np.arange(count, dtype=np.uint64)
    kind = rng.randrange(6)
    if kind == 0:
        index += np.uint64(number * count)
    elif kind == 1:
        index += np.uint64(count * rng.randrange(entries))
    elif kind == 2:
        index *= np.uint64(2)
    elif kind == 3:
        index = index[::-1].copy()
    elif kind == 4:  # each at another of them
        index += np.uint64(count) * (index % np.uint64(entries))
    words = np.uint64(COPIED) | index << np.uint64(bits)
    if kind == 5:
        words[1::2] = rng.choice((0, 1, COPIED | 1))
    words &= np.uint64(COPIED | ((1 << 56) - 512) | 1)
    return words


def make_blocks(seed: int) -> Holed:
    """Refcount blocks as large as they can be, that tables and entries lead to as well."""
    rng = random.Random(f"blocks {seed}")
    bits, order = rng.choice((16, 18, 21, 21)), rng.choice((0, 0, 0, 1, 2, 4))
    cluster = 1 << bits
    blocks = rng.choice((1, 1, 4, 64, 200))
    header = _Header(bits, refcount_order=order)
    header.reftable, header.reftable_clusters = cluster, rng.choice((1, 2, (8 << 20) >> bits))
    first = 16
    number = np.arange(blocks, dtype=np.uint64)
    number = number if rng.random() < 0.7 else number // np.uint64(2)
    table = (number + np.uint64(first)) << np.uint64(bits)
    room = (ROOM - 32 * BLOCK) // (blocks + 2) // BLOCK * BLOCK
    fills = (b"\xff", b"\x55", b"\1", b"\x80", b"\0\1", rng.randbytes(4096))
    parts = [(cluster, table.astype(">u8").tobytes())]
    for at in range(blocks):
        fill, length = rng.choice(fills), min(cluster, rng.choice((BLOCK, max(BLOCK, room))))
        start = rng.choice((0, 0, cluster - length))
        parts.append(((first + at << bits) + start, fill * (length // len(fill))))
    header.l1 = (first + blocks) << bits
    header.l1_size = rng.choice((1, 2, blocks + 1, 512))
    l2 = first + blocks + (64 << 10 >> bits) + 1
    # Entries that lead to the blocks, to the table, and into holes behind.
    ways: U64 = np.concatenate((table, table, [cluster, l2 << bits, 1 << 35])).astype(np.uint64)
    l1 = np.full(header.l1_size, l2 << bits, dtype=np.uint64)
    some = rng.randrange(header.l1_size + 1)
    l1[:some] = np.resize(ways, some)
    words = np.resize(ways, min(cluster, max(BLOCK, room)) // 8)
    if rng.random() < 0.5:
        words = words + (np.arange(len(words), dtype=np.uint64) % 7 << np.uint64(bits))
    flags = np.uint64(rng.choice((0, COPIED)))
    parts.append((header.l1, (l1 | flags).astype(">u8").tobytes()))
    parts.append((l2 << bits, (words | flags).astype(">u8").tobytes()))
    header.size = min(header.l1_size * (cluster // 8) << bits, 1 << 60)
    parts.append((0, header.encoded()))
    return Holed(parts, rng.choice((l2 + 1 << bits, 1 << 36, 1 << 40, LARGEST)))


def make_subclusters(seed: int) -> Holed:
    """One or two large tables of extended entries that many L1 entries lead to."""
    rng = random.Random(f"subclusters {seed}")
    bits = rng.choice((16, 18, 21, 21, 21))
    cluster, each = 1 << bits, (1 << bits) // 16
    header = _Header(bits, incompatible=Incompatible.EXTENDED_L2)
    tables, header.l1, header.l1_size = rng.choice((1, 2)), cluster, rng.choice((2, 12, 64, 1000))
    header.size = header.l1_size * each << bits
    count = min(each, (ROOM - 16 * BLOCK) // 16 // tables)
    first, parts = 3, [(0, header.encoded())]
    for number in range(tables):
        words = np.zeros((count, 2), dtype=np.uint64)
        at = np.uint64(first + tables) + np.arange(count, dtype=np.uint64) * np.uint64(
            rng.choice((0, 1))
        )
        words[:, 0] = np.uint64(COPIED) | at << np.uint64(bits)
        words[:, 1] = rng.choice((0x5555_5555, 0xAAAA_AAAA, 0x5555_5555 << 32, 0x0F0F_0F0F))
        parts.append((first + number << bits, words.astype(">u8").tobytes()))
    ways = np.arange(first, first + tables, dtype=np.uint64) << np.uint64(bits)
    l1 = np.uint64(COPIED) | np.resize(ways, header.l1_size)
    parts.append((header.l1, l1.astype(">u8").tobytes()))
    return Holed(parts, rng.choice((first + tables + 8 << bits, 1 << 36, LARGEST)))
