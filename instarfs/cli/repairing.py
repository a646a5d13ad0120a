"""What the commands that write to an image have in common: `check -r`, `undo` and `trim`."""

from __future__ import annotations

from collections.abc import Callable

import click

from instarfs.cli.complaints import remark
from instarfs.cli.naming import named
from instarfs.cli.progress import progress_bar
from instarfs.cli.stopping import is_a_process, stoppable
from instarfs.daemon.logs import warn_on_stderr
from instarfs.errors import InstarfsError, RepairIncomplete
from instarfs.image.opening import opened
from instarfs.render.repair import TAKEN_BACK_FIRST
from instarfs.repair.outcome import RepairOutcome
from instarfs.repair.run import Repairer
from planner.errors import PlannerError
from planner.progress import unless


def run(
    path: str,
    job: Callable[[Repairer], RepairOutcome],
    *,
    keep_undo: bool = True,
    undo_file: str | None = None,
    progress: bool = False,
) -> RepairOutcome:
    """Do *job* on the image at *path*. A signal that asks to stop rolls it back.

    One that comes when it is done changes nothing: the command ends by itself, and its exit code
    says what became of the image.
    """
    warn_on_stderr()
    context = click.get_current_context()
    asked_to_stop = context.with_resource(stoppable(last=is_a_process(context)))
    with (
        opened(path, undo_file, access=None) as image,
        progress_bar(shown=progress) as tell,
    ):
        repairer = Repairer(image, keep_undo=keep_undo, progress=unless(asked_to_stop, tell))
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
        tell_what_came_first(outcome)
        raise error


def tell_what_came_first(outcome: RepairOutcome) -> None:
    """What was done all the same, before what was asked for failed."""
    if outcome.recovered:
        remark(f"NOTE {TAKEN_BACK_FIRST}")
