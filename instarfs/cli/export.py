"""`instarfs export`: the guest's disk as a raw file, and a list of what cannot be read of it."""

from __future__ import annotations

import click

from instarfs.cli.complaints import remark_interrupted
from instarfs.cli.grammar import ImageName
from instarfs.cli.known import known, known_options, require_rescue
from instarfs.cli.options import (
    follow_option,
    progress_option,
    quiet_option,
    share_option,
    snapshot_option,
)
from instarfs.cli.progress import progress_bar
from instarfs.cli.stopping import stoppable
from instarfs.errors import DOMAIN_ERRORS, ExportIncomplete
from instarfs.guest.export import Export, Outcome
from instarfs.guest.follow import Follow
from instarfs.guest.outfile import OutFile
from instarfs.repair.interrupted import pending
from instarfs.repair.words import PREVIEWS
from instarfs.text import printable
from planner.progress import unless


@click.command(name="export")
@snapshot_option
@click.option(
    "--preview",
    type=click.Choice(PREVIEWS),
    help="The disk as it would be after this repair, or a rescue; nothing else is written.",
)
@follow_option
@progress_option
@quiet_option
@known_options
@share_option
@click.argument("path", metavar="IMAGE", type=click.Path(readable=False))
@click.argument("out", metavar="OUT", type=click.Path(readable=False))
def command(
    path: str,
    out: str,
    snapshot: str | None,
    preview: str | None,
    directories: tuple[str, ...],
    *,
    like: str | None,
    assumed: tuple[str, ...],
    progress: bool,
    quiet: bool,
    force_share: bool,
) -> None:
    """Copy the disk of the qcow2 image IMAGE into the new, sparse file OUT.

    What cannot be read is a hole in OUT, and listed in OUT.map, in the format of GNU ddrescue; the
    exit code is 1 then, and 0 where all was read. So is what a table maps that was overwritten with
    something else, whatever QEMU reads there. The image is not changed. Where it was stopped,
    by whatever, the same command goes on, and tries again what could not be read.
    """
    knows = known(like, assumed)
    require_rescue(knows, preview)
    name, follow = ImageName(path, force_share=force_share), Follow(directories)
    with name.opened() as image, stoppable() as stopped, progress_bar(shown=progress) as tell:
        try:
            shown = image
            if preview is not None:
                from instarfs.repair.preview import preview_of  # noqa: PLC0415 - all of repairs

                shown = preview_of(image, preview, unless(stopped, tell), knows=knows).image
            elif not quiet:
                remark_interrupted(pending(image))
            export = Export(shown, follow, snapshot)
        except DOMAIN_ERRORS as error:
            raise name.failed(error) from error
        target = OutFile.open(out, export.origin())
        try:
            outcome = export.run(target, unless(stopped, tell))
        finally:
            target.close()
    _conclude(outcome, target, quiet=quiet)


def _conclude(outcome: Outcome, target: OutFile, *, quiet: bool) -> None:
    if outcome.unread:
        hint = ""
        if outcome.elsewhere:
            which = "all" if outcome.elsewhere == outcome.unread else outcome.elsewhere
            hint = f", {which} of them in files that are not read ({outcome.refusal})"
        raise ExportIncomplete(target.path, outcome.unread, outcome.size, hint, target.map_path)
    if not quiet:
        click.echo(printable(f"{target.path}: all {outcome.size} bytes of the disk were read"))
