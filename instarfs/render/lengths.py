"""How long the cells of `instarfs.render.columns` are, without the cells: int64, one a row.

The functions are named as there, and take the same; what is text there is one number here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from planner.arrays import I64, U64, Mask
from planner.findings.kinds import NONE

_POWERS = 10 ** np.arange(1, 20, dtype=np.uint64)

_Integers = npt.NDArray[np.integer]


def same(content: bytes) -> I64:
    """Of the same cell in every row."""
    return np.array([len(content)], dtype=np.int64)


def decimals(values: _Integers) -> I64:
    """Of numbers, none below 0 but `NONE`."""
    numbers = np.where(values == NONE, 0, values).astype(np.uint64)
    found: I64 = np.searchsorted(_POWERS, numbers, side="right") + 1
    return found


def hexadecimals(values: U64) -> I64:
    """Of 64-bit words."""
    return np.full(len(values), len("0x") + 16, dtype=np.int64)


def labels(names: Sequence[str], which: _Integers | Mask) -> I64:
    """Of ``names[which[row]]`` in each row. ASCII."""
    return np.array([len(name) for name in names], dtype=np.int64)[which.astype(np.intp)]


def either(which: Mask, one: I64, other: I64) -> I64:
    """Of the cells of *one* in the rows where *which* is true, of *other* in the others."""
    return np.where(which, one, other)


def beside(*columns: I64) -> I64:
    """Of the rows of *columns* together."""
    found: I64 = np.sum(np.stack(np.broadcast_arrays(*columns)), axis=0)
    return found


def tabbed(*columns: I64) -> I64:
    """The same, with a tab between each two cells of a row."""
    return beside(*columns) + (len(columns) - 1)


def interleaved(parts: Sequence[tuple[I64, I64]]) -> I64:
    """Of one column out of parts of it, each with the positions of its cells."""
    column = np.zeros(sum(len(at) for at, _ in parts), dtype=np.int64)
    for at, lengths in parts:
        column[at] = lengths
    return column


def gathered(cells: I64, rows: I64, places: I64, count: int) -> I64:  # noqa: ARG001 - as there
    """Of *count* rows, of which cell *i* is in row ``rows[i]``."""
    column = np.zeros(count, dtype=np.int64)
    np.add.at(column, rows, cells)
    return column


def content(column: I64) -> int:
    """Of the cells of a column, each ended as a line."""
    return int(column.sum()) + len(column)


def tsv(header: Sequence[str], parts: Iterable[int]) -> int:
    """Of a table, by the lengths of its *parts*."""
    return len("#\n") + sum(map(len, header)) + len(header) - 1 + sum(parts)
