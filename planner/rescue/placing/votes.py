"""Votes: which window each piece of evidence would give a table, counted, and what they decide.

A vote counts only if no other place would give it: of several windows that one block fits, or
several tables that fit one window, none is believed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from planner.arrays import I64, Mask


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


@dataclass(frozen=True, slots=True)
class Tally:
    """What was voted of one table: by window and class how often."""

    table: int
    by_window: dict[int, dict[Evidence, int]]

    def count(self, window: int) -> int:
        """How many votes there are for *window*."""
        return sum(self.by_window.get(window, {}).values())

    @property
    def best(self) -> int:
        """The window with most votes."""
        return max(self.by_window, key=lambda window: (self.count(window), -window))

    @property
    def against(self) -> int:
        """Votes for others than that."""
        return sum(map(self.count, self.by_window)) - self.count(self.best)


def tally(votes: Iterable[Votes]) -> dict[int, Tally]:
    """By table."""
    found: dict[int, Tally] = {}
    for each in votes:
        if not len(each):
            continue
        pairs, count = np.unique(np.stack((each.table, each.window)), axis=1, return_counts=True)
        for table, window, number in zip(*pairs.tolist(), count.tolist(), strict=True):
            mine = found.setdefault(table, Tally(table, {})).by_window.setdefault(window, {})
            mine[each.evidence] = mine.get(each.evidence, 0) + number
    return found
