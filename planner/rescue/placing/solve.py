"""Putting tables into windows: evidence is gathered, what it decides is placed, and again.

What becomes readable by one placement (directories, trees of extents, bitmaps, the runs of an MFT)
is what the next is placed by, until nothing moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from planner.arrays import is_among, is_any_of
from planner.guestfs.reading import Holes
from planner.guestfs.volumes.find import find_volumes
from planner.guestfs.volumes.partitions import read_table
from planner.guestfs.work import WorkSpent
from planner.rescue.placing import anchors, content, ext, fat, ntfs, pattern, xfs
from planner.rescue.placing.board import Board
from planner.rescue.placing.claims import Claims
from planner.rescue.placing.sites import Site, Weigher
from planner.rescue.placing.tables import NO_WINDOW
from planner.rescue.placing.votes import Evidence, Tally, Votes, tally

MAX_ROUNDS = 64

SPOTTERS = (anchors.spot, ext.spot, xfs.spot, ntfs.spot, fat.spot, content.spot)
MARKS = (anchors.MARK, ext.MARK)
"""What is looked at again wherever it stands: what it says depends on the size of clusters."""

STRONG: tuple[Weigher, ...] = (ext.weigh, xfs.weigh, ntfs.weigh, fat.weigh, content.weigh)
WEAK: tuple[Weigher, ...] = (pattern.weigh,)
"""Asked only where the others have nothing more to say."""


@dataclass(slots=True)
class Solver:
    """One search. ``tallied``: of each table, what was voted when it was last asked about.

    ``note``: why it ended before all was asked; empty: it did not.
    """

    board: Board
    claims: Claims
    tallied: Tally = field(default_factory=Tally.none)
    note: str = ""

    def solve(self) -> None:
        """Place what can be placed; by no round of which the votes against were not all heard."""
        self.tallied = Tally.of(Evidence.SNAPSHOT, *self.board.tables.hints)
        self._place(self.tallied)
        try:
            for _ in range(MAX_ROUNDS):
                if not len(self.board.waiting) or not (self._round(STRONG) or self._round(WEAK)):
                    break
        except WorkSpent as spent:
            self.note = str(spent)
        self._place_late()

    def _place_late(self) -> None:
        """What the disk has in common with a snapshot, if no table is left that may belong there.

        Since the snapshot was made the disk has a table wherever that has one.
        """
        if len(self.board.waiting):
            return
        table, window = self.board.tables.late
        vacant = self.board.are_vacant(window)
        table, window = table[vacant], window[vacant]
        self.tallied = self.tallied.joined(Tally.of(Evidence.SNAPSHOT, table, window))
        self.board.place(table, window)

    def _round(self, weighers: tuple[Weigher, ...]) -> bool:
        found = tally(self._votes(weighers))
        if weighers is WEAK:
            # What was voted otherwise is against it.
            known = self.tallied.select(is_among(self.tallied.table, found.table))
            found = found.besides(known).joined(known)
        asked = found.select(self.board.window[found.table] == NO_WINDOW)
        kept = ~is_any_of(self.tallied.table, asked.table)
        self.tallied = self.tallied.select(kept).joined(asked)
        return self._place(found)

    def _votes(self, weighers: tuple[Weigher, ...]) -> Iterator[Votes]:
        board = self.board
        start, end = board.holes()
        disk = Holes(board, start, end, board.work)
        table = read_table(disk)
        if weighers is STRONG:
            yield from anchors.weigh_tables(board, self.claims)
            found = anchors.find_anchors(board, self.claims)
            yield from anchors.weigh_anchors(board, found, table)
        for volume in find_volumes(board, start, end, board.work).volumes:
            if volume.filesystem is None:
                continue
            site = Site(volume.filesystem, volume.space.segments, volume.source, board)
            for weigh in weighers:
                board.work.volume(len(self.claims))
                yield from weigh(site, self.claims)
        board.work.take(0)  # where volumes were left out, what they say is not heard

    def _place(self, found: Tally) -> bool:
        """Place each table that one window alone was voted for, where none other was."""
        board, ballots = self.board, found.ballots()
        waiting = ballots.select(board.window[ballots.table] == NO_WINDOW).undisputed()
        placed = waiting.select(board.are_vacant(waiting.window))
        board.place(placed.table, placed.window)
        return len(placed) > 0
