"""Bombs with holes: made up at random, of widths, counts and offsets at their limits.

Each occupies less than `FILE_BYTES`, whatever it claims. Every table may lead to one place many
times, to neighbours, over other tables, into holes, and past the end of the file.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from planner.arrays import U64
from planner.qcow2 import entries, extensions
from planner.qcow2.bitmaps import AUTO, IN_USE, TYPE_DIRTY
from planner.qcow2.header import MAGIC, V2_LENGTH, Autoclear, Incompatible
from tests.fuzz.targets import FILE_BYTES

BLOCK = 4096
"""What a file system gives at a time."""

ROOM = FILE_BYTES - (64 << 10)
"""So much is handed out; the rest is for what the file system adds."""

LARGEST = 1 << 43
"""Of a file; ext4 takes no more than 2^44 bytes."""

HEADER_LENGTH = 112
COPIED = entries.COPIED
CORNERS = (0, 1, 2, 3, 64, 1000, 8192, 32_768, 65_535, 65_536, 100_000)


@dataclass
class Holed:
    """A file: what of it is there, the later over the earlier, and how long it is.

    ``beside``: others in its folder, by their names.
    """

    parts: list[tuple[int, bytes]] = field(default_factory=list)
    size: int = 0
    beside: dict[str, Holed] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        with path.open("xb") as file:
            for offset, content in self.parts:
                file.seek(offset)
                file.write(content)
            file.truncate(max(self.size, file.tell()))
        path.chmod(0o600)
        for name, other in self.beside.items():
            other.write(path.with_name(name))


@dataclass(frozen=True)
class Said:
    """What a header says besides where its tables are. None: what `make_bomb` chooses."""

    version: int = 3
    cluster_bits: int | None = None
    refcount_order: int | None = None
    header_length: int = HEADER_LENGTH
    crypt: int = 0
    incompatible: int = 0
    autoclear: int = 0
    extensions: bytes = b""
    backing: bytes = b""


def extension(magic: int, data: bytes) -> bytes:
    """One header extension."""
    return struct.pack(">II", magic, len(data)) + data + bytes(-len(data) % 8)


def refcount_blocks_in_holes(cluster_bits: int) -> Holed:
    """Refcounts of one bit for 2^43 bytes, by a table that is there and blocks that are not."""
    cluster, count, table = 1 << cluster_bits, 98_304, 4 << 21
    header = struct.pack(
        ">IIQIIQIIQQIIQQQQII8x",
        *(MAGIC, 3, 0, 0, cluster_bits, 1 << 20, 0, 0, 0, table, -(-count * 8 // cluster), 0, 0),
        *(0, 0, 0, 0, HEADER_LENGTH),
    )
    blocks = (1 << 30) + np.arange(count, dtype=">u8") * cluster
    return Holed([(0, header), (table, blocks.tobytes())], LARGEST)


def leaks_in_holes(fill: bytes, blocks: int) -> Holed:
    """Refcounts of one bit, *fill* again and again, by which clusters leak that are holes."""
    bits = 16
    cluster = 1 << bits
    header = struct.pack(
        ">IIQIIQIIQQIIQQQQII8x",
        *(MAGIC, 3, 0, 0, bits, 1 << 30, 0, 2, 3 * cluster, cluster, 1, 0, 0),
        *(0, 0, 0, 0, HEADER_LENGTH),
    )
    table = (4 + np.arange(blocks, dtype=">u8")) * cluster
    content = fill * (blocks * cluster // len(fill))
    parts = [(0, header), (cluster, table.astype(">u8").tobytes()), (4 * cluster, content)]
    return Holed(parts, blocks * cluster * 8 * cluster)


def _with_l1(cluster_bits: int, entries_of_it: int) -> bytes:
    """A header with an L1 table of so many entries in the second cluster, and no refcounts."""
    return struct.pack(
        ">IIQIIQIIQQIIQQQQII8x",
        *(MAGIC, 3, 0, 0, cluster_bits, 1 << 43, 0, entries_of_it, 1 << cluster_bits, 0, 0, 0, 0),
        *(0, 0, 0, 4, HEADER_LENGTH),
    )


def tables_that_are_holes() -> Holed:
    """An L1 table each entry of which leads to a table of its own, where nothing is."""
    words = np.uint64(COPIED) | (1 << 16) + np.arange(98_304, dtype=np.uint64) << np.uint64(16)
    return Holed([(0, _with_l1(16, len(words))), (1 << 16, words.astype(">u8").tobytes())], LARGEST)


def one_table_for_all() -> Holed:
    """An L1 table each entry of which leads to the same 2 MiB, which are a hole."""
    words = np.full(98_304, COPIED | 1 << 30, dtype=">u8")
    return Holed([(0, _with_l1(21, len(words))), (1 << 21, words.tobytes())], 1 << 40)


def one_table_of_a_data_file() -> Holed:
    """An L1 table each entry of which leads to the same L2 table, which means something else at
    each of them: the data is in another file."""
    count, table = 98_304, 1 << 32
    named = extension(extensions.DATA_FILE, b"data") + bytes(8)
    header = bytearray(_with_l1(16, count))
    header[24:32] = (count << 29).to_bytes(8, "big")
    header[72:80] = int(Incompatible.DATA_FILE).to_bytes(8, "big")
    l1 = np.full(count, COPIED | table, dtype=">u8")
    l2 = np.uint64(COPIED) | np.arange(8192, dtype=np.uint64) << np.uint64(16)
    parts = [(0, bytes(header) + named), (1 << 16, l1.tobytes())]
    return Holed([*parts, (table, l2.astype(">u8").tobytes())], 1 << 33)


def tables_of_a_page(*, are_lost: bool) -> Holed:
    """Tables of 2 MiB, of each of which a page is there, and an L1 table that leads to them or is
    empty."""
    tables = _pages_of_tables(21)
    first = 2 if are_lost else 1 << 20
    words = np.uint64(COPIED) | np.arange(first, first + 140, dtype=np.uint64) << np.uint64(21)
    l1 = bytes(140 * 8) if are_lost else words.astype(">u8").tobytes()
    moved = [(at + (first - 2 << 21), part) for at, part in tables.parts[1:141]]
    return Holed([(0, _with_l1(21, 140)), (1 << 21, l1), *moved], LARGEST)


def _headers() -> Holed:
    """One after the other, each of an image with tables elsewhere."""
    fields = (MAGIC, 3, 0, 0, 16, 1 << 40, 0, 1 << 15, 3 << 16, 1 << 16, 1, 0, 0, 0, 0, 0, 4, 104)
    header = struct.pack(">IIQIIQIIQQIIQQQQII", *fields)
    return Holed([(at * BLOCK, header) for at in range(200)], LARGEST)


def _pages_of_tables(cluster_bits: int) -> Holed:
    """A page of an L2 table in each cluster, and holes."""
    cluster = 1 << cluster_bits
    words = np.uint64(COPIED) | (np.arange(512, dtype=np.uint64) + 512) * np.uint64(cluster)
    page = words.astype(">u8").tobytes()
    return Holed([(at * cluster, page) for at in range(1, 220)], LARGEST)


def _tables(bits: int, reftables: int) -> list[tuple[int, bytes]]:
    """Refcount tables, each of which counts cluster 0 and itself, and an L1 table of one entry."""
    block = (1 << bits, b"\0\1" * (1 << bits - 1))
    many = [(2 + at << bits, struct.pack(">Q", 1 << bits)) for at in range(reftables)]
    l1 = (2 + reftables << bits, struct.pack(">Q", COPIED | 3 + reftables << bits))
    l2 = (3 + reftables << bits, struct.pack(">Q", COPIED | 4 + reftables << bits))
    return [block, *many, l1, l2]


def _snapshots_without_a_header() -> Holed:
    entry = struct.pack(">QIHHIIQII", 3 << 16, 1, 1, 1, 1, 0, 0, 0, 16) + bytes(16) + b"1a"
    return Holed([*_tables(16, 1), (1 << 20, entry.ljust(64, b"\0") * 9000)], 1 << 24)


WITHOUT_A_HEADER: dict[str, Callable[[], Holed]] = {
    "nothing": lambda: Holed(size=LARGEST),
    "headers": _headers,
    "pages of tables": lambda: _pages_of_tables(16),
    "pages of large tables": lambda: _pages_of_tables(21),
    "refcount tables": lambda: Holed(_tables(16, 150), LARGEST),
    "refcount tables in small clusters": lambda: Holed(_tables(9, 250)),
    "snapshots": _snapshots_without_a_header,
}
"""Files of which the header is to be found."""


def make_bomb(seed: int, said: Said = Said(), room: int = ROOM) -> Holed:
    """The bomb of that number, always the same, that occupies no more than *room*."""
    return Maker(random.Random(seed), said, room).make()


class Maker:
    """One bomb. What a table is to hold is made before it is known whether there is room."""

    def __init__(self, rng: random.Random, said: Said, room: int) -> None:
        self._rng, self._said = rng, said
        bits = rng.choice((9, 9, 12, 14, 16, 16, 18, 21, 21))
        order = rng.choice((0, 0, 1, 3, 4, 4, 6))
        self._bits = bits if said.cluster_bits is None else said.cluster_bits
        self._cluster = 1 << self._bits
        self._order = order if said.refcount_order is None else said.refcount_order
        self._is_extended = self._bits >= 14 and rng.random() < 0.25
        self._left = room
        self._next = 4 * self._cluster
        self._file = Holed()
        self._targets = [0, self._cluster]
        self._fields: dict[str, int] = {}

    def make(self) -> Holed:
        steps: list[Callable[[], None]] = [self._refcounts, self._guest, self._snapshots]
        steps += [self._bitmaps, self._extensions]
        self._rng.shuffle(steps)
        chosen = self._rng.randint(1, len(steps))
        self._file.size = self._rng.choice((0, 0, 1 << 30, 1 << 36, 1 << 40, LARGEST))
        self._extra = b""
        for step in steps[:chosen]:
            step()
        self._file.parts += self._header()
        end = max(at + len(part) for at, part in self._file.parts)
        self._file.size = max(self._file.size, end)
        return self._file

    # ---- where ----

    def _put(self, offset: int, content: bytes) -> int:
        """Put as much of *content* at *offset* as there is room for: where it is."""
        content = content[: max(0, self._left // BLOCK * BLOCK)]
        if content:
            self._left -= (offset + len(content) - 1) // BLOCK * BLOCK - offset // BLOCK * BLOCK
            self._left -= BLOCK
            self._file.parts.append((offset, content))
        self._targets.append(offset)
        return offset

    def _place(self, length: int) -> int:
        """An aligned offset for so many bytes: behind what is there, or far out."""
        if self._rng.random() < 0.25:
            far = self._rng.choice((1 << 28, 1 << 32, 1 << 38, 1 << 42))
            return far + self._rng.randrange(1 << 10) * self._cluster
        at = self._next
        self._next += -(-max(1, length) // self._cluster) * self._cluster
        return at

    def _anywhere(self) -> int:
        """Where something may lead: to a table, into a hole, past the end, nowhere aligned."""
        kind = self._rng.random()
        if kind < 0.6:
            return self._rng.choice(self._targets) + self._rng.choice((0, 0, 0, self._cluster))
        if kind < 0.85:
            return self._rng.choice((1 << 26, 1 << 31, 1 << 37, 1 << 41))
        return self._rng.choice((0, 512, 1 << 50, (1 << 56) - 512, (1 << 63) - 512, (1 << 64) - 1))

    def _words(self, count: int, first: int, flags: int = 0) -> bytes:
        """A table that leads to one place, to neighbours, to every other, or to two in turn."""
        step = self._rng.choice((0, 0, self._cluster, self._cluster, 2 * self._cluster, 512))
        at = np.arange(count, dtype=np.uint64) * np.uint64(step)
        words: U64 = (np.uint64(first & ((1 << 64) - 1)) + at) | np.uint64(flags)
        if self._rng.random() < 0.2:
            words[1::2] = self._rng.choice((0, 1, flags, self._anywhere() & ((1 << 64) - 1)))
        if self._rng.random() < 0.2:
            np.random.default_rng(self._rng.randrange(1 << 32)).shuffle(words)
        return words.astype(">u8").tobytes()

    def _count(self, most: int) -> int:
        return min(most, self._rng.choice((*CORNERS, most)))

    # ---- what ----

    def _header(self) -> list[tuple[int, bytes]]:
        get = self._fields.get
        rng, incompatible = self._rng, 0
        if self._is_extended:
            incompatible |= Incompatible.EXTENDED_L2
        if rng.random() < 0.1:
            incompatible |= Incompatible.DIRTY
        if rng.random() < 0.1:
            incompatible |= Incompatible.COMPRESSION
        if rng.random() < 0.1:
            incompatible |= Incompatible.CORRUPT
        said = self._said
        incompatible |= said.incompatible
        # Without tables of a guest most are of a disk of no bytes: others are refused at once.
        disk = self._fields.get("size", rng.choice((0, 0, 1 << 40)))
        length = said.header_length if said.version > 2 else V2_LENGTH
        extra = said.extensions + self._extra + bytes(8)
        head = struct.pack(
            ">4sIQIIQIIQQIIQ",
            *(MAGIC.to_bytes(4, "big"), said.version),
            *((length + len(extra) if said.backing else 0), len(said.backing)),
            *(self._bits, disk, get("crypt", said.crypt), get("l1_size", 0), get("l1", 0)),
            *(get("reftable", 0), get("reftable_clusters", 0)),
            *(get("snapshot_count", 0), get("snapshots", 0)),
        )
        autoclear = get("autoclear", 0) | said.autoclear
        head += struct.pack(">QQQII", incompatible, 0, autoclear, self._order, said.header_length)
        head += bytes([incompatible & Incompatible.COMPRESSION and 1]) + bytes(7)
        return [(0, head[:length]), (length, extra + said.backing)]

    def _refcounts(self) -> None:
        """A refcount table, and of one or many blocks what there is room for."""
        rng, cluster = self._rng, self._cluster
        most = (8 << 20) // 8
        count = max(1, self._count(min(most, self._left // 16)))
        clusters = min(-(-count * 8 // cluster), (8 << 20) // cluster)
        if rng.random() < 0.2:
            clusters = (8 << 20) // cluster
        fill = rng.choice(
            (b"\x55", b"\xff", b"\1", b"\0\1", b"\x80", b"\0\0\0\1", rng.randbytes(512))
        )
        blocks = rng.choice((1, 1, 8, 200))
        room = min(cluster, max(BLOCK, self._left // 2 // blocks))
        first = self._place(blocks * cluster)
        for number in range(blocks):
            self._put(first + number * cluster, fill * (room // len(fill)))
        table = self._place(clusters * cluster)
        to = first if rng.random() < 0.6 else self._anywhere()
        self._put(table, self._words(min(count, clusters * cluster // 8), to))
        self._fields |= {"reftable": table, "reftable_clusters": clusters}

    def _l2_content(self, length: int) -> bytes:
        """L2 entries of one sort, or of two in turn."""
        rng = self._rng
        shift = 62 - (self._bits - 8)
        packed = self._place(2 * self._cluster)
        unpacked = min(self._cluster, 1 << 21)
        is_zstd = self._said.incompatible & Incompatible.COMPRESSION
        self._put(packed, _zstd(unpacked) if is_zstd else _deflated(unpacked))
        sectors = rng.choice((0, 1, (1 << (self._bits - 8)) - 1))
        kinds: tuple[Callable[[], int], ...] = (
            lambda: 0,
            lambda: 1,
            lambda: COPIED | self._anywhere(),
            self._anywhere,
            lambda: COPIED | self._anywhere() | 1,
            lambda: entries.COMPRESSED | sectors << shift | packed,
            lambda: entries.COMPRESSED | sectors << shift | self._anywhere() & ((1 << shift) - 1),
            lambda: rng.randrange(1 << 64),
        )
        mask = (1 << 64) - 1
        words = np.frombuffer(
            self._words(max(2, length // 8), rng.choice(kinds)() & mask), dtype=">u8"
        ).copy()
        if self._is_extended:
            bitmaps = (0, 1, 0x5555_5555, 0xAAAA_AAAA_5555_5555, mask, 0xFFFF_FFFF)
            words[1::2] = rng.choice(bitmaps)
        elif rng.random() < 0.4:
            words[1::2] = rng.choice(kinds)() & mask
        return words.tobytes()

    def _l1_table(self, most: int) -> tuple[int, int]:
        """An L1 table with L2 tables behind it: its offset and number of entries."""
        rng, cluster = self._rng, self._cluster
        tables = rng.choice((1, 1, 2, 20, 200))
        each = min(cluster, max(BLOCK, self._left // 2 // tables))
        first = self._place(tables * cluster)
        content = self._l2_content(each)
        for number in range(tables):
            self._put(first + number * cluster, content)
        count = self._count(most)
        present = min(count, self._left // 16)
        table = self._place(count * 8)
        to = first if rng.random() < 0.7 else self._anywhere()
        flags = COPIED if rng.random() < 0.7 else 0
        if rng.random() < 0.9:
            self._put(table, self._words(present, to, flags))
        return table, count

    def _guest(self) -> None:
        table, count = self._l1_table((32 << 20) // 8)
        coverage = self._cluster * self._cluster // (16 if self._is_extended else 8)
        disk = min(max(1, count) * coverage, (1 << 63) - (1 << 31))
        self._fields |= {"l1": table, "l1_size": count, "size": disk // 512 * 512}

    def _snapshots(self) -> None:
        """Snapshots: many with one L1 table or none, or few with names as long as can be."""
        rng = self._rng
        l1, l1_size = (0, 0) if rng.random() < 0.2 else self._l1_table((32 << 20) // 8)
        count = max(1, self._count(65_536))
        step = rng.choice((0, 0, self._cluster, 32 << 20))
        name, id_length = (
            (0, 0) if count > 300 else rng.choice(((0, 0), (65_535, 65_535), (255, 9)))
        )
        extra = rng.choice((0, 16, 24, 1024)) if count < 1000 else 16
        table = self._place(count * (40 + extra + name + id_length))
        state = rng.choice((0, 0, 1, 0xFFFF_FFFF))
        at, run = table, bytearray()
        for number in range(count):
            entry = struct.pack(
                ">QIHHIIQII",
                *((l1 + step * number) & ((1 << 64) - 1), l1_size, id_length, name),
                *(0, 0, 0, state, extra),
            )
            entry += (rng.choice((0, 1 << 40)).to_bytes(8, "big") * 2)[:extra]
            length = -(-(40 + extra + id_length + name) // 8) * 8
            if length > 2 * BLOCK:  # the name is a hole
                self._put(at, entry)
                at += length
                continue
            run += entry.ljust(length, b"\x1b")
            if len(run) > self._left - (64 << 10):
                count = number + 1 if rng.random() < 0.5 else count
                break
        if run:
            self._put(table, bytes(run))
        self._fields |= {"snapshot_count": count, "snapshots": table}

    def _bitmaps(self) -> None:
        """Bitmaps: many with one table or with tables in holes, or few with long names."""
        rng = self._rng
        data = self._place(self._cluster)
        self._put(data, b"\x55" * min(self._cluster, 1 << 16))
        size = self._count(1 << 20)
        table = self._place(size * 8)
        to = data if rng.random() < 0.6 else self._anywhere()
        self._put(table, self._words(min(size, self._left // 16), rng.choice((1, to, to))))
        count = max(1, self._count(65_535))
        step = rng.choice((0, 0, self._cluster, 8 << 20))
        name = rng.choice((b"a", b"a", b"\x1b" * 1023))
        flags = rng.choice((0, IN_USE, AUTO))
        granularity = rng.choice((9, 9, 16, 31))
        each = struct.calcsize(">QIIBBHI") + len(name)
        each += -each % 8
        count = min(count, (64 << 20) // each)
        fits = min(count, max(1, (self._left - BLOCK) // each))
        directory = b"".join(
            (
                struct.pack(
                    ">QIIBBHI",
                    *((table + step * n) & ((1 << 64) - 1), size, flags),
                    *(TYPE_DIRTY, granularity, len(name), 0),
                )
                + name
            ).ljust(each, b"\0")
            for n in range(fits)
        )
        if rng.random() < 0.7:
            count = fits
        at = self._place(count * each)
        self._put(at, directory)
        pointer = struct.pack(">IIQQ", count, 0, count * each, at)
        self._extra += struct.pack(">II", extensions.BITMAPS, 24) + pointer
        self._fields["autoclear"] = int(Autoclear.BITMAPS)

    def _extensions(self) -> None:
        """As many as fit into the first cluster, names of features, a LUKS header of any length."""
        rng = self._rng
        room = max(0, min(self._cluster, self._left // 2) - 512)
        kind = rng.randrange(4)
        if kind == 0:
            self._extra += struct.pack(">II", 0x1234_5678, 0) * (room // 8)
        elif kind == 1:
            names = b"".join(bytes([n & 1, n & 63]) + b"\x1b" * 46 for n in range(room // 48))
            self._extra += struct.pack(">II", extensions.FEATURE_NAMES, len(names)) + names
        elif kind == 2:
            self._extra += struct.pack(">II", 0x1234_5678, room // 8 * 8) + b"\xff" * (
                room // 8 * 8
            )
        else:
            room = 0
            length = rng.choice((592, 1 << 20, 1 << 40, (1 << 63) - 1, (1 << 64) - 1))
            at = self._place(BLOCK)
            self._put(at, b"LUKS\xba\xbe\0\1" + rng.randbytes(584))
            self._extra += struct.pack(">IIQQ", extensions.CRYPTO_HEADER, 16, at, length)
            self._fields["crypt"] = 2
        self._left -= room


def _deflated(length: int) -> bytes:
    """So many zeros, as few bytes as deflate makes of them."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    return packer.compress(bytes(length)) + packer.flush()


def _zstd(length: int) -> bytes:
    """The same by zstd: a frame of blocks each of which is one byte again and again (RFC 8878)."""
    most = 128 << 10
    sizes = [min(most, length - at) for at in range(0, length, most)]
    blocks = [(size << 3 | 2 | (at + most >= length)).to_bytes(3, "little") + b"\0"
              for at, size in zip(range(0, length, most), sizes, strict=True)]  # fmt: skip
    return b"\x28\xb5\x2f\xfd\0\x58" + b"".join(blocks)
