"""`instarfs map`: where the guest's bytes are, in the words of `qemu-img map`."""

from __future__ import annotations

import os

import click

from instarfs.cli.complaints import remark_interrupted
from instarfs.cli.grammar import image_name, image_options
from instarfs.cli.options import follow_option
from instarfs.cli.sizes import Size
from instarfs.errors import ImageUnreadable
from instarfs.guest.follow import Follow
from instarfs.guest.guest import Guest
from instarfs.guest.place import LARGEST
from instarfs.render.guest_map import MapIncomplete, map_human, map_json
from instarfs.repair.interrupted import pending
from planner.errors import ImageError


@click.command(name="map")
@image_options()
@follow_option
@click.option(
    "-s", "--start-offset", type=Size(), default=0, help="Begin at this byte of the disk."
)
@click.option("-l", "--max-length", type=Size(), help="Show so many bytes of the disk.")
@click.argument("word", metavar="IMAGE", type=click.Path(readable=False))
def command(  # noqa: PLR0917 - as on the command line
    output: str,
    image_format: str,
    word: str,
    directories: tuple[str, ...],
    start_offset: int,
    max_length: int | None,
    *,
    image_opts: bool,
    force_share: bool,
) -> None:
    """Show from which file, and from where in it, each part of IMAGE's disk is read.

    Without --follow no other file is opened: what the image does not hold itself is unknown. The
    text lists data, and, in place of where it is, parts that cannot be read as damaged, with the
    reason; like that of qemu-img it ends at the first compressed or encrypted cluster. JSON lists
    everything, with the keys `damaged` and `unknown` where that is so. The exit code is 1 where the
    text has no line for some of the data, or some is damaged or unknown.
    """
    name = image_name(word, image_format, image_opts=image_opts, force_share=force_share)
    path, follow = name.path, Follow(directories)
    with name.opened() as image:
        remark_interrupted(pending(image))
        try:
            guest = Guest(image, follow)
        except ImageError as error:
            raise ImageUnreadable(path, str(error)) from error
        end = start_offset + (LARGEST if max_length is None else max_length)
        rows = guest.extents(start_offset, end)
        if output == "json":
            parts = map_json(rows, guest.members, start_offset)
        else:
            files = [os.fsdecode(name) for name in guest.data_files(path)]
            parts = map_human(rows, files, guest.members)
        try:
            for part in parts:
                click.echo(part, nl=False)
        except (ImageError, MapIncomplete) as error:
            raise ImageUnreadable(path, str(error)) from error
