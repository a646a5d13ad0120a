"""Ranges over ranges: against the same by single bytes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from planner.guestfs.overlaps import Rest, overlaps

bounds = st.lists(st.integers(0, 60), max_size=12, unique=True).map(
    lambda values: sorted(values)[: len(values) // 2 * 2]
)
anywhere = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=8)


def columns(pairs):
    return tuple(np.array([pair[at] for pair in pairs], dtype=np.int64) for at in (0, 1))


def bytes_of(start, end):
    return [byte for low, high in zip(start.tolist(), end.tolist(), strict=True)
            for byte in range(low, high)]  # fmt: skip


@given(asked=anywhere, known=bounds)
def test_every_byte_that_is_in_both_is_in_one_overlap(asked, known) -> None:
    start, length = columns(asked)
    known_start, known_end = columns(list(zip(known[::2], known[1::2], strict=True)))
    found = overlaps(start, start + length, known_start, known_end)
    expected = [
        (row, of, byte)
        for row, (low, count) in enumerate(asked)
        for of, (first, last) in enumerate(zip(known[::2], known[1::2], strict=True))
        for byte in range(max(low, first), min(low + count, last))
    ]
    parts = zip(*(c.tolist() for c in (found.row, found.of, found.start, found.end)), strict=True)
    got = [(row, of, byte) for row, of, low, high in parts for byte in range(low, high)]
    assert sorted(got) == sorted(expected)


@given(known=bounds, taken=st.lists(bounds, max_size=4), often=st.booleans())
def test_the_rest_is_what_was_not_taken(known, taken, often) -> None:
    start, end = columns(list(zip(known[::2], known[1::2], strict=True)))
    rest = Rest(start, end)
    rest.COLLECTED = 1 if often else rest.COLLECTED
    gone: set[int] = set()
    for each in taken:
        low, high = columns(list(zip(each[::2], each[1::2], strict=True)))
        over = overlaps(low, high, start, end)
        rest.take(over.start, over.end)
        gone |= set(bytes_of(over.start, over.end))
    left_start, left_end = rest.left()
    assert bytes_of(left_start, left_end) == [b for b in bytes_of(start, end) if b not in gone]
    assert (left_start[1:] >= left_end[:-1]).all()
