"""`instarfs mount`: what can be refused at once, and which process does the rest."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import click

from instarfs.cli.known import known, known_options, require_rescue
from instarfs.cli.loading import Kept
from instarfs.cli.naming import named
from instarfs.cli.options import follow_option, undo_file_option
from instarfs.cli.room import shortage_of
from instarfs.daemon import background, descriptors
from instarfs.daemon.broker import separated
from instarfs.daemon.logs import log_to_stderr
from instarfs.errors import FuseNotInstalled
from instarfs.guest.follow import Follow
from instarfs.image.file import Image
from instarfs.mount.mountpoint import check_fuse, check_mountpoint
from instarfs.mount.options import MountOptions
from instarfs.repair.words import PREVIEWS
from planner.errors import PlannerError


@click.command(name="mount")
@click.option(
    "-o",
    "words",
    multiple=True,
    metavar="OPT[,OPT...]",
    help="Mount options. allow_other lets other users read the mount; ro as --read-only;"
    " no_undo, undo_file=PATH, preview=TIER and follow=DIR as the options below; what mount(8)"
    " and fstab pass is understood.",
)
@click.option("-f", "foreground", is_flag=True, help="Stay in the foreground and log to stderr.")
@click.option(
    "--read-only", is_flag=True, help="Refuse to repair: control files cannot be written."
)
@click.option("--no-undo", is_flag=True, help="Repair for good, so that nothing can be taken back.")
@click.option(
    "--preview",
    type=click.Choice(PREVIEWS),
    help="Show the image as it would be after this repair, or a rescue; nothing is written.",
)
@known_options
@undo_file_option
@follow_option
@click.argument("image", type=click.Path(readable=False))
@click.argument("directory", metavar="DIR", type=click.Path(readable=False))
def command(
    words: tuple[str, ...],
    image: str,
    directory: str,
    directories: tuple[str, ...],
    undo_file: str | None,
    *,
    like: str | None,
    assumed: tuple[str, ...],
    preview: str | None,
    foreground: bool,
    read_only: bool,
    no_undo: bool,
) -> None:
    """Mount the qcow2 image IMAGE on the empty directory DIR.

    Returns when the mount answers; a process in the background serves it until it is unmounted,
    and logs to syslog. The image is not changed, unless somebody writes to a file in repair/.
    """
    # The threads of numpy, which nothing here uses, would not be confined with the rest.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    inherited = descriptors.open_now()
    options = MountOptions.parse(words, read_only=read_only, preview=preview)
    knows = known(like, assumed)
    require_rescue(knows, options.preview)
    keep_undo = options.keep_undo and not no_undo
    # Opened before the mount could hide it.
    opened = Image.open(image, undo_file or options.undo_file)
    follow = Follow((*directories, *options.follow), serving=True)
    check_mountpoint(directory)
    check_fuse(directory)
    descriptors.let_go_of(inherited)
    if foreground:
        log_to_stderr()
        ready = background.nobody_waits
    else:
        ready = background.to_background()
        background.log_to_syslog()
    with separated(opened, read_only=options.read_only):
        # Not before the forks: what is loaded by then the broker keeps in its memory, too; numpy
        # starts threads, and a fork takes only the calling one along.
        serve = _what_serves()
        try:
            code = serve(
                opened,
                directory,
                options,
                ready,
                follow=follow,
                keeps_undo=keep_undo,
                preview=options.preview,
                knows=knows,
            )
        except PlannerError as error:
            raise named(error, image) from error
    sys.exit(code)


def _what_serves() -> Callable[..., int]:
    """`serve`, imported only now: that it cannot be is a message, not a crash.

    Raises:
        FuseNotInstalled: what only a mount needs is not there.
    """
    with Kept():
        try:
            import instarfs.daemon.process  # noqa: F401, PLC0415 - with trio and pyfuse3
        except ImportError as error:
            if shortage_of(error) is not None:
                raise
            raise FuseNotInstalled(str(error)) from error
        from instarfs.daemon.serve import serve  # noqa: PLC0415
    return serve
