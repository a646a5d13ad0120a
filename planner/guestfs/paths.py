"""Paths of inodes: one pass over all names keeps those of directories and of what is asked for.

Names are hostile. They are joined by ``/`` and lead nowhere: a path is a thing to be shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from planner.arrays import I64, U8, Mask, expand_ranges
from planner.guestfs.protocol import Names

MAX_DEPTH = 1 << 10
MAX_LENGTH = 1 << 14
"""Directories above each other, and bytes of their path; those further up are cut off."""

KEPT_AT_ONCE = 1 << 16


def contains(ascending: I64, values: I64) -> Mask:
    """Which of *values* are among those of a sorted column."""
    if not len(ascending):
        return np.zeros(len(values), dtype=np.bool_)
    at = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    found: Mask = ascending[at] == values
    return found


class Paths:
    """The paths of some inodes of one file system."""

    def __init__(self, names: Iterable[Names], wanted: I64, root: int) -> None:
        """*wanted*: ascending. All of *names* is gone through, and little of it kept."""
        self._root = root
        kept = _Kept()
        for batch in names:
            kept.add(batch, batch.is_directory | contains(wanted, batch.child))
        self._child, self._parent, self._start, self._length, self._pool = kept.columns()
        self._above: dict[int, bytes] = {root: b""}

    def of(self, inode: int) -> list[bytes]:
        """Every path that leads to *inode*; where a directory above is not known, from the number
        of that on: ``#12/name``. Empty if nothing names it.
        """
        if inode == self._root:
            return [b"/"]
        return [
            self._directory(int(self._parent[row])) + b"/" + self._name(row)
            for row in self._rows(inode)
        ]

    def have(self, inodes: I64) -> Mask:
        """Which of *inodes* something names."""
        named: Mask = contains(self._child, inodes) | (inodes == self._root)
        return named

    def _rows(self, inode: int) -> range:
        first = int(np.searchsorted(self._child, inode, side="left"))
        return range(first, int(np.searchsorted(self._child, inode, side="right")))

    def _name(self, row: int) -> bytes:
        start = int(self._start[row])
        return self._pool[start : start + int(self._length[row])].tobytes()

    def _directory(self, inode: int) -> bytes:
        """The path of a directory, without a slash at its end."""
        chain: list[tuple[int, bytes]] = []
        seen, length = {inode}, 0
        while inode not in self._above:
            rows = self._rows(inode)
            parent = int(self._parent[rows[0]]) if rows else inode
            name = self._name(rows[0]) if rows else b""
            length += len(name) + 1
            if not rows or parent in seen or len(chain) == MAX_DEPTH or length > MAX_LENGTH:
                self._above[inode] = b"#%d" % inode
                break
            chain.append((inode, name))
            seen.add(parent)
            inode = parent
        path = self._above[inode]
        for below, name in reversed(chain):
            path += b"/" + name
            # A long way down, begin anew: not every directory is to hold all the names above it.
            if len(path) > MAX_LENGTH:
                path = b"#%d" % below
            self._above[below] = path
        return path


class _Kept:
    """Rows of names that are kept, without what else was in their batches."""

    def __init__(self) -> None:
        self._parts: list[tuple[I64, I64, I64, U8]] = []

    def add(self, names: Names, which: Mask) -> None:
        rows = np.flatnonzero(which & (names.length > 0))
        for some in _shares(rows):
            self._parts.append(_taken(names, some))

    def columns(self) -> tuple[I64, I64, I64, I64, U8]:
        """(child, parent, start, length) by child, and the bytes of all names."""
        empty = np.zeros(0, dtype=np.int64)
        none = (empty, empty, empty, np.zeros(0, dtype=np.uint8))
        child, parent, length, pool = (
            np.concatenate(column) for column in zip(none, *self._parts, strict=True)
        )
        self._parts.clear()
        start = np.cumsum(length) - length
        order = np.argsort(child, kind="stable")
        return child[order], parent[order], start[order], length[order], pool


def _shares(rows: I64) -> Iterator[I64]:
    for at in range(0, len(rows), KEPT_AT_ONCE):
        yield rows[at : at + KEPT_AT_ONCE]


def _taken(names: Names, rows: I64) -> tuple[I64, I64, I64, U8]:
    """(child, parent, length of the name, all names) of some rows."""
    if names.encoding != "utf-8":
        written = [names.name(row) for row in rows.tolist()]
        length = np.array([len(each) for each in written], dtype=np.int64)
        pool = np.frombuffer(b"".join(written), dtype=np.uint8)
        return names.child[rows], names.parent[rows], length, pool
    length = names.length[rows]
    start = names.start[rows]
    pool = names.raw[expand_ranges(start, start + length - 1)]
    return names.child[rows], names.parent[rows], length, pool
