"""`instarfs umount`."""

from __future__ import annotations

import click

from instarfs.mount.mountpoint import unmount


@click.command(name="umount")
@click.argument("directory", metavar="DIR", type=click.UNPROCESSED)  # click.Path would ask it
def command(directory: str) -> None:
    """Unmount the image that is mounted on the directory DIR.

    A check or a repair that somebody waits for is ended, and what a repair has written by then is
    put back; if the mount is in use otherwise, nothing happens.
    """
    unmount(directory)
