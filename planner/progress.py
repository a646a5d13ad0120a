"""How far long work has come, told to whoever waits for it, who may end it: one way for all of it.

Whatever takes long takes a `Progress`, which it calls often, in the thread that it was called in:
with the stage that it is at, how much of that is done, and how much there is. To end the work,
raise `Cancelled` there: it comes out of the work as it is, or as what the work says in its place.
Any other exception ends it too. Where something was begun by then that must not stay, the work has
put it back first.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.errors import Cancelled

Progress = Callable[[str, int, int], None]
"""Is told (stage, done, total). In which unit is the work's to say; total is 0 if it is unknown."""


def tell_nobody(_stage: str, _done: int, _total: int) -> None:
    """The `Progress` of work that nobody watches, and that goes on to its end."""


def unless(is_unwanted: Callable[[], bool], progress: Progress = tell_nobody) -> Progress:
    """*progress*, but that the work ends once it *is_unwanted*."""

    def tell(stage: str, done: int, total: int) -> None:
        if is_unwanted():
            raise Cancelled
        progress(stage, done, total)

    return tell


class Meter:
    """Adds up what is done of a work that goes stage by stage, and tells it."""

    def __init__(self, progress: Progress = tell_nobody, stage: str = "", total: int = 0) -> None:
        self._progress = progress
        self._stage, self._done, self._total = stage, 0, total

    def begin(self, stage: str, total: int) -> None:
        """Go on to *stage*, of which nothing is done."""
        self._stage, self._done, self._total = stage, 0, max(1, total)
        self.advance(0)

    def advance(self, amount: int) -> None:
        """*amount* more is done; where it is 0, whoever waits is asked all the same.

        What is more than there was to do is not told.
        """
        self._done = min(self._done + amount, self._total)
        self._progress(self._stage, self._done, self._total)
