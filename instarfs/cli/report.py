"""`instarfs report`: what a mount shows as `check/report.txt`, without a mount."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import click

from instarfs.cli.grammar import ImageName
from instarfs.cli.options import progress_option, share_option, undo_file_option
from instarfs.cli.progress import progress_bar
from instarfs.errors import (
    DOMAIN_ERRORS,
    ImageNotQcow2,
    ImageReadFailed,
    InstarfsError,
    LeaksInMotion,
)
from instarfs.guest.files import hit_files
from instarfs.guest.follow import Follow
from instarfs.guest.guest import Guest
from instarfs.guest.place import Part, Place
from instarfs.image.file import Image
from instarfs.image.surroundings import Surroundings
from instarfs.render.aftermath import Aftermath
from instarfs.render.report import report_txt
from instarfs.repair.checking import Checked, LiveCheck, run_check
from instarfs.repair.looking import look_around
from instarfs.repair.planning import plan_checked
from instarfs.text import shell_path
from planner.check.check import check_image
from planner.errors import NotQcow2, RepairError, as_value
from planner.progress import Progress
from planner.repair.plan import RepairTier
from planner.repair.tiers import Proposal, tiers_for
from planner.triage.beside import Beside, look_beside
from planner.triage.triage import Triage, triage_leaks


@click.command(name="report")
@progress_option
@share_option
@undo_file_option
@click.option(
    "--follow",
    "directories",
    multiple=True,
    metavar="DIR",
    help="Look for backing and data files that the image names, where they are below DIR.",
)
@click.argument("path", metavar="IMAGE", type=click.Path(readable=False))
def command(
    path: str,
    directories: tuple[str, ...],
    undo_file: str | None,
    *,
    progress: bool,
    force_share: bool,
) -> None:
    """Say what is wrong with the qcow2 image IMAGE, what it means, and what to do about it.

    This is check/report.txt of a mount: it checks all metadata, looks into the leaked clusters,
    and plans the repairs. Nothing is written. The exit code is that of `instarfs check`.
    """
    follow = Follow(directories)
    name = ImageName(path, force_share=force_share, undo_file=undo_file)
    with name.opened() as image:
        with progress_bar(shown=progress) as tell:
            checked = run_check(
                image,
                partial(check_image, progress=tell),
                live=LiveCheck() if force_share else None,
            )
            if isinstance(checked.report.error, NotQcow2) and checked.pending is None:
                was = f"if it was one: instarfs rescue -- {shell_path(path)}"
                raise ImageNotQcow2(path, f"{checked.report.error}; {was}")
            known = _aftermath(checked, follow, tell)
        known = replace(known, surroundings=_around(image, undo_file))
        report = checked.report_now()
        click.echo(report_txt(report, image.path, known), nl=False)
    sys.exit(1 if report.torn and report.live is None else report.exit_code)


def _aftermath(checked: Checked, follow: Follow, tell: Progress) -> Aftermath:
    """What is known beyond the check, as a mount knows it."""
    image, report, interrupted = checked.image, checked.report, checked.pending
    triage: Triage | InstarfsError
    try:
        triage = LeaksInMotion() if report.live else triage_leaks(image.source(), report)
    except ImageReadFailed as error:  # of a leaked cluster, which the check did without
        triage = as_value(error)
    proposals: dict[RepairTier, Proposal | Exception] = {}
    for tier in tiers_for(report):
        try:
            if interrupted is not None:
                raise RepairError(interrupted.sentence)
            if isinstance(triage, InstarfsError):
                raise triage
            found = plan_checked(checked, tier, triage=triage, progress=tell)
            proposals[tier] = found.in_brief()
        except DOMAIN_ERRORS as error:
            proposals[tier] = as_value(error)
    beside, files = Beside(), None
    if report.layout is not None:
        guest = Guest(image, follow)
        beside = look_beside(image.source(), report.layout, guest.members)
        files = hit_files(guest, Place(Part.DISK), report, triage, progress=tell)
    return Aftermath(triage, proposals, interrupted, beside=beside, files=files)


def _around(image: Image, undo_file: str | None) -> Surroundings:
    """What is around it; an undo file that was named is to be named with every command."""
    around = look_around(image)
    if undo_file is None:
        return around
    with contextlib.suppress(FileNotFoundError):  # where the current folder is gone
        undo_file = str(Path(undo_file).absolute())
    return replace(around, keeps_undo=False, undo_elsewhere=undo_file)
