"""The command `instarfs`: its subcommands by name, and how errors end.

Importing this loads neither numpy nor construct nor trio nor pyfuse3; a command's own module
does, when that command is called. No command prints an error itself: it raises it.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from typing import NoReturn

import click

from instarfs.errors import DOMAIN_ERRORS
from instarfs.render.text import printable

_NAME = "instarfs"
_MODULES = {
    "mount": "instarfs.cli.mount",
    "umount": "instarfs.cli.umount",
    "check": "instarfs.cli.check",
    "plan": "instarfs.cli.plan",
    "undo": "instarfs.cli.undo",
    "trim": "instarfs.cli.trim",
    "info": "instarfs.cli.info",
    "map": "instarfs.cli.map",
}

# Not click's 2: that is "corruptions found", as with `qemu-img check`.
_USAGE_EXIT_CODE = 1
_INTERRUPTED_EXIT_CODE = 130


class _Commands(click.Group):
    """Subcommands that are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _MODULES:
            return None
        # What is imported is no garbage: looking for some meanwhile takes a tenth of the time, and
        # to look through it again and again later a tenth of a check's.
        gc.disable()
        try:
            command: click.Command = importlib.import_module(_MODULES[cmd_name]).command
        finally:
            gc.freeze()
            gc.enable()
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name=_NAME, message="%(prog)s %(version)s")
def commands() -> None:
    """Mount a qcow2 image, read what is inside it, and repair it where that can be proven."""


def main() -> NoReturn:
    """Run the command line of this process: errors are one line on stderr, and an exit code."""
    _fill_standard_descriptors()
    # numpy's library for linear algebra, of which there is none here, starts a thread a core.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        sys.exit(commands.main(prog_name=_NAME, standalone_mode=False))
    except DOMAIN_ERRORS as error:
        _fail(str(error), error.exit_code)
    except MemoryError:
        _fail("there is not enough memory for that (ulimit -d, ulimit -v)", 1)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(_USAGE_EXIT_CODE)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else _NAME
        _fail(f"{error.format_message()} (see: {command} --help)", _USAGE_EXIT_CODE)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except click.Abort:
        sys.exit(_INTERRUPTED_EXIT_CODE)


def _fill_standard_descriptors() -> None:
    """Where the caller closed one of 0, 1, 2, the next file opened would be taken for it."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)


def _fail(message: str, exit_code: int) -> NoReturn:
    click.echo(f"{_NAME}: {printable(message)}", err=True)
    sys.exit(exit_code)
