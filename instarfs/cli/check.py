"""`instarfs check`: the grammar, output and exit codes of `qemu-img check`."""

from __future__ import annotations

import sys
from dataclasses import replace

import click

from instarfs import locks
from instarfs.cli.progress import progress_bar
from instarfs.errors import ImageNotQcow2, ImageUnreadable
from instarfs.image import Image
from instarfs.render.check import check_human, check_messages, result_json
from planner.check import check_image
from planner.errors import NotQcow2


@click.command(name="check")
@click.option(
    "--output",
    type=click.Choice(["human", "json"]),
    default="human",
    help="Text for a reader (the default), or the JSON of qemu-img check.",
)
@click.option("-r", "tier", type=click.Choice(["leaks", "all"]), hidden=True)
@click.option("-q", "--quiet", is_flag=True, help="Say nothing; the exit code tells.")
@click.option("-p", "--progress", is_flag=True, help="Show progress on stderr.")
@click.option(
    "-U", "--force-share", is_flag=True, help="Also while another process has the image open."
)
@click.argument("path", metavar="IMAGE", type=click.Path())
def command(
    output: str, tier: str | None, path: str, *, quiet: bool, progress: bool, force_share: bool
) -> None:
    """Check all metadata of the qcow2 image IMAGE. Nothing is written, no other file is opened.

    Exit codes: 0 clean, 1 the check could not be completed, 2 corruptions, 3 only leaks, 63 not
    qcow2.
    """
    if tier is not None:
        raise click.UsageError(f"-r {tier}: this version only checks; it does not repair yet")
    access = locks.FORCE_SHARE if force_share else locks.READ_ONLY
    with Image.open(path) as image, locks.held(image.fileno(), path, access):
        in_use = locks.is_written(image.fileno())
        before = image.generation()
        with progress_bar(shown=progress) as tell:
            report = check_image(image.source(), progress=tell)
        report = replace(report, in_use=in_use, changed=image.generation() != before)
    if not quiet and output == "json":
        click.echo(result_json(report, path), nl=False)
    if report.error is not None:
        kind = ImageNotQcow2 if isinstance(report.error, NotQcow2) else ImageUnreadable
        raise kind(path, str(report.error))
    if not quiet and output == "human":
        for message in check_messages(report):
            click.echo(message, err=True)
        click.echo(check_human(report), nl=False)
    if report.torn:
        raise click.ClickException(f"{path}: it was written to during the check: check again")
    sys.exit(report.exit_code)
