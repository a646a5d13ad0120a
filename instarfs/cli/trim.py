"""`instarfs trim`: give the disk space of free clusters back."""

from __future__ import annotations

import click

from instarfs.cli import repairing
from instarfs.cli.options import undo_file_option
from instarfs.render.repair import outcome_human
from instarfs.repair.run import Repairer


@click.command(name="trim")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing; the exit code tells.")
@click.option("-p", "--progress", is_flag=True, help="Show progress on stderr.")
@undo_file_option
@click.argument("path", metavar="IMAGE", type=click.Path(readable=False))
def command(path: str, undo_file: str | None, *, quiet: bool, progress: bool) -> None:
    """Give the disk space of all free clusters of the qcow2 image IMAGE back.

    Refused unless a fresh check is clean. What the free clusters held is gone then, for good.
    """
    outcome = repairing.run(path, Repairer.trim, undo_file=undo_file, progress=progress)
    repairing.raise_error(outcome, path)
    if not quiet:
        click.echo(outcome_human(outcome, path, undo_file), nl=False)
