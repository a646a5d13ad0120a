"""Votes: which window each piece of evidence would give a table, counted, and what they decide.

A vote counts only if no other place would give it: of several windows that one block fits, or
several tables that fit one window, none is believed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

import numpy as np

from planner.arrays import I64, U8, Mask, distinct_columns, is_any_of, rows_in_order
from planner.findings.kinds import NONE


class Evidence(StrEnum):
    """The classes of evidence."""

    ONLY_PLACE = "only-place"
    SNAPSHOT = "snapshot"
    SELF_ADDRESS = "self-address"
    CHECKSUM = "checksum"
    DIRECTORY = "directory"
    PATTERN = "pattern"
    CONTENT = "content"


@dataclass(frozen=True, slots=True, eq=False)
class Votes:
    """``table`` would stand in ``window``, and the block ``inside`` it says so; int64 columns."""

    evidence: Evidence
    table: I64
    window: I64
    inside: I64

    def __len__(self) -> int:
        return len(self.table)

    def select(self, which: Mask | I64) -> Votes:
        """Some of them."""
        return Votes(self.evidence, self.table[which], self.window[which], self.inside[which])


def fitting(evidence: Evidence, table: I64, inside: I64, offset: I64, coverage: int) -> Votes:
    """Votes of blocks *inside* the windows of tables, that are to lie at *offset* of the disk.

    Of those whose place within a window is the right one, and without rivals.
    """
    fits = (offset >= inside) & ((offset - inside) % coverage == 0)
    window = (offset[fits] - inside[fits]) // coverage
    return without_rivals(Votes(evidence, table[fits], window, inside[fits]))


def without_rivals(votes: Votes) -> Votes:
    """Those of blocks that fit one window alone, in windows in which one table alone fits there."""
    if not len(votes):
        return votes
    block = _numbered(votes.table, votes.inside)
    place = _numbered(votes.window, votes.inside)
    pair = _numbered(block, place)
    _, first = np.unique(pair, return_index=True)
    block, place = block[first], place[first]
    alone = (np.bincount(block)[block] == 1) & (np.bincount(place)[place] == 1)
    return votes.select(first[alone])


def _numbered(one: I64, other: I64) -> I64:
    """Pairs of numbers as numbers, the same for the same."""
    _, a = np.unique(one, return_inverse=True)
    _, b = np.unique(other, return_inverse=True)
    _, pair = np.unique(a * (int(b.max()) + 1) + b, return_inverse=True)
    result: I64 = pair.reshape(-1).astype(np.int64)
    return result


CLASSES = tuple(sorted(Evidence))
"""As they are listed; a column has the position of each."""


@dataclass(frozen=True, slots=True, eq=False)
class Tally:
    """What was voted, counted: how often (``count``) a class of ``evidence``, a position among
    `CLASSES`, was for a ``table`` in a ``window``. A row each, ascending by these; int64 columns.
    """

    table: I64
    window: I64
    evidence: I64
    count: I64

    def __len__(self) -> int:
        return len(self.table)

    @classmethod
    def none(cls) -> Tally:
        """Nothing was voted."""
        return cls(*np.zeros((4, 0), dtype=np.int64))

    @classmethod
    def of(cls, evidence: Evidence, table: I64, window: I64) -> Tally:
        """A vote for each *table* in a *window*."""
        which = np.full(len(table), CLASSES.index(evidence), dtype=np.int64)
        return cls.none().joined(cls(table, window, which, np.ones_like(which)))

    def select(self, which: Mask) -> Tally:
        """Some of the rows."""
        columns = self.table, self.window, self.evidence, self.count
        return Tally(*(column[which] for column in columns))

    def joined(self, *others: Tally) -> Tally:
        """With the votes of others, in any order."""
        table, window, evidence, count = (
            np.concatenate([getattr(each, name) for each in (self, *others)])
            for name in Tally.__slots__
        )
        order, new = rows_in_order(table, window, evidence)
        start = np.flatnonzero(new)
        count = np.add.reduceat(count[order], start) if len(start) else count
        return Tally(table[order][new], window[order][new], evidence[order][new], count)

    def besides(self, other: Tally) -> Tally:
        """Those for windows that *other* has no votes for, of the same table."""
        pair = np.stack([np.append(self.table, other.table), np.append(self.window, other.window)])
        _, which = distinct_columns(pair)
        return self.select(~is_any_of(which[: len(self)], which[len(self) :]))

    def ballots(self) -> Ballots:
        """The same, of all classes together."""
        _, new = rows_in_order(self.table, self.window)
        start = np.flatnonzero(new)
        count, evidence = self.count, (1 << self.evidence).astype(np.uint8)
        if len(start):
            count = np.add.reduceat(count, start)
            evidence = np.bitwise_or.reduceat(evidence, start)
        return Ballots(self.table[new], self.window[new], count, evidence)


@dataclass(frozen=True, slots=True, eq=False)
class Ballots:
    """How many votes (``count``) there are for a ``table`` in a ``window``, ascending by both, and
    of which classes: ``evidence``, uint8, has a bit for each of `CLASSES`.
    """

    table: I64
    window: I64
    count: I64
    evidence: U8

    def __len__(self) -> int:
        return len(self.table)

    def select(self, which: Mask) -> Ballots:
        """Some of the rows."""
        table, window, count = (column[which] for column in (self.table, self.window, self.count))
        return Ballots(table, window, count, self.evidence[which])

    def best(self) -> Ballots:
        """Of each table the window with most votes, of several such the first."""
        order = np.lexsort((self.window, -self.count, self.table))
        first = np.diff(self.table[order], prepend=NONE) != 0
        chosen = np.zeros(len(self), dtype=np.bool_)
        chosen[order[first]] = True
        return self.select(chosen)

    def undisputed(self) -> Ballots:
        """Those of tables that one window alone was voted for, where none other was."""
        return self.select(_are_alone(self.table) & _are_alone(self.window))


def _are_alone(numbers: I64) -> Mask:
    """Which of them there is once."""
    _, of, count = np.unique(numbers, return_inverse=True, return_counts=True)
    alone: Mask = count[of] == 1
    return alone


@cache
def classes_of(evidence: int) -> tuple[Evidence, ...]:
    """The classes that have a bit, as in `Ballots`."""
    return tuple(each for number, each in enumerate(CLASSES) if evidence >> number & 1)


def tally(votes: Iterable[Votes]) -> Tally:
    """All of them, counted."""
    return Tally.none().joined(
        *(Tally.of(each.evidence, each.table, each.window) for each in votes)
    )
