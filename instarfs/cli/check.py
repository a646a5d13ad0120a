"""`instarfs check`: the grammar, output and exit codes of `qemu-img check`."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from instarfs import locks
from instarfs.cli.naming import named
from instarfs.cli.progress import progress_bar
from instarfs.image import Image
from instarfs.interrupted import pending
from instarfs.memory import limited
from instarfs.render.check import check_human, check_messages, result_json
from planner.check import check_image
from planner.report import Report

if TYPE_CHECKING:
    from instarfs.outcome import Pending, RepairOutcome

# What only a repair needs is loaded where one is asked for: a check of a small image takes less
# time than loading it.


@click.command(name="check")
@click.option(
    "--output",
    type=click.Choice(["human", "json"]),
    default="human",
    help="Text for a reader (the default), or the JSON of qemu-img check.",
)
@click.option(
    "-r",
    "tier",
    type=click.Choice(["leaks", "all"]),
    help="Repair leaked clusters only, or all that the image determines; see: instarfs plan.",
)
@click.option(
    "--plan", "quote", metavar="ID", help="With -r: carry out the plan of this id, or nothing."
)
@click.option("--no-undo", is_flag=True, help="With -r: keep no undo file beside the image.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing; the exit code tells.")
@click.option("-p", "--progress", is_flag=True, help="Show progress on stderr.")
@click.option(
    "-U", "--force-share", is_flag=True, help="Also while another process has the image open."
)
@click.argument("path", metavar="IMAGE", type=click.Path(readable=False))
def command(
    output: str,
    tier: str | None,
    quote: str | None,
    path: str,
    *,
    no_undo: bool,
    quiet: bool,
    progress: bool,
    force_share: bool,
) -> None:
    """Check all metadata of the qcow2 image IMAGE, and repair it with -r. No other file is opened.

    Without -r nothing is written. A repair is proven before it is written, is taken back by
    `instarfs undo`, and what it leaves is named. Exit codes, after a repair of what is then: 0
    clean, 1 not completed or refused, 2 corruptions, 3 only leaks or not closed properly, 63 not
    qcow2.
    """
    shown = "" if quiet else output
    if tier is not None:
        if force_share:
            raise click.UsageError("-U is for a check alone: a repair shares the image with nobody")
        outcome = _repair(path, tier, quote or "", keep_undo=not no_undo, progress=progress)
        sys.exit(_conclude_repair(outcome, path, shown))
    if quote is not None or no_undo:
        raise click.UsageError("--plan and --no-undo are for a repair: add -r")
    report, left_over = _check(path, force_share=force_share, progress=progress)
    sys.exit(_conclude_check(report, left_over, path, shown))


def _check(path: str, *, force_share: bool, progress: bool) -> tuple[Report, Pending | None]:
    """The report, and the repair that was interrupted, if there is one."""
    access = locks.FORCE_SHARE if force_share else locks.READ_ONLY
    with Image.open(path) as image, limited(image), locks.held(image.fileno(), path, access):
        in_use = locks.is_written(image.fileno())
        before = image.generation()
        with progress_bar(shown=progress) as tell:
            report = check_image(image.source(), progress=tell)
        changed = image.generation() != before
        return replace(report, in_use=in_use, changed=changed), pending(image)


def _repair(path: str, tier: str, quote: str, *, keep_undo: bool, progress: bool) -> RepairOutcome:
    from instarfs.cli import repairing  # noqa: PLC0415
    from planner.plan import RepairTier  # noqa: PLC0415

    return repairing.run(
        path,
        lambda repairer: repairer.repair(RepairTier(tier), quote),
        keep_undo=keep_undo,
        progress=progress,
    )


def _conclude_check(report: Report, left_over: Pending | None, path: str, shown: str) -> int:
    if shown == "json":
        click.echo(result_json(report, path, pending=left_over), nl=False)
    if report.error is not None:
        raise named(report.error, path)
    if shown == "human":
        if left_over is not None:
            click.echo(f"NOTE {left_over.sentence}", err=True)
        _show_check(report)
    if report.torn:
        what = "it is in use" if report.in_use else "it was written to during the check"
        raise click.ClickException(f"{path}: {what}: check again")
    return report.exit_code


def _conclude_repair(outcome: RepairOutcome, path: str, shown: str) -> int:
    from instarfs.cli import repairing  # noqa: PLC0415
    from instarfs.render.repair import fixed_human, outcome_human  # noqa: PLC0415

    after = outcome.after
    error = repairing.error_of(outcome, path)
    code = after.exit_code if after is not None else 1
    if shown == "json" and after is not None:
        ends_with = code if error is None else error.exit_code
        click.echo(result_json(after, path, outcome, exit_code=ends_with), nl=False)
    if error is not None:
        raise error
    if shown == "human" and after is not None:
        click.echo(fixed_human(outcome), nl=False)
        _show_check(after)
        click.echo("\n" + outcome_human(outcome, path), nl=False)
    return code


def _show_check(report: Report) -> None:
    for message in check_messages(report):
        click.echo(message, err=True)
    click.echo(check_human(report), nl=False)
