"""How much work looking at a guest's disk may take, reckoned before it is done.

The tables of an image may lead to one place again and again, so that a disk of exabytes is full of
file systems that make sense, and nothing of it is more than a few clusters. So what is asked of a
disk is paid for, in microseconds that it takes a processor at most, out of as much as there really
is of the image. That is reckoned and not measured: the answer does not depend on who else is busy.
"""

from __future__ import annotations

from planner.errors import PlannerError

FOR_ANY = 400_000.0
FOR_A_BYTE = 0.02
"""Of what is stored; of a sound disk no more than that, and far less, says where its files are."""

A_READ, A_BYTE = 25.0, 0.01
"""What is read is looked at, too."""

A_QUESTION, A_BATCH, AN_EXTENT, AN_ENTRY = 15.0, 150.0, 0.5, 0.02
A_VOLUME, A_PIECE = 2000.0, 0.3
"""Of where data is; of one more volume that the same ranges are laid over."""

A_LETTER = 0.5
"""Of a text that is read word by word."""


class WorkSpent(PlannerError):
    """As much was done as there was to be."""

    def __str__(self) -> str:
        return (
            "looking for the rest would take more than there is of the image: its tables lead to"
            " the same places again and again"
        )


class Work:
    """What is left of it. ``stored``: bytes of the image that are there; None: no end of it.
    ``for_any``: what there is to do even where nearly nothing is stored.
    """

    def __init__(self, stored: int | None = None, for_any: float = FOR_ANY) -> None:
        self._left = float("inf") if stored is None else for_any + FOR_A_BYTE * stored

    def take(self, amount: float) -> None:
        """Do so much. Raises `WorkSpent` where that is more than is left, now and ever after."""
        self._left -= amount
        if self._left < 0:
            raise WorkSpent

    def read(self, length: int) -> None:
        self.take(A_READ + A_BYTE * length)

    def ask(self) -> None:
        self.take(A_QUESTION)

    def extents(self, rows: int) -> None:
        self.take(A_BATCH + AN_EXTENT * rows)

    def entries(self, count: int) -> None:
        """Of L2 tables, however few extents they make together."""
        self.take(AN_ENTRY * count)

    def volume(self, pieces: int) -> None:
        self.take(A_VOLUME + A_PIECE * pieces)

    def text(self, letters: int) -> None:
        self.take(A_LETTER * letters)
