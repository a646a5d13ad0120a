"""Signals that ask a command to stop, for commands that must first put something back."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_ASKING = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGXCPU)


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Whether somebody has asked to stop; the signals that do so end nothing by themselves.

    One that the caller had chosen to ignore, as `nohup` does, stays ignored.
    """
    asked: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        asked.append(number)

    before = {number: signal.getsignal(number) for number in _ASKING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
