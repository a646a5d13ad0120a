"""Runs of neighbours that are alike: made of columns, and joined where parts of a file meet.

A run is a row of columns: its first number, its length, and what all in it have alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from planner.arrays import I64

Columns = list[npt.NDArray[Any]]


def merge_runs(first: I64, length: I64, *alike: npt.NDArray[Any]) -> Columns:
    """Fewer runs, out of ascending ones that do not overlap: ``[first, length, *alike]``."""
    new = np.ones(len(first), dtype=np.bool_)
    new[1:] = first[1:] != first[:-1] + length[:-1]
    for column in alike:
        new[1:] |= column[1:] != column[:-1]
    start = np.flatnonzero(new)
    if len(start):
        length = np.add.reduceat(length, start)
    return [first[start], length, *(column[start] for column in alike)]


def join_parts(parts: Iterable[Columns]) -> Iterator[Columns]:
    """The same runs; one that the next part goes on with is not cut in two."""
    held: Columns = []
    for part in parts:
        if not len(part[0]):
            continue
        runs = part
        if held:
            head = [np.concatenate((old, new[:1])) for old, new in zip(held, part, strict=True)]
            runs = [
                np.concatenate((merged, new[1:]))
                for merged, new in zip(merge_runs(*head), part, strict=True)
            ]
        held = [column[-1:] for column in runs]
        yield [column[:-1] for column in runs]
    if held:
        yield held
