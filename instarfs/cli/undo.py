"""`instarfs undo`: take the last repair of an image back."""

from __future__ import annotations

import click

from instarfs.cli import repairing
from instarfs.cli.options import progress_option, quiet_option, undo_file_option
from instarfs.image.directory import lasting_name
from instarfs.render.repair import outcome_human
from instarfs.repair.run import Repairer


@click.command(name="undo")
@quiet_option
@progress_option
@undo_file_option
@click.argument("path", metavar="IMAGE", type=click.Path(readable=False))
def command(path: str, undo_file: str | None, *, quiet: bool, progress: bool) -> None:
    """Take the last repair of the qcow2 image IMAGE back: every byte that it changed.

    Repairs are a stack: do it again for the one before, down to the first. Refused where the image
    was written to since, as far as its tables show. What a repair was interrupted in is taken back
    too.
    """
    outcome = repairing.run(path, Repairer.undo, undo_file=undo_file, progress=progress)
    repairing.raise_error(outcome, path)
    if not quiet:
        click.echo(outcome_human(outcome, lasting_name(path), undo_file), nl=False)
