"""Small images that ask for a great deal: each multiplies two numbers that an attacker names.

Below `FILE_BYTES` each, and what a random search rarely finds, for it takes thousands of entries
that agree with each other.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from planner.qcow2 import entries, extensions
from planner.qcow2.bitmaps import IN_USE, TYPE_DIRTY, Bitmap, encode_bitmap
from planner.qcow2.header import Autoclear
from tests.fuzz.targets import FILE_BYTES
from tests.images.builder import Image, ImageBuilder

CLUSTER = 512
COPIED = entries.COPIED

Bomb = Callable[[], Image]
BOMBS: dict[str, Bomb] = {}


def bomb(make: Bomb) -> Bomb:
    """Enter *make* under its name."""
    BOMBS[make.__name__.replace("_", "-")] = make
    return make


def base(cluster_bits: int = 9, *, more: tuple[tuple[int, bytes], ...] = ()) -> Image:
    """A small image with a guest cluster."""
    size = 200 << cluster_bits
    builder = ImageBuilder(cluster_bits=cluster_bits, size=size, more_extensions=more)
    builder.write(0, b"guest")
    return builder.build()


def append(image: Image, content: bytes) -> int:
    """Put *content* into new clusters at the end: their offset."""
    image.data += bytes(-len(image.data) % CLUSTER)
    at = len(image.data)
    image.data += content + bytes(-len(content) % CLUSTER)
    return at


def words(value: int, count: int, step: int = 0) -> bytes:
    """A table of *count* words, each *step* more than the one before."""
    return b"".join(struct.pack(">Q", value + step * n) for n in range(count))


def with_snapshots(image: Image, number: int, l1_offset: int, l1_size: int, step: int = 0) -> Image:
    """*number* snapshots, with L1 tables that begin *step* bytes apart."""
    table = b"".join(
        struct.pack(">QIHHIIQII", l1_offset + step * n, l1_size, 0, 0, 0, 0, 0, 0, 16) + bytes(16)
        for n in range(number)
    )
    image.change_header(nb_snapshots=number, snapshots_offset=append(image, table))
    return image


def with_bitmaps(image: Image, number: int, offset: int, size: int, step: int = 0) -> Image:
    """*number* bitmaps with tables of *size* entries, *step* bytes apart."""
    directory = b"".join(
        encode_bitmap(Bitmap(0, offset + step * n, size, IN_USE, TYPE_DIRTY, 9, 0, b""))
        for n in range(number)
    )
    at = append(image, directory)
    pointer = struct.pack(">IIQQ", number, 0, len(directory), at)
    length = image.header.header_length
    image.data[length : length + 32] = struct.pack(">II", extensions.BITMAPS, 24) + pointer
    image.data[length + 32 : length + 40] = bytes(8)
    image.change_header(autoclear_features=Autoclear.BITMAPS)
    return image


@bomb
def snapshots_of_nothing() -> Image:
    return with_snapshots(base(), 18000, 0, 0)


@bomb
def snapshots_that_are_only_claimed() -> Image:
    image = base()
    image.change_header(nb_snapshots=65536, snapshots_offset=len(image.data))
    return image


@bomb
def snapshots_with_one_l1_table() -> Image:
    image = base()
    at = append(image, words(COPIED | 1024, 64000))
    return with_snapshots(image, 9000, at, 64000)


@bomb
def snapshots_with_one_empty_l1_table() -> Image:
    image = base()
    return with_snapshots(image, 9000, append(image, bytes(64000 * 8)), 64000)


@bomb
def snapshots_with_small_l1_tables() -> Image:
    image = base()
    return with_snapshots(image, 18000, append(image, words(COPIED | 1024, 64)), 64)


@bomb
def snapshots_with_l1_tables_in_holes() -> Image:
    return with_snapshots(base(), 18000, 1 << 40, 4 << 20, step=32 << 20)


@bomb
def snapshots_with_misaligned_l1_tables() -> Image:
    return with_snapshots(base(), 18000, 513, 64)


@bomb
def a_long_name_in_every_sentence() -> Image:
    image = base()
    l2 = append(image, words(COPIED | 1 << 58 | 1024, 64))
    l1 = append(image, words(COPIED | l2, 1000))
    entry = struct.pack(">QIHHIIQII", l1, 1000, 0, 0xFFFF, 0, 0, 0, 0, 16) + bytes(16 + 0xFFFF)
    image.change_header(nb_snapshots=1, snapshots_offset=append(image, entry))
    return image


@bomb
def bitmaps_with_one_table() -> Image:
    image = base()
    at = append(image, words(3, 60000))
    return with_bitmaps(image, 16000, at, 60000)


@bomb
def bitmaps_with_one_table_of_clusters() -> Image:
    image = base()
    at = append(image, words(1024, 60000))
    return with_bitmaps(image, 16000, at, 60000)


@bomb
def bitmaps_with_tables_in_holes() -> Image:
    return with_bitmaps(base(), 30000, 1 << 40, 1 << 20, step=8 << 20)


@bomb
def misaligned_l2_tables() -> Image:
    """The file is its own L1 table, and every sector of it an L2 table of 2 MiB."""
    image = base(21)
    del image.data[CLUSTER:]
    image.data[200:] = words(CLUSTER, 100_000, step=CLUSTER)
    image.change_header(l1_table_offset=0, l1_size=100_000)
    return image


@bomb
def l1_entries_past_the_end() -> Image:
    image = base()
    at = append(image, words(COPIED | 1 << 40, 100_000, step=CLUSTER))
    image.change_header(l1_table_offset=at, l1_size=100_000)
    return image


@bomb
def one_l2_table_for_the_whole_disk() -> Image:
    image = base()
    l2 = append(image, words(COPIED | 1024, 64))
    at = append(image, words(COPIED | l2, 100_000))
    image.change_header(l1_table_offset=at, l1_size=100_000)
    return image


@bomb
def one_cluster_for_the_whole_disk() -> Image:
    """Every entry of many L2 tables leads to the same cluster."""
    image = base()
    l2 = append(image, words(COPIED | 1024, 110_000))
    at = append(image, words(COPIED | l2, 110_000 // 64, step=CLUSTER))
    image.change_header(l1_table_offset=at, l1_size=110_000 // 64)
    return image


@bomb
def compressed_clusters_in_one_place() -> Image:
    """Every entry is a compressed cluster, as long as it can be, at the same place."""
    image = base(16)
    del image.data[3 << 16 :]
    shift = image.geometry.compressed_shift
    l2 = append(image, words(entries.COMPRESSED | 255 << shift | 70_000, 12 * 8192))
    at = append(image, words(l2, 12, step=1 << 16))
    image.change_header(l1_table_offset=at & ~0xFFFF, l1_size=12)
    return image


@bomb
def reftable_of_one_block() -> Image:
    image = base()
    at = append(image, words(1024, 100 * 64))
    image.change_header(refcount_table_offset=at, refcount_table_clusters=100)
    return image


@bomb
def reftable_of_blocks_past_the_end() -> Image:
    image = base()
    at = append(image, words(1 << 40, 1500 * 64, step=CLUSTER))
    image.change_header(refcount_table_offset=at, refcount_table_clusters=1500)
    return image


@bomb
def everything_is_leaked() -> Image:
    image = base()
    count = 1 << 11
    blocks = append(image, words(0x0001_0000_0001_0000, 512 * 8))
    at = append(image, words(blocks, 8, step=CLUSTER))
    image.change_header(refcount_table_offset=at, refcount_table_clusters=1)
    image.data += bytes(count * CLUSTER - len(image.data))
    return image


@bomb
def many_extensions() -> Image:
    image = base(20)
    del image.data[FILE_BYTES - 4096 :]
    length = image.header.header_length
    image.data[length : len(image.data) - 64] = struct.pack(">II", 0x1234_5678, 0) * (
        (len(image.data) - 64 - length) // 8
    )
    return image


@bomb
def many_feature_names() -> Image:
    names = b"".join(bytes([n & 1, n & 63]) + b"\x1b" * 46 for n in range(20_000))
    image = base(20)
    del image.data[FILE_BYTES - 4096 :]
    length = image.header.header_length
    table = struct.pack(">II", extensions.FEATURE_NAMES, len(names)) + names + bytes(8)
    image.data[length : length + len(table)] = table
    return image
