"""`instarfs undo`: take the last repair of an image back."""

from __future__ import annotations

import click

from instarfs.cli import repairing
from instarfs.render.repair import outcome_human
from instarfs.repairer import Repairer


@click.command(name="undo")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing; the exit code tells.")
@click.option("-p", "--progress", is_flag=True, help="Show progress on stderr.")
@click.argument("path", metavar="IMAGE", type=click.Path(readable=False))
def command(path: str, *, quiet: bool, progress: bool) -> None:
    """Take the last repair of the qcow2 image IMAGE back, byte for byte.

    Refused when the image was written to since. What a repair was interrupted in is taken back too.
    """
    outcome = repairing.run(path, Repairer.undo, progress=progress)
    repairing.raise_error(outcome, path)
    if not quiet:
        click.echo(outcome_human(outcome, path), nl=False)
