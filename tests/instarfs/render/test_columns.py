"""Columns as text: every row as Python would write it, whatever stands in the others."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from instarfs.render.columns import (
    beside,
    content,
    decimals,
    either,
    hexadecimals,
    interleaved,
    labels,
    same,
    tsv,
    tsv_lines,
)

WORDS = st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=20)


@given(st.lists(st.integers(-1, (1 << 63) - 1), min_size=1, max_size=20))
def test_numbers_and_dashes(values: list[int]) -> None:
    written = content(decimals(np.array(values, dtype=np.int64))).decode().splitlines()
    assert written == ["-" if value == -1 else str(value) for value in values]


@given(WORDS)
def test_words(values: list[int]) -> None:
    words = np.array(values, dtype=np.uint64)
    written = tsv_lines(decimals(words), hexadecimals(words)).decode().splitlines()
    assert written == [f"{value}\t{value:#018x}" for value in values]


def test_no_rows_are_no_text() -> None:
    nothing = np.zeros(0, dtype=np.int64)
    assert tsv_lines(decimals(nothing), labels(["a"], nothing), same(b"x")) == b""


def test_cells_of_every_kind_stand_side_by_side() -> None:
    numbers = np.array([5, 12345678, -1])
    which = numbers > 9
    chosen = either(which, same(b"many"), labels(["few", "none"], np.array([0, 0, 1])))
    assert tsv_lines(decimals(numbers), chosen, same(b"=")).decode() == (
        "5\tfew\t=\n12345678\tmany\t=\n-\tnone\t=\n"
    )


def test_a_table_begins_with_its_headings() -> None:
    assert b"".join(tsv(("a", "b"), [b"1\t2\n", b"3\t4\n"])) == b"#a\tb\n1\t2\n3\t4\n"


def test_parts_of_a_column_come_together_in_their_places() -> None:
    column = interleaved(
        [
            (np.array([0, 3]), beside(same(b"number "), decimals(np.array([5, 12345])))),
            (np.array([1, 2]), labels(["a", "b"], np.array([0, 1]))),
        ]
    )
    assert content(column) == b"number 5\na\nb\nnumber 12345\n"
