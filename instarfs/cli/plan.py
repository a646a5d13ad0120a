"""`instarfs plan`: the dry run of a repair."""

from __future__ import annotations

import click

from instarfs.cli.grammar import ImageName
from instarfs.cli.options import progress_option, share_option, undo_file_option
from instarfs.cli.progress import progress_bar
from instarfs.render.repair import plan_human, plan_json, refusal_json
from instarfs.repair.planning import run_plan
from instarfs.repair.words import TIERS
from planner.errors import RepairError
from planner.repair.plan import RepairTier


@click.command(name="plan")
@click.option(
    "--output",
    type=click.Choice(["human", "json"]),
    default="human",
    help="Text for a reader (the default), or JSON with every change.",
)
@progress_option
@share_option
@undo_file_option
@click.argument("tier", type=click.Choice(TIERS))
@click.argument("path", metavar="IMAGE", type=click.Path(readable=False))
def command(
    output: str,
    undo_file: str | None,
    tier: str,
    path: str,
    *,
    progress: bool,
    force_share: bool,
) -> None:
    """Show what a repair of some tier would do to IMAGE. Nothing is written.

    `leaks` frees what nothing refers to, `all` mends what the rest of the image determines. What it
    does not determine a person may choose, and quotes the id that is shown here: `split` gives each
    owner of a cluster that has two one of its own, `bitmaps` drops persistent bitmaps that stop
    QEMU or a backup, `snapshots` drops entries of the snapshot table that are none.

    The plan is proven: laid over the image in memory, it was checked like an image. Its id can be
    quoted to `instarfs check -r`, which then does exactly this or nothing. Nothing is planned
    while somebody writes to the image.
    """
    name = ImageName(path, force_share=force_share, undo_file=undo_file)
    with name.opened() as image, progress_bar(shown=progress) as tell:
        try:
            proposal = run_plan(image, RepairTier(tier), path=path, progress=tell)
        except RepairError as error:
            if output == "json":
                click.echo(refusal_json(error, RepairTier(tier), path), nl=False)
            raise name.failed(error) from error
    if output == "json":
        for part in plan_json(proposal, path):
            click.echo(part, nl=False)
    else:
        click.echo(plan_human(proposal, path), nl=False)
