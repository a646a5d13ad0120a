"""A progress bar on stderr."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from planner.progress import Progress, tell_nobody

_ENDING = (signal.SIGHUP, signal.SIGTERM)


class _Ended(BaseException):
    """A signal that ends the process."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def progress_bar(*, shown: bool) -> Iterator[Progress]:
    """What is told here is shown, unless nothing is to be *shown*.

    While it is shown the terminal has no cursor: a signal that ends the process gives it back.
    """
    if not shown:
        yield tell_nobody
        return
    # Not at the top: it takes longer to load than a small image takes to check.
    from rich import progress as bars  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415

    # What is printed meanwhile goes where it is meant to, not to the bar's stream.
    bar = bars.Progress(console=Console(stderr=True), redirect_stdout=False, redirect_stderr=False)
    with _ended_in_order(), bar:
        tasks = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage)
            bar.update(tasks[stage], completed=done, total=total)

        yield tell


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Have what is within end first where a signal ends the process; ends it by the same signal.

    Signals that are ignored, or asked for by others, stay theirs.
    """
    ours = [number for number in _ENDING if signal.getsignal(number) is signal.SIG_DFL]

    def end(number: int, _frame: FrameType | None) -> None:
        for each in ours:  # once is enough
            signal.signal(each, signal.SIG_IGN)
        raise _Ended(number)

    for number in ours:
        signal.signal(number, end)
    try:
        yield
    except _Ended as ended:
        signal.signal(ended.number, signal.SIG_DFL)
        signal.raise_signal(ended.number)
        raise
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
