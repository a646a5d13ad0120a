"""Signals that ask a command to stop, for commands that must first put something back."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import click

_ASKING = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGXCPU)

PROCESS = "process"
"""The object of a command's context where the command is all that this process is for."""


def is_a_process(context: click.Context) -> bool:
    """Whether the process ends with the command of this context."""
    return bool(context.find_root().obj == PROCESS)


@contextmanager
def stoppable(*, last: bool = False) -> Iterator[Callable[[], bool]]:
    """Whether somebody has asked to stop; the signals that do so end nothing by themselves.

    One that the caller had chosen to ignore, as `nohup` does, stays ignored. *last*: nothing is
    left to do after this but to say what was done, and to end: then nothing asks for it any more.
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
            signal.signal(number, signal.SIG_IGN if last else handler)
