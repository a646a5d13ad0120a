"""`instarfs files`: what a mount shows as `check/files.tsv`, without a mount."""

from __future__ import annotations

import sys

import click

from instarfs.cli.complaints import remark, remark_interrupted
from instarfs.cli.grammar import ImageName
from instarfs.cli.options import follow_option, progress_option, share_option, snapshot_option
from instarfs.cli.progress import progress_bar
from instarfs.errors import DOMAIN_ERRORS, ImageReadFailed, ImageTorn
from instarfs.guest.files import hit_files
from instarfs.guest.follow import Follow
from instarfs.guest.guest import Guest
from instarfs.guest.place import Part, Place
from instarfs.image.file import Image
from instarfs.render.files import files_lines, files_tsv
from instarfs.repair.checking import run_check
from planner.check.check import check_image
from planner.check.report import Report
from planner.errors import as_value
from planner.progress import Progress
from planner.triage.triage import Triage, triage_leaks


@click.command(name="files")
@snapshot_option
@follow_option
@progress_option
@click.option("-q", "--quiet", is_flag=True, help="Only the list, without a word about it.")
@share_option
@click.argument("path", metavar="IMAGE", type=click.Path(readable=False))
def command(
    path: str,
    snapshot: str | None,
    directories: tuple[str, ...],
    *,
    progress: bool,
    quiet: bool,
    force_share: bool,
) -> None:
    """List which files on the guest's disk are hit by what is wrong with the qcow2 image IMAGE.

    This is check/files.tsv of a mount: it checks all metadata, and reads the file systems on the
    disk, in partitions and LVM volumes, as far as they can be read. Nothing is written. A row is a
    piece of a file, or of what the file system keeps for itself; `free` is nobody's. The exit code
    is that of `instarfs check`.
    """
    name, follow = ImageName(path, force_share=force_share), Follow(directories)
    with name.opened() as image:
        with progress_bar(shown=progress) as tell:
            checked = run_check(image, lambda source: check_image(source, progress=tell))
            if not quiet:
                remark_interrupted(checked.pending)
            report = checked.report
            if report.error is not None:
                raise name.failed(report.error)
            try:
                guest = Guest(image, follow)
                place = _place(guest, snapshot)
            except DOMAIN_ERRORS as error:
                raise name.failed(error) from error
            triage = _triage(image, report, tell)
            found = hit_files(guest, place, report, triage, progress=tell)
        report = checked.report_now()
        for part in files_tsv(found):
            click.echo(part, nl=False)
        if not quiet:
            for line in files_lines(found, where="the list"):
                remark(line)
    if report.torn:
        raise ImageTorn(path, "it was written to, or is in use")
    sys.exit(report.exit_code)


def _triage(image: Image, report: Report, tell: Progress) -> Triage | ImageReadFailed:
    try:
        return triage_leaks(image.source(), report, progress=tell)
    except ImageReadFailed as error:  # of a leaked cluster, which the check did without
        return as_value(error)


def _place(guest: Guest, snapshot: str | None) -> Place:
    if snapshot is None:
        return Place(Part.DISK)
    return Place(Part.SNAPSHOT, guest.index_of(snapshot))
