"""Which words of a table are no entries, and which tables have no others."""

import numpy as np
import pytest

from planner.arrays import U64
from planner.check.check import check_image
from planner.qcow2 import entries
from planner.triage.strays import Strays
from planner.triage.table_entries import TableEntries
from tests.images.builder import MIB, Image, ImageBuilder


def strays(image: Image) -> Strays:
    return Strays(image.source, check_image(image.source))


def built(**options: object) -> Image:
    builder = ImageBuilder(**{"size": 8 * MIB, "cluster_bits": 14, **options})  # type: ignore[arg-type]
    builder.write(0, b"guest")
    return builder.build()


@pytest.mark.parametrize(
    ("word", "is_wrong", "is_alone"),
    [
        (entries.COPIED | 4 << 14, False, False),
        (4 << 14 | 5 << 15, False, False),  # as a snapshot has it
        (entries.ZERO, False, True),
        (entries.ZERO | entries.COPIED | 4 << 14, False, False),
        (1 << 20, True, True),
        (entries.COPIED | 4 << 14 | 512, True, True),
        (entries.COPIED | 4 << 14 | 2, True, True),
        (entries.COPIED | 1 << 50, True, True),
        (entries.COMPRESSED | 4 << 14, False, False),
        (entries.COMPRESSED, True, True),
        (entries.COMPRESSED | 63 << 56 | 4 << 14, True, True),  # of two clusters
    ],
)
def test_which_words_are_no_entries(word: int, is_wrong: bool, is_alone: bool) -> None:
    found = strays(built())
    words = np.array([0, word], dtype=np.uint64)
    filled = words != 0
    wrong = found.wrong(words, None, filled)
    assert wrong.tolist() == [False, is_wrong]
    assert found.alone(of_one_table(words), filled, wrong).tolist() == [is_alone]


def of_one_table(words: U64) -> TableEntries:
    return TableEntries(
        np.zeros(1, np.int64), np.zeros_like(words, np.int64), np.arange(len(words)), words, None
    )


def test_an_empty_table_has_no_stray_words() -> None:
    found, words = strays(built()), np.zeros(4, dtype=np.uint64)
    assert not found.alone(of_one_table(words), words != 0, words != 0).any()


def test_subclusters_that_read_as_zeros_are_no_stray_words() -> None:
    found = strays(built(extended_l2=True))
    words, bitmaps = np.zeros(2, dtype=np.uint64), np.array([1 << 32, 1], dtype=np.uint64)
    assert found.wrong(words, bitmaps, bitmaps != 0).tolist() == [False, True]
