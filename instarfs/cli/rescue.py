"""`instarfs rescue`: what an image lost, in a new file that has it again, or put back in place."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import click

from instarfs.cli import repairing
from instarfs.cli.complaints import remark_interrupted
from instarfs.cli.grammar import ImageName
from instarfs.cli.known import known, known_options
from instarfs.cli.options import progress_option, share_option, undo_file_option
from instarfs.cli.progress import progress_bar
from instarfs.cli.stopping import stoppable
from instarfs.errors import RescueStateFailed, RescueStopped
from instarfs.image.directory import lasting_name
from instarfs.image.memory import keep_freed_memory
from instarfs.render.repair import outcome_human, outcome_json
from instarfs.render.rescue import Asked, rescue_json, rescue_txt
from instarfs.repair.interrupted import pending
from instarfs.repair.outcome import Status
from instarfs.repair.rescue import write_copy
from instarfs.repair.rescue_state import RescueState
from instarfs.repair.run import FindRescue
from planner.errors import Cancelled, PlannerError
from planner.progress import unless
from planner.rescue.rescue import Rescue, rescue


@click.command(name="rescue")
@click.option("-o", "out", metavar="OUT", type=click.Path(), help="Write the rebuilt image to OUT.")
@click.option(
    "--in-place", is_flag=True, help="Write it in IMAGE itself, to be undone: instarfs undo."
)
@click.option(
    "--plan",
    "quote",
    metavar="ID",
    help="With --in-place: exactly the plan of this id, or nothing.",
)
@undo_file_option
@known_options
@click.option(
    "--free",
    is_flag=True,
    help="Look for lost tables in free clusters too: where refcounts were made anew.",
)
@click.option(
    "--state",
    "state_file",
    metavar="FILE",
    type=click.Path(readable=False),
    help="Keep how far the scan is in FILE: stopped, by whatever, the same command goes on.",
)
@click.option(
    "--output",
    type=click.Choice(["human", "json"]),
    default="human",
    help="Text for a reader (the default), or JSON.",
)
@progress_option
@share_option
@click.argument("path", metavar="IMAGE", type=click.Path(readable=False))
def command(
    path: str,
    output: str,
    assumed: tuple[str, ...],
    *,
    out: str | None,
    quote: str | None,
    undo_file: str | None,
    like: str | None,
    free: bool,
    state_file: str | None,
    in_place: bool,
    progress: bool,
    force_share: bool,
) -> None:
    """Bring back what the metadata of the qcow2 image IMAGE has lost.

    A header that is gone, or makes no sense, is found: every hypothesis is laid over the image in
    memory and checked; one is believed if what it says agrees with the rest of the file and nothing
    else does. L2 tables that nothing leads to are put where what they map says that it lies: blocks
    of the guest's file systems. Snapshots that their table lost are listed again. IMAGE is not
    written to: -o writes a new file, shared with IMAGE or sparse where the disk can do that;
    --in-place writes exactly the plan whose id is quoted, which can be undone.
    """
    _require_one_way(out, quote, state_file, in_place=in_place, force_share=force_share)
    knows = known(like, assumed)
    find = partial(rescue, assumed=knows.fields, like=knows.header, free=free)
    name = ImageName(path, force_share=force_share, undo_file=undo_file)
    state = None if state_file is None else _state_of(name, state_file)
    if state is not None:
        find = partial(find, scanned=state.scanned)
    if in_place:
        _rescue_in_place(path, quote or "", find, undo_file, output, progress=progress)
        return
    with name.opened() as image, kept(state, path) as stopped, progress_bar(shown=progress) as bar:
        tell = unless(stopped, bar)
        left_over = pending(image)
        remark_interrupted(left_over)
        try:
            before = image.generation()
            keep_freed_memory()
            found = find(image.source(), can_grow=not image.is_device, progress=tell)
        except Cancelled:
            raise
        except PlannerError as error:
            raise name.failed(error) from error
        if out is not None and not found.plan.changes_nothing:
            write_copy(image, before, found.plan, out, tell)
        is_written = image.generation() != before
        unsaved = None if state is None else _unsaved(state)
    asked = Asked(
        path,
        knows,
        undo_file,
        is_written=is_written,
        free=free,
        state=state_file,
        pending=left_over,
    )
    if output == "json":
        for part in rescue_json(found, asked, out):
            click.echo(part, nl=False)
    else:
        click.echo(rescue_txt(found, asked, out), nl=False)
    if unsaved is not None:  # what was asked for beside that is done, and was told
        raise unsaved
    if _falls_short(found, is_wanted=out is not None):
        sys.exit(1)


def _falls_short(found: Rescue, *, is_wanted: bool) -> bool:
    """Whether nothing comes back though tables are lost, or though a file is wanted with what is
    wrong put right.
    """
    is_damaged = found.before.verdict != "clean"
    return found.plan.changes_nothing and (len(found.placements) > 0 or (is_wanted and is_damaged))


def _state_of(name: ImageName, path: str) -> RescueState:
    with name.opened() as image:
        return RescueState.open(path, image.generation())


@contextmanager
def kept(state: RescueState | None, path: str) -> Iterator[Callable[[], bool]]:
    """Whether somebody asked to stop; the *state*, if there is one, is saved if it ends early."""
    if state is None:
        yield lambda: False
        return
    with stoppable() as stopped:
        try:
            yield stopped
        except BaseException as error:
            state.save()
            if isinstance(error, Cancelled):
                raise RescueStopped(path, state.path) from error
            raise


def _unsaved(state: RescueState) -> RescueStateFailed | None:
    """Save it; or why that cannot be done."""
    try:
        state.save()
    except RescueStateFailed as error:
        return error
    return None


def _require_one_way(
    out: str | None, quote: str | None, state: str | None, *, in_place: bool, force_share: bool
) -> None:
    if in_place and out is not None:
        raise click.UsageError("-o writes a new file, --in-place the image itself: one of them")
    if out is not None and state is not None and Path(out).resolve() == Path(state).resolve():
        raise click.UsageError("-o and --state are two files: one of them elsewhere")
    if quote is not None and not in_place:
        raise click.UsageError("--plan is for --in-place: nothing else writes to the image")
    if in_place and force_share:
        raise click.UsageError("-U is for a look alone: a rescue shares the image with nobody")


def _rescue_in_place(
    path: str, quote: str, find: FindRescue, undo_file: str | None, output: str, *, progress: bool
) -> None:
    outcome = repairing.run(
        path,
        lambda repairer: repairer.rescue(quote, find),
        undo_file=undo_file,
        progress=progress,
    )
    if output == "json":
        click.echo(outcome_json(outcome, path, None), nl=False)
    repairing.raise_error(outcome, path)
    if output == "human":
        click.echo(outcome_human(outcome, lasting_name(path), undo_file), nl=False)
    if outcome.status is Status.NOTHING_TO_DO and outcome.left_count:
        sys.exit(1)
