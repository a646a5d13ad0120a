"""planner.arrays: ranges, held against the numbers in them."""

import random
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest

from planner.arrays import (
    count_each,
    distinct_columns,
    is_among,
    is_any_of,
    join_ranges,
    merged,
    rows_in_order,
    without_ranges,
)


def test_joined_ranges_hold_the_same_numbers_and_do_not_touch() -> None:
    rng = random.Random(1)
    for count in [0, 1, *range(2, 40)]:
        start = np.array([rng.randrange(60) for _ in range(count)], dtype=np.int64)
        end = start + np.array([rng.randint(1, 9) for _ in range(count)], dtype=np.int64)
        low, high = join_ranges(start, end)
        assert (low < high).all()
        assert (low[1:] > high[:-1]).all()
        before = {n for a, b in zip(start.tolist(), end.tolist(), strict=True) for n in range(a, b)}
        after = {n for a, b in zip(low.tolist(), high.tolist(), strict=True) for n in range(a, b)}
        assert after == before


def test_ranges_without_those_that_lie_within_them_hold_the_other_numbers() -> None:
    rng = random.Random(2)
    for count in range(40):
        start = np.array([rng.randrange(60) for _ in range(count)], dtype=np.int64)
        end = start + np.array([rng.randint(2, 9) for _ in range(count)], dtype=np.int64)
        whole, part = join_ranges(start, end), join_ranges(start[::2], end[::2] - 1)
        low, high = without_ranges(whole, part)
        assert (low < high).all()
        assert (low[1:] > high[:-1]).all()
        numbers = [set(np.concatenate([*map(np.arange, *each), []])) for each in (whole, part)]
        assert set(np.concatenate([*map(np.arange, low, high), []])) == numbers[0] - numbers[1]


def test_what_is_among_others_is_told_as_numpy_does(seed: int, cases: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(cases // 10):
        most = int(rng.integers(1, 60))
        values = rng.integers(0, 50, int(rng.integers(0, most)))
        ascending = np.unique(rng.integers(0, 50, int(rng.integers(0, most))))
        assert np.array_equal(is_among(values, ascending), np.isin(values, ascending))
        others = rng.integers(0, 50, int(rng.integers(0, most)))
        assert np.array_equal(is_any_of(values, others), np.isin(values, others))


@pytest.mark.parametrize("most", [1, 30, 1 << 20, 1 << 40])
def test_values_are_counted_as_numpy_does(most: int, seed: int, cases: int) -> None:
    """Whether there are more of them than lie between them, or fewer."""
    rng = np.random.default_rng(seed)
    for _ in range(cases // 10):
        least = int(rng.integers(0, 1 << 40))
        for low in (0, least):
            values = rng.integers(low, low + most, int(rng.integers(0, 60)))
            found = count_each(values)
            expected = np.unique(values, return_counts=True)
            assert [column.tolist() for column in found] == [each.tolist() for each in expected]


def test_columns_without_repeats_are_those_of_numpy(seed: int, cases: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(cases // 10):
        columns = rng.integers(0, 3, (4, int(rng.integers(1, 40))))
        found, which = distinct_columns(columns)
        expected, inverse = np.unique(columns, axis=1, return_inverse=True)
        assert np.array_equal(found, expected)
        assert np.array_equal(which, inverse.reshape(-1))


def test_columns_without_repeats_are_copied_once() -> None:
    columns = np.random.default_rng(1).integers(0, 1 << 40, (6, 1 << 16))
    tracemalloc.start()
    try:
        distinct_columns(columns)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.7 * columns.nbytes


def test_merged_columns_are_a_union() -> None:
    parts = [np.array(part, dtype=np.int64) for part in ([1, 4, 4], [], [0, 4, 9])]
    assert merged(*parts).tolist() == [0, 1, 4, 9]


DTYPES = [np.int64, np.int32, np.uint8, np.uint64, np.bool_]
WIDE = [(0, 0), (-5, 5), (0, 1 << 40), (-(1 << 63), (1 << 63) - 1)]


def test_rows_come_in_the_order_of_numpy_whatever_is_in_them(seed: int, cases: int) -> None:
    for case in range(cases):
        rng = np.random.default_rng((seed, case))
        count, columns = int(rng.integers(1, 40)), []
        for dtype in rng.choice(len(DTYPES), rng.integers(1, 7)).tolist():
            low, high = WIDE[rng.integers(len(WIDE))]
            some = rng.integers(low, high, min(count, 4), dtype=np.int64, endpoint=True)
            columns.append(rng.choice(some, count).astype(DTYPES[dtype]))
        order, new = rows_in_order(*columns)
        assert np.arange(count)[order].tolist() == np.lexsort(columns[::-1]).tolist()
        rows = list(zip(*(column[order].tolist() for column in columns), strict=True))
        assert new.tolist() == [True, *(one != other for one, other in pairwise(rows))]
