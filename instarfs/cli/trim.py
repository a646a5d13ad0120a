"""`instarfs trim`: give the disk space of free clusters back."""

from __future__ import annotations

import click

from instarfs.cli import repairing
from instarfs.cli.options import progress_option, quiet_option, undo_file_option
from instarfs.image.directory import lasting_name
from instarfs.render.repair import outcome_human


@click.command(name="trim")
@quiet_option
@progress_option
@click.option("--plan", "quote", metavar="ID", help="Trim also what may be left of a lost disk.")
@undo_file_option
@click.argument("path", metavar="IMAGE", type=click.Path(readable=False))
def command(
    path: str, undo_file: str | None, quote: str | None, *, quiet: bool, progress: bool
) -> None:
    """Give the disk space of all free clusters of the qcow2 image IMAGE back.

    Refused unless a fresh check is clean. What the free clusters held is gone then, for good. Where
    they hold tables that lead to data, the refusal tells an id, which has to be quoted.
    """
    outcome = repairing.run(
        path, lambda repairer: repairer.trim(quote or ""), undo_file=undo_file, progress=progress
    )
    repairing.raise_error(outcome, path)
    if not quiet:
        click.echo(outcome_human(outcome, lasting_name(path), undo_file), nl=False)
