"""How a command says what went wrong: one line on stderr, whatever is in it."""

from __future__ import annotations

import click

from instarfs.errors import DOMAIN_ERRORS, InstarfsError
from instarfs.text import printable
from planner.errors import PlannerError

NAME = "instarfs"

FAILURES = (*DOMAIN_ERRORS, click.ClickException)
"""What ends a command, or its work on one of several images, in one line and an exit code."""

Failure = InstarfsError | PlannerError | click.ClickException


def sentence_of(error: Failure) -> str:
    """What to say of it."""
    return error.format_message() if isinstance(error, click.ClickException) else str(error)


def complain(sentence: str) -> None:
    """Say it."""
    remark(f"{NAME}: {sentence}")


def remark(line: str) -> None:
    """Say what is no result: a line on stderr."""
    click.echo(printable(line), err=True)
