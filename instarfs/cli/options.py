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
