"""`instarfs plan`: the dry run of a repair."""

from __future__ import annotations

import click

from instarfs.cli.naming import named
from instarfs.cli.progress import progress_bar
from instarfs.errors import RepairInterrupted
from instarfs.image import locks
from instarfs.image.file import Image
from instarfs.image.memory import limited
from instarfs.render.repair import plan_human, plan_json, refusal_json
from instarfs.repair.interrupted import pending
from planner.check.check import check_image
from planner.errors import RepairError
from planner.repair.plan import RepairTier
from planner.repair.tiers import propose


@click.command(name="plan")
@click.option(
    "--output",
    type=click.Choice(["human", "json"]),
    default="human",
    help="Text for a reader (the default), or JSON with every change.",
)
@click.option("-p", "--progress", is_flag=True, help="Show progress on stderr.")
@click.argument("tier", type=click.Choice([tier.value for tier in RepairTier]))
@click.argument("path", metavar="IMAGE", type=click.Path(readable=False))
def command(output: str, tier: str, path: str, *, progress: bool) -> None:
    """Show what a repair of the tier `leaks` or `all` would do to IMAGE. Nothing is written.

    The plan is proven: laid over the image in memory, it was checked like an image. Its id can be
    quoted to `instarfs check -r`, which then does exactly this or nothing.
    """
    with Image.open(path) as image, limited(image), locks.held(image.fileno(), path):
        if pending(image) is not None:
            raise RepairInterrupted(path)
        source = image.source()
        with progress_bar(shown=progress) as tell:
            report = check_image(source, progress=tell)
            try:
                proposal = propose(
                    source,
                    report,
                    RepairTier(tier),
                    can_grow=not image.is_device,
                    progress=tell,
                )
            except RepairError as error:
                if output == "json":
                    click.echo(refusal_json(error, RepairTier(tier), path), nl=False)
                raise named(error, path) from error
    if output == "json":
        for part in plan_json(proposal, path):
            click.echo(part, nl=False)
    else:
        click.echo(plan_human(proposal, path), nl=False)
