"""Columns out of bytes: numbers that lie anywhere in many records, and each block only once."""

from __future__ import annotations

import numpy as np

from planner.arrays import I64, U8, Mask, without_repeats


def little(flat: U8, at: I64, size: int) -> I64:
    """The little-endian numbers of *size* bytes at *at* in *flat*, int64: of 8 bytes as signed."""
    value = flat[at].astype(np.int64)
    for place in range(1, size):
        value |= flat[at + place].astype(np.int64) << (8 * place)
    return value


def big(flat: U8, at: I64, size: int) -> I64:
    """As `little`, the most significant byte first."""
    value = flat[at].astype(np.int64)
    for place in range(1, size):
        value <<= 8
        value |= flat[at + place]
    return value


def select(which: Mask | I64, *columns: I64) -> tuple[I64, ...]:
    """Some rows of each of the columns."""
    return tuple(column[which] for column in columns)


class Once:
    """Blocks that were followed: a tree that bites its tail costs no more than its blocks."""

    def __init__(self) -> None:
        self._followed = np.zeros(0, dtype=np.int64)

    def first(self, block: I64) -> I64:
        """The rows of *block* that nobody asked for yet, each block once; they are noted."""
        order = np.argsort(block, kind="stable")
        ascending = block[order]
        is_new = np.ones(len(order), dtype=np.bool_)
        is_new[1:] = ascending[1:] != ascending[:-1]
        if len(self._followed):
            at = np.searchsorted(self._followed, ascending)
            is_new &= self._followed[np.minimum(at, len(self._followed) - 1)] != ascending
        rows = np.sort(order[is_new])
        if len(rows):
            merged = np.concatenate((self._followed, block[rows]))
            merged.sort(kind="stable")
            self._followed = without_repeats(merged)
        return rows
