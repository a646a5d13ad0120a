"""A file system where it lies on the disk: what of it is where, for those who weigh claims."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from planner.arrays import I64
from planner.guestfs.protocol import FileSystem
from planner.guestfs.reading import Holes
from planner.guestfs.volumes.space import Segment
from planner.rescue.placing.board import Board
from planner.rescue.placing.claims import Claims
from planner.rescue.placing.votes import Evidence, Votes, fitting


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A ``filesystem`` in a volume of the disk: ``segments``, ``source``, and the ``board``."""

    filesystem: FileSystem
    segments: tuple[Segment, ...]
    source: Holes
    board: Board

    @property
    def coverage(self) -> int:
        return self.board.coverage

    def to_disk(self, offset: I64) -> I64:
        """Where on the disk bytes of the volume are; -1 for those that are not there."""
        result = np.full(len(offset), -1, dtype=np.int64)
        for each in self.segments:
            # Of stripes nothing is said.
            if len(each.legs) == 1 and each.legs[0] >= 0:
                inside = (offset >= each.start) & (offset < each.start + each.length)
                result[inside] = offset[inside] - each.start + each.legs[0]
        return result

    def votes(self, evidence: Evidence, claims: Claims, row: I64, offset: I64) -> Votes:
        """Votes of the *row*s of claims that are to lie at *offset* of the volume, -1 nowhere."""
        return self.votes_at(evidence, claims, row, self.to_disk(offset))

    def votes_at(self, evidence: Evidence, claims: Claims, row: I64, disk: I64) -> Votes:
        """The same, by the place on the *disk*."""
        return fitting(evidence, claims.table[row], claims.inside[row], disk, self.coverage)


def pairs(wanted: I64, ascending: I64) -> tuple[I64, I64]:
    """Each of *wanted* with each of the equal ones in *ascending*: positions in both."""
    low = np.searchsorted(ascending, wanted)
    count = np.searchsorted(ascending, wanted, side="right") - low
    row = np.repeat(np.arange(len(wanted)), count)
    step = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    return row, low[row] + step


Weigher = Callable[[Site, Claims], Iterator[Votes]]
"""What the claims say of where tables belong, as far as a file system can be read."""
