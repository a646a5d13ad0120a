"""Bombs of every width, whose tables are what `make_bomb` never makes: each entry of one of them
another, counts and lengths at their limits, compressed clusters that begin at any byte.
"""

from __future__ import annotations

import random
import struct

import numpy as np

from planner.arrays import U64
from planner.qcow2 import bitmaps, entries, extensions, snapshots
from planner.qcow2.header import CRYPT_LUKS, Autoclear, Incompatible
from planner.qcow2.layout import MAX_L1_BYTES
from tests.fuzz.guest_bombs import EXTREMES
from tests.fuzz.holed import BLOCK, HEADER_LENGTH, LARGEST, ROOM, Holed, Maker, Said, extension
from tests.images.luks_headers import luks_bytes

ENTRIES = 600
"""Snapshots or bitmaps that are each made by itself; behind them the last one again and again."""

KNOWN = (
    extensions.BACKING_FORMAT,
    extensions.FEATURE_NAMES,
    extensions.BITMAPS,
    extensions.CRYPTO_HEADER,
    extensions.DATA_FILE,
)


def make_limits(seed: int) -> Holed:
    """The bomb of that number, always the same."""
    rng = random.Random(f"limits {seed}")
    bits = rng.randint(9, 21)
    length = rng.choice((HEADER_LENGTH, HEADER_LENGTH, 104, 256, (1 << bits) - 256))
    incompatible, more = 0, b""
    if length >= HEADER_LENGTH and rng.random() < 0.2:
        incompatible |= Incompatible.COMPRESSION
    if rng.random() < 0.2:
        incompatible |= Incompatible.DATA_FILE
        more = extension(extensions.DATA_FILE, b"data")
    said = Said(
        version=3 if rng.random() < 0.9 else 2,
        cluster_bits=bits,
        refcount_order=rng.randint(0, 6),
        header_length=length,
        incompatible=incompatible,
        extensions=more,
        backing=rng.choice((b"", b"", b"data", b"\x1b" * (1023 if bits > 13 else 64))),
    )
    bomb = _Limits(rng, said, ROOM).make()
    bomb.beside = {"data": Holed(size=LARGEST)}
    return bomb


class _Limits(Maker):
    def _l2_content(self, length: int) -> bytes:
        """Compressed clusters beside and over each other, at any byte, and entries of other sorts
        among them; or what there is without."""
        rng, count = self._rng, max(2, length // 8)
        if self._is_extended or rng.random() < 0.3:
            return super()._l2_content(length)
        shift = 62 - (self._bits - 8)
        most = (1 << (self._bits - 8)) - 1
        packed = self._place(2 * self._cluster) + rng.choice((0, 0, 1, 511, self._cluster - 1))
        self._put(packed & -BLOCK, rng.randbytes(BLOCK) * rng.choice((1, 4)))
        numbers = np.random.default_rng(rng.randrange(1 << 32))
        offsets = np.arange(count, dtype=np.uint64) * np.uint64(rng.choice((0, 1, 3, 513, 4095)))
        if rng.random() < 0.3:
            offsets = numbers.integers(0, 1 << rng.choice((9, 20, shift)), count, dtype=np.uint64)
        lengths: U64 = np.full(count, rng.choice((0, 1, most)), dtype=np.uint64)
        if rng.random() < 0.5:
            lengths = numbers.integers(0, most, count, dtype=np.uint64, endpoint=True)
        offsets = (offsets + np.uint64(packed)) & np.uint64((1 << shift) - 1)
        words = np.uint64(entries.COMPRESSED) | lengths << np.uint64(shift) | offsets
        if rng.random() < 0.2:
            words |= np.uint64(entries.COPIED)
        if rng.random() < 0.4:
            other = self._anywhere() & ((1 << 64) - 1)
            step = rng.choice((2, 3, 100))
            words[::step] = rng.choice((0, 1, entries.COPIED | other & ~511, other))
        return words.astype(">u8").tobytes()

    def _snapshots(self) -> None:
        """Each with a table, a name and further data as short or long as may be, or longer."""
        rng = self._rng
        l1, l1_size = self._l1_table(MAX_L1_BYTES // 8)
        sizes = (0, 1, l1_size, l1_size // 2, MAX_L1_BYTES // 8, MAX_L1_BYTES // 8 + 1)
        steps = (0, 0, 8, self._cluster, MAX_L1_BYTES)
        known = snapshots.KNOWN_EXTRA_DATA
        lengths = (0, 8, known - 1, known, snapshots.MAX_EXTRA_DATA, snapshots.MAX_EXTRA_DATA + 1)
        names, step = rng.choice(((0, 1), (0, 1), (0, 1, 255, 65_535))), rng.choice(steps)
        at = table = self._place(1 << 20)
        each, run = b"", b""
        for number in range(rng.choice((1, 3, 40, ENTRIES))):
            extra = rng.choice(lengths[: rng.choice((4, 5, 5, 6))])
            id_length, name = rng.choice(names), rng.choice(names)
            state = rng.choice((0, 1, 0xFFFF_FFFF))
            where = (l1 + step * number) & ((1 << 64) - 1)
            head = struct.pack(
                ">QIHHIIQII", where, rng.choice(sizes), id_length, name, 0, 0, 0, state, extra
            )
            words = rng.choice((0, 1, 1 << 40, (1 << 64) - 1)).to_bytes(8, "big") * 3
            each = head + words[:extra]
            length = 40 + extra + id_length + name
            length += -length % 8
            if length > BLOCK:  # what the name is, is a hole
                self._put(at, each)
                at += length
                each = b""
                continue
            each = each.ljust(length, b"\x1b")
            run += each
            at += length
            if at - table > self._left // 2:
                break
        count = number + 1
        if each and rng.random() < 0.5:
            again = max(0, min(self._left // 2 // len(each), snapshots.MAX_SNAPSHOTS - count))
            run += each * again
            count += again
        self._put(table, run)
        count = rng.choice((count, count, snapshots.MAX_SNAPSHOTS, snapshots.MAX_SNAPSHOTS + 1))
        self._fields |= {"snapshot_count": count, "snapshots": table}

    def _bitmaps(self) -> None:
        """Each with a table, a name, flags and further data of its own, of any type."""
        rng = self._rng
        data = self._place(self._cluster)
        self._put(data, b"\x55" * min(self._cluster, 1 << 14))
        size = self._count(1 << 16)
        table = self._place(size * 8)
        to = rng.choice((1, data, data, self._anywhere()))
        self._put(table, self._words(min(size, self._left // 16), to))
        fitting = bitmaps.MAX_BITMAP_BYTES // self._cluster
        sizes = (0, 1, size, fitting, fitting + 1, bitmaps.MAX_TABLE_ENTRIES)
        step = rng.choice((0, 8, self._cluster, 8 << 20))
        directory, each, count = b"", b"", 0
        for number in range(rng.choice((1, 3, 40, ENTRIES))):
            name = rng.choice(
                (b"a", b"%d" % number, b"%d" % number, b"\x1b" * 1023, b"\xff" * 1024)
            )
            more = rng.choice((0, 0, 0, 8, 1023))
            each = struct.pack(
                ">QIIBBHI",
                *((table + step * number) & ((1 << 64) - 1), rng.choice(sizes)),
                rng.choice((0, bitmaps.IN_USE, bitmaps.AUTO, 4, 0xFFFF_FFFF)),
                *(rng.choice((bitmaps.TYPE_DIRTY,) * 4 + (0, 255)), rng.choice((0, 9, 16, 31, 63))),
                *(len(name), more),
            )
            each += bytes(more) + name
            each += bytes(-len(each) % 8)
            directory += each
            count += 1
            if len(directory) > self._left // 2:
                break
        if rng.random() < 0.5:
            again = max(0, min(self._left // 2 // len(each), extensions.MAX_BITMAPS - count))
            directory += each * again
            count += again
        at = self._place(len(directory))
        self._put(at, directory)
        count = rng.choice((count, count, count, extensions.MAX_BITMAPS))
        length = rng.choice((len(directory),) * 3 + (extensions.MAX_BITMAP_DIRECTORY,))
        self._extra += extension(extensions.BITMAPS, struct.pack(">IIQQ", count, 0, length, at))
        self._fields["autoclear"] = rng.choice((0, Autoclear.BITMAPS, Autoclear.BITMAPS))

    def _extensions(self) -> None:
        """Of each sort some, more than once, of any length; a header of LUKS that is one."""
        rng = self._rng
        room = max(0, min(self._cluster - self._said.header_length - 2048, self._left // 4))
        made = b""
        known = KNOWN if rng.random() < 0.1 else (extensions.FEATURE_NAMES,)
        for _ in range(rng.choice((1, 8, 1000))):
            length = rng.choice((0, 1, 15, 16, 24, 48, 1000, room // 2))
            magic = rng.choice((*known, 0x1234_5678, rng.randrange(1, 1 << 32)))
            one = extension(magic, rng.choice((b"\0", b"\1", b"\x1b", b"\xff")) * length)
            if len(made) + len(one) > room:
                break
            made += one
        self._left -= room
        if rng.random() < 0.5:
            header = bytearray(luks_bytes()[:BLOCK])
            for _ in range(rng.choice((0, 1, 4))):
                field = rng.randrange(104, 592, 4)
                header[field : field + 4] = rng.choice(EXTREMES).to_bytes(4, "big")
            at = self._put(self._place(1 << 21), bytes(header))
            length = rng.choice((len(header), 1 << 20, 64 << 20, (1 << 64) - 1))
            made = extension(extensions.CRYPTO_HEADER, struct.pack(">QQ", at, length)) + made
            self._fields["crypt"] = CRYPT_LUKS
        self._extra += made
