"""`instarfs map`: where the guest's bytes are, in the words of `qemu-img map`."""

from __future__ import annotations

import os

import click

from instarfs import locks
from instarfs.guest.follow import Follow
from instarfs.guest.guest import Guest
from instarfs.image import Image
from instarfs.memory import limited
from instarfs.render.guest_map import MapIncomplete, map_human, map_json
from planner.errors import ImageError


@click.command(name="map")
@click.option(
    "--output",
    type=click.Choice(["human", "json"]),
    default="human",
    help="Text for a reader (the default), or the JSON of qemu-img map.",
)
@click.option(
    "-U", "--force-share", is_flag=True, help="Also while another process has the image open."
)
@click.option(
    "--follow",
    "directories",
    multiple=True,
    metavar="DIR",
    help="Open backing and data files that the image names, where they are below DIR.",
)
@click.argument("path", metavar="IMAGE", type=click.Path(readable=False))
def command(output: str, path: str, directories: tuple[str, ...], *, force_share: bool) -> None:
    """Show from which file, and from where in it, each part of IMAGE's disk is read.

    Without --follow no other file is opened: what the image does not hold itself is shown as
    unknown. Parts that cannot be read are shown as damaged. The text lists data only; for
    everything else see --output json.
    """
    access = locks.FORCE_SHARE if force_share else locks.READ_ONLY
    follow = Follow(directories)
    with Image.open(path) as image, limited(image), locks.held(image.fileno(), path, access):
        try:
            guest = Guest(image, follow)
        except ImageError as error:
            raise click.ClickException(f"{path}: {error}") from error
        if output == "json":
            parts = map_json(guest.extents(), guest.members)
        else:
            parts = map_human(guest.extents(), [os.fsdecode(n) for n in guest.data_files(path)])
        try:
            for part in parts:
                click.echo(part, nl=False)
        except MapIncomplete as error:
            raise click.ClickException(f"{path}: {error}") from error
