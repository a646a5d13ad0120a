"""Options that several commands have."""

from __future__ import annotations

import click

share_option = click.option(
    "-U", "--force-share", is_flag=True, help="Also while another process has it open."
)

undo_file_option = click.option(
    "--undo-file",
    metavar="PATH",
    type=click.Path(readable=False),
    help="Where the undo file of this image is, or is to be; by default beside it.",
)

settle_option = click.option(
    "--settle",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    help="With -U: how long to look for a moment while a program writes to it; 5 by default.",
)

follow_option = click.option(
    "--follow",
    "directories",
    multiple=True,
    metavar="DIR",
    help="Open backing and data files that the image names, where they are below DIR.",
)

snapshot_option = click.option(
    "--snapshot",
    metavar="N",
    help="The disk of this internal snapshot: its number in snapshots/ of a mount, or its name.",
)

progress_option = click.option("-p", "--progress", is_flag=True, help="Show progress on stderr.")

quiet_option = click.option("-q", "--quiet", is_flag=True, help="Say nothing; the exit code tells.")
