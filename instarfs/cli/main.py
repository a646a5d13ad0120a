"""The command `instarfs`: its subcommands by name, and how errors end.

Importing this loads neither numpy nor construct nor trio nor pyfuse3; a command's own module
does, when that command is called. No command prints an error itself: it raises it.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import NoReturn

import click

from instarfs.cli.complaints import NAME, complain
from instarfs.cli.loading import Kept, Loading
from instarfs.cli.room import OutOfTime, shortage_of
from instarfs.cli.streams import standard_streams
from instarfs.errors import DOMAIN_ERRORS

COMMANDS = {
    "mount": "Mount an image on an empty directory.",
    "umount": "Unmount the image that is mounted on a directory.",
    "check": "Check all metadata of an image, and repair it with -r.",
    "scan": "Check all images below a folder, later only what has changed.",
    "report": "Say what is wrong with an image, and what can be done.",
    "files": "List which files on the guest's disk are hit.",
    "plan": "Show what a repair would do.",
    "undo": "Take the last repair back.",
    "trim": "Give the disk space of free clusters back.",
    "info": "Show what an image says of itself.",
    "map": "Show from which file each part of the guest's disk is read.",
    "export": "Copy the guest's disk into a sparse file.",
    "rescue": "Bring back what the metadata of an image has lost.",
    "schema": "Print a JSON Schema of what instarfs writes.",
}
"""Of each command, which is the module of that name here, what `instarfs --help` says."""

# Not click's 2: that is "corruptions found", as with `qemu-img check`.
_USAGE_EXIT_CODE = 1
_INTERRUPTED_EXIT_CODE = 130


class _Commands(click.Group):
    """Subcommands that are imported when they are called, and not to be listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        with Kept(), Loading():
            module = importlib.import_module(f"instarfs.cli.{cmd_name}")
            command: click.Command = module.command
            return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name=NAME, message="%(prog)s %(version)s")
def commands() -> None:
    """Mount a qcow2 image, read what is inside it, and repair it where that can be proven."""


def main(what_for: str | None = None) -> NoReturn:
    """Run the command line of this process: errors are one line on stderr, and an exit code.

    *what_for*: `instarfs.cli.stopping.PROCESS` where the process is for nothing else.
    """
    # numpy's library for linear algebra, of which there is none here, starts a thread a core.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with standard_streams():
        sys.exit(_run(what_for))


def _run(what_for: str | None) -> int:
    """The exit code."""
    try:
        result = commands.main(prog_name=NAME, standalone_mode=False, obj=what_for)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return _USAGE_EXIT_CODE
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else NAME
        complain(f"{error.format_message()} (see: {command} --help)")
        return _USAGE_EXIT_CODE
    except DOMAIN_ERRORS as error:
        complain(str(error))
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):  # before what it is one of, a RuntimeError
        return _INTERRUPTED_EXIT_CODE
    except (MemoryError, OSError, ImportError, SystemError, RuntimeError, OutOfTime) as error:
        shortage = shortage_of(error)
        if shortage is None:
            raise
        complain(shortage)
        return 1
    return int(result or 0)
