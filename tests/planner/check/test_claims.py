"""Which refcount blocks are none, by what lies in their place."""

import random
import struct

import numpy as np
import pytest

from planner.check.check import check_image
from planner.check.claims import blocks_that_are_none, refcounts_are_shared, shared_refcounts
from planner.source import Bytes
from tests.images.builder import Image
from tests.images.corpus.rule import COPIED, SIZE, builder, fill, plain
from tests.planner.sources import Sparse


def none_of(image: Image) -> list[int]:
    source = Bytes(bytes(image.data))
    return list(map(int, blocks_that_are_none(source, check_image(source))))


def with_block(content: bytes) -> Image:
    image = plain()
    at = image.refblock(0)
    image.data[at : at + SIZE] = content.ljust(SIZE, b"\0")
    return image


def test_a_block_with_refcounts_is_one_however_wrong_some_are() -> None:
    image = plain()
    assert none_of(image) == []
    image.set_refcount(image.host_offset(1) // SIZE, 0)
    assert none_of(image) == []


def test_a_block_in_which_nearly_everything_leaks_is_one() -> None:
    made = fill(builder())
    made.skip(500)
    image = made.build()
    for cluster, count in enumerate(image.refcounts()):
        image.set_refcount(cluster, max(1, count))
    assert check_image(image.source).counters.leaks > 400
    assert none_of(image) == []


def test_a_block_of_a_file_that_was_longer_is_one() -> None:
    image = plain()
    end = image.host_clusters
    for cluster in range(end, end + 400):
        image.set_refcount(cluster, 1)
    image.set_word(image.l2_at(7), (end + 3) * SIZE | COPIED)
    image.set_refcount(image.host_offset(1) // SIZE, 2)
    assert none_of(image) == []


@pytest.mark.parametrize(
    "content",
    [b"", b"text " * (SIZE // 5), random.Random(1).randbytes(SIZE), b"\x80\0\0\0\0\1\0\0" * 99],
    ids=["zeros", "text", "noise", "table"],
)
def test_what_says_nothing_of_the_clusters_in_use_is_none(content) -> None:
    assert none_of(with_block(content)) == [0]


def test_only_what_holds_refcounts_is_shared() -> None:
    image = plain()
    image.set_word(image.reftable_at(0), image.l2_table(1))
    assert not refcounts_are_shared(image.source, check_image(image.source))
    image = plain()
    image.set_word(image.l2_at(1), image.refblock(0) | COPIED)
    assert refcounts_are_shared(image.source, check_image(image.source))


def test_blocks_in_holes_are_not_read() -> None:
    # Blocks that the guest has, too. What every second one would count is in use, and what the
    # others would is not: those may be blocks.
    count, cluster, covered = 1024, 512, 256 * 512
    block = np.arange(count, dtype=np.int64)
    place = np.where(block % 2, block * covered + covered // 2, (1 << 30) + block * cluster)
    reftable, l1, l2 = cluster, 20 * cluster, 21 * cluster
    place[0] = 40 * cluster
    words = l2 + np.arange(count // 64) * cluster
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII8x",
        *(
            b"QFI\xfb",
            3,
            0,
            0,
            9,
            count * cluster,
            0,
            len(words),
            l1,
            reftable,
            count * 8 // cluster,
        ),
        *(0, 0, 0, 0, 0, 4, 112),
    )
    data = bytearray(41 * cluster)
    data[: len(header)] = header
    data[reftable : reftable + 8 * count] = place.astype(">u8").tobytes()
    data[l1 : l1 + 8 * len(words)] = (words | COPIED - (1 << 64)).astype(">i8").tobytes()
    data[l2 : l2 + 8 * count] = (place | COPIED - (1 << 64)).astype(">i8").tobytes()
    data[40 * cluster :] = b"\0\1" * (cluster // 2)
    source = Sparse.of(bytes(data), size=1 << 32)
    report = check_image(source)
    source.bytes_read = 0
    shared = shared_refcounts(source, report)
    assert shared.tolist() == (np.sort(place[::2]) // cluster).tolist()
    assert source.bytes_read < count * cluster // 16


def test_a_block_that_many_entries_lead_to_is_read_once_for_what_the_file_has_not() -> None:
    image = plain()
    block = image.refblock(0)
    for index in range(1, SIZE // 8):
        image.set_word(image.reftable_at(index), block)
    image.set_word(image.l2_at(1), block | COPIED)
    source = Sparse.of(bytes(image.data), len(image.data))
    report = check_image(source)
    source.bytes_read = 0
    assert shared_refcounts(source, report).tolist() == [block // SIZE]
    assert source.bytes_read < 16 * SIZE


@pytest.mark.parametrize("order", [0, 1, 4, 6])
def test_of_a_large_block_that_is_a_hole_the_parts_are_read_that_are_there(order: int) -> None:
    made = builder(cluster_bits=20, refcount_order=order, size=1 << 30)
    made.write(0, b"content")
    image = made.build()
    image.set_word(image.l2_at(1), image.refblock(0) | COPIED)
    whole, size = Bytes(bytes(image.data)), image.cluster_size
    report = check_image(whole)
    source = Sparse.of(whole.data, whole.size, block=4096)
    assert shared_refcounts(source, report).tolist() == [image.refblock(0) // size]
    assert shared_refcounts(whole, report).tolist() == [image.refblock(0) // size]
    of_the_table = size
    assert source.bytes_read < of_the_table + size // 4
    image.data[image.refblock(0) + size - 8 : image.refblock(0) + size] = b"\xff" * 8
    others = Bytes(bytes(image.data))
    report = check_image(others)
    source = Sparse.of(others.data, others.size, block=4096)
    assert np.array_equal(shared_refcounts(source, report), shared_refcounts(others, report))
