"""Columns as lines of text, thousands of rows at a time: for files that list millions of things.

A column of cells is a matrix of bytes, a row a cell, in which NUL is no byte at all: so cells of
different lengths stand side by side, and a line is what is left when the NULs are taken out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from instarfs.text import printable
from planner.arrays import I64, U8, U64, Mask
from planner.findings.kinds import NONE

# Formatting them one by one would take longer than checking a small image does.
_PLACES = np.array([1000, 100, 10, 1])
_DIGITS: U8 = (np.arange(10_000)[:, None] // _PLACES % 10 + ord("0")).astype(np.uint8)
_HEX: U8 = np.frombuffer(b"".join(b"%02x" % n for n in range(256)), np.uint8).reshape(-1, 2)

_Integers = npt.NDArray[np.integer]

T = TypeVar("T")


class Cells(Protocol[T]):
    """What makes columns: this module, and `instarfs.render.lengths`, which makes their lengths."""

    def same(self, content: bytes) -> T: ...
    def decimals(self, values: _Integers) -> T: ...
    def hexadecimals(self, values: U64) -> T: ...
    def labels(self, names: Sequence[str], which: _Integers | Mask) -> T: ...
    def either(self, which: Mask, one: T, other: T) -> T: ...
    def beside(self, *columns: T) -> T: ...
    def tabbed(self, *columns: T) -> T: ...
    def interleaved(self, parts: Sequence[tuple[I64, T]]) -> T: ...
    def gathered(self, cells: T, rows: I64, places: I64, count: int) -> T: ...


def same(content: bytes) -> U8:
    """The same cell in every row."""
    return np.frombuffer(content, dtype=np.uint8).reshape(1, -1)


def decimals(values: _Integers) -> U8:
    """Numbers; `NONE` becomes a dash."""
    none = values == NONE
    rest = np.where(none, 0, values).astype(np.uint64)
    groups: list[U8] = []
    while not groups or rest.any():
        rest, group = np.divmod(rest, np.uint64(10_000))
        groups.append(_DIGITS[group])
    cells: U8 = np.concatenate(groups[::-1], axis=1)
    leading = np.logical_and.accumulate(cells == ord("0"), axis=1)
    leading[:, -1] = False
    cells[leading] = 0
    cells[none, -1] = ord("-")
    return cells


def hexadecimals(values: U64) -> U8:
    """64-bit words as ``0x`` and sixteen digits."""
    digits = _HEX[values.astype(">u8").view(np.uint8)].reshape(-1, 16)
    return np.concatenate((np.broadcast_to(same(b"0x"), (len(values), 2)), digits), axis=1)


def labels(names: Sequence[str], which: _Integers | Mask) -> U8:
    """The cell ``names[which[row]]`` in each row. ASCII."""
    return np.array(names, dtype="S").reshape(-1, 1).view(np.uint8)[which.astype(np.intp)]


def either(which: Mask, one: U8, other: U8) -> U8:
    """The cells of *one* in the rows where *which* is true, of *other* in the others."""
    chosen = which[:, None]
    return np.concatenate((np.where(chosen, one, 0), np.where(chosen, 0, other)), axis=1)


def beside(*columns: U8) -> U8:
    """One column of the rows of *columns*, which stand beside each other as they are."""
    (rows,) = np.broadcast_shapes(*((len(column),) for column in columns))
    whole = [np.broadcast_to(column, (rows, column.shape[1])) for column in columns]
    return np.concatenate(whole, axis=1)


def tabbed(*columns: U8) -> U8:
    """The same, with a tab between each two cells of a row."""
    tab = same(b"\t")
    return beside(*[part for column in columns for part in (tab, column)][1:])


def interleaved(parts: Sequence[tuple[I64, U8]]) -> U8:
    """One column out of parts of it, each with the positions of its cells, ascending."""
    if len(parts) == 1:
        return parts[0][1]
    rows = sum(len(at) for at, _ in parts)
    column = np.zeros((rows, max(cells.shape[1] for _, cells in parts)), dtype=np.uint8)
    for at, cells in parts:
        column[at, : cells.shape[1]] = cells
    return column


def gathered(cells: U8, rows: I64, places: I64, count: int) -> U8:
    """*count* rows, of which cell *i* is in row ``rows[i]``, in its place of those that are."""
    most = int(places.max(initial=-1)) + 1
    column = np.zeros((count, most, cells.shape[1]), dtype=np.uint8)
    column[rows, places] = cells
    return column.reshape(count, -1)


def content(column: U8) -> bytes:
    """The cells of a column, each ended as a line."""
    cells = beside(column, same(b"\n"))
    found: bytes = cells[cells != 0].tobytes()
    return found


def tsv_lines(*columns: U8) -> bytes:
    """The rows of *columns*, with tabs between the cells, each ended as a line."""
    return content(tabbed(*columns))


def tsv(header: Sequence[str], parts: Iterable[bytes]) -> Iterator[bytes]:
    """A table: the line of headings, then its *parts*."""
    yield ("#" + "\t".join(header) + "\n").encode("ascii")
    yield from parts


def remark(sentence: str) -> bytes:
    """A line of a table that is none of its rows."""
    return f"# {printable(sentence)}\n".encode()
