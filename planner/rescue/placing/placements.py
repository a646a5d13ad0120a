"""Where lost tables belong, by what was found: in columns, of which there may be very many."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planner.arrays import I64, U8, Mask
from planner.rescue.placing.votes import Evidence, classes_of

LISTED_CANDIDATES = 16
"""Of one table."""

ROWS_A_TIME = 1 << 12
"""That there are objects of."""


@dataclass(frozen=True, slots=True)
class Placement:
    """A lost table, and where it belongs.

    ``offset``: of the table in the file, bytes. ``l1_index``: the entry that is to lead there, of
    one that is not ``placed`` the likeliest, `NONE` where nothing speaks for any. ``evidence``:
    what says so; ``votes_for``, ``votes_against``: how often, and how often otherwise.
    ``candidates``: the entries that one which is not placed may belong to, the likeliest first,
    `LISTED_CANDIDATES` at most of ``candidate_count``.
    """

    offset: int
    l1_index: int
    evidence: tuple[Evidence, ...]
    votes_for: int
    votes_against: int
    placed: bool
    candidates: tuple[int, ...] = ()
    candidate_count: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Placements:
    """Every table that no entry leads to, a row each, ascending by ``offset``; as `Placement` has
    them.

    ``evidence``: a bit for each of `CLASSES`, uint8. ``is_likely``: whether ``l1_index`` is one of
    its candidates, and something speaks for it. ``candidates``: of all tables together, ascending,
    the first of them, one more than are listed of each.
    """

    offset: I64
    l1_index: I64
    evidence: U8
    votes_for: I64
    votes_against: I64
    placed: Mask
    candidate_count: I64
    is_likely: Mask
    candidates: I64

    @classmethod
    def of(
        cls,
        offset: I64,
        l1_index: I64,
        evidence: U8,
        votes: tuple[I64, I64],
        placed: Mask,
    ) -> Placements:
        """Of candidates nothing is known. *votes*: for and against."""
        none = np.zeros(0, dtype=np.int64)
        count, is_likely = np.zeros_like(offset), np.zeros_like(placed)
        return cls(offset, l1_index, evidence, *votes, placed, count, is_likely, none)

    @classmethod
    def none(cls) -> Placements:
        """Of no table."""
        no, nowhere = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.bool_)
        return cls.of(no, no, no.astype(np.uint8), (no, no), nowhere)

    def __len__(self) -> int:
        return len(self.offset)

    def __iter__(self) -> Iterator[Placement]:
        first = self.candidates.tolist()
        for start in range(0, len(self), ROWS_A_TIME):
            columns = (
                self.offset,
                self.l1_index,
                self.evidence,
                self.votes_for,
                self.votes_against,
                self.placed,
                self.candidate_count,
                self.is_likely,
            )
            rows = (column[start : start + ROWS_A_TIME].tolist() for column in columns)
            for offset, index, bits, mine, others, placed, count, is_likely in zip(
                *rows, strict=True
            ):
                listed = first[:count]
                if is_likely:
                    listed = [index, *(each for each in listed if each != index)]
                candidates = tuple(listed[:LISTED_CANDIDATES])
                evidence = classes_of(bits)
                yield Placement(offset, index, evidence, mine, others, placed, candidates, count)
