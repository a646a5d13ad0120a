"""Which clusters of a window a file system has something in: as one by one, in part of the room."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from planner.arrays import join_ranges
from planner.rescue.placing.pattern import _Used

WIDTH, WINDOWS = 8, 6


@given(
    st.lists(
        st.tuples(st.integers(0, WIDTH * WINDOWS - 1), st.integers(1, 20)), min_size=1, max_size=9
    ),
    st.sets(st.integers(0, WINDOWS - 1)),
)
def test_each_window_has_what_the_runs_have_there(
    runs: list[tuple[int, int]], chosen: set[int]
) -> None:
    dense = np.zeros(WIDTH * WINDOWS, dtype=np.bool_)
    first, length = np.array(runs).T
    end = np.minimum(first + length, WIDTH * WINDOWS)
    for low, high in zip(first, end, strict=True):
        dense[low:high] = True
    start, stop = join_ranges(first, end)
    used, windows = _Used(start, stop, WIDTH), np.array(sorted(chosen), dtype=np.int64)
    expected = dense.reshape(WINDOWS, WIDTH)[windows]
    assert (used.rows(windows) == expected).all()
    steps = np.diff(np.pad(expected, ((0, 0), (1, 0))).astype(np.int8), axis=1)
    assert used.count_runs(windows).tolist() == np.count_nonzero(steps == 1, axis=1).tolist()


def test_of_a_disk_of_any_size_only_windows_with_something_are_held() -> None:
    used = _Used(np.array([5, 1 << 50]), np.array([9, (1 << 50) + 1]), 8192)
    windows = np.array([0, 1 << 37])
    assert used.rows(windows).sum(axis=1).tolist() == [4, 1]
