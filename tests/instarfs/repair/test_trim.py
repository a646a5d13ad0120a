"""instarfs.repair.trim: which clusters nothing uses."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instarfs.repair.trim import free_runs, held_within, table_of, used_clusters
from planner.check.check import check_image
from planner.source import Bytes
from tests.images.builder import MIB, Image, ImageBuilder
from tests.images.damage import DAMAGES

SIZE = 4096


@pytest.fixture
def image() -> Image:
    """Host clusters: 0 header, 1 data, 2 L2 table, 3 and 4 free, 5 data, 6 free, 7 L1, 8 and 9
    refcounts.
    """
    builder = ImageBuilder(cluster_bits=12, size=MIB)
    builder.write(0, b"a" * SIZE)
    builder.skip(2)
    builder.write(1, b"b" * SIZE)
    builder.skip()
    return builder.build()


def runs(image: Image, kept: list[int] | None = None) -> list[tuple[int, int]]:
    report = check_image(image.source)
    columns = free_runs(report, len(image.data), np.array(kept or [], dtype=np.int64))
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_neighbours_are_one_run(image: Image) -> None:
    assert runs(image) == [(3 * SIZE, 2 * SIZE), (6 * SIZE, SIZE)]


def test_what_is_kept_is_left_out(image: Image) -> None:
    assert runs(image, [4, 6, 7, 99]) == [(3 * SIZE, SIZE)]


def test_a_leaked_cluster_is_not_free(image: Image) -> None:
    image.set_refcount(4, 1)
    assert runs(image) == [(3 * SIZE, SIZE), (6 * SIZE, SIZE)]
    report = check_image(image.source)
    assert 4 in used_clusters(report)
    assert 4 not in used_clusters(report, stored=False)


def test_a_cluster_with_references_and_no_refcount_is_not_free(image: Image) -> None:
    DAMAGES["missing-refcount"](image, random.Random(1))
    assert runs(image) == [(3 * SIZE, 2 * SIZE), (6 * SIZE, SIZE)]


def test_the_tail_of_the_file_is_free_as_far_as_it_goes(image: Image) -> None:
    image.data += bytes(SIZE + 700)
    assert runs(image)[-1] == (10 * SIZE, SIZE + 700)


def test_a_file_that_cannot_be_read_has_nothing_that_is_used() -> None:
    assert not len(used_clusters(check_image(Bytes(b"no image"))))


@given(st.lists(st.integers(1, 9), max_size=12), st.lists(st.integers(1, 9), max_size=12))
def test_what_of_some_runs_lies_in_extents(one: list[int], other: list[int]) -> None:
    """As counted byte by byte."""

    def alternating(lengths: list[int]) -> list[tuple[int, int]]:
        ends = np.cumsum([0, *lengths]).tolist()
        return list(itertools.pairwise(ends))[1::2]

    extents, runs = alternating(one), alternating(other)
    inside = {byte for start, end in extents for byte in range(start, end)}
    counted = sum(byte in inside for start, end in runs for byte in range(start, end))
    table = table_of(runs)
    assert held_within(table_of(extents), table[:, 0], table[:, 1] - table[:, 0]) == counted
