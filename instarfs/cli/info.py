"""`instarfs info`: what an image says of itself, in the words of `qemu-img info`."""

from __future__ import annotations

import click

from instarfs import locks
from instarfs.image import Image
from instarfs.memory import limited
from instarfs.render.info import ImageFacts, info_human, info_json
from planner.errors import ImageError
from planner.qcow2.contents import Contents


@click.command(name="info")
@click.option(
    "--output",
    type=click.Choice(["human", "json"]),
    default="human",
    help="Text for a reader (the default), or the JSON of qemu-img info.",
)
@click.option(
    "-U", "--force-share", is_flag=True, help="Also while another process has the image open."
)
@click.argument("path", metavar="IMAGE", type=click.Path(readable=False))
def command(output: str, path: str, *, force_share: bool) -> None:
    """Show what the qcow2 image IMAGE says of itself: sizes, features, snapshots, bitmaps.

    Backing and data files are named, not opened. Where a part of the image cannot be read, the
    rest is shown, and the exit code is 1.
    """
    access = locks.FORCE_SHARE if force_share else locks.READ_ONLY
    with Image.open(path) as image, limited(image), locks.held(image.fileno(), path, access):
        source = image.source()
        try:
            contents = Contents.read(source)
        except ImageError as error:
            raise click.ClickException(f"{path}: {error}") from error
        facts = ImageFacts(path, source.size, image.allocated_size())
    render = info_json if output == "json" else info_human
    for part in render(contents, facts):
        click.echo(part, nl=False)
    if contents.errors:
        raise click.ClickException(f"{path}: {contents.errors[0][1]}")
