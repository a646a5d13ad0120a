"""Which refcount blocks are none, by what lies in their place."""

import random

import pytest

from planner.check.check import check_image
from planner.check.claims import blocks_that_are_none, refcounts_are_shared
from planner.source import Bytes
from tests.images.builder import Image
from tests.images.corpus.rule import COPIED, SIZE, builder, fill, plain


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
