"""What the commands that write to an image have in common: `check -r`, `undo` and `trim`."""

from __future__ import annotations

from collections.abc import Callable

from instarfs.cli.naming import named
from instarfs.cli.progress import progress_bar
from instarfs.cli.stopping import stoppable
from instarfs.errors import InstarfsError, RepairIncomplete
from instarfs.image import Image
from instarfs.memory import limited
from instarfs.outcome import RepairOutcome
from instarfs.repairer import Repairer
from planner.errors import PlannerError


def run(
    path: str,
    job: Callable[[Repairer], RepairOutcome],
    *,
    keep_undo: bool = True,
    progress: bool = False,
) -> RepairOutcome:
    """Do *job* on the image at *path*. A signal that asks to stop rolls it back."""
    with (
        Image.open(path) as image,
        limited(image),
        stoppable() as asked_to_stop,
        progress_bar(shown=progress) as tell,
    ):
        repairer = Repairer(
            image, keep_undo=keep_undo, progress=tell or _tell_nobody, cancelled=asked_to_stop
        )
        return job(repairer)


def error_of(outcome: RepairOutcome, path: str) -> InstarfsError | PlannerError | None:
    """What went wrong. That something is left is no error here: the check says so."""
    if outcome.error is None or isinstance(outcome.error, RepairIncomplete):
        return None
    return named(outcome.error, path)


def raise_error(outcome: RepairOutcome, path: str) -> None:
    """Raise what went wrong, if anything did."""
    error = error_of(outcome, path)
    if error is not None:
        raise error


def _tell_nobody(_stage: str, _done: int, _total: int) -> None:
    pass
