"""How a command says what went wrong: one line on stderr, whatever is in it."""

from __future__ import annotations

import click

from instarfs.errors import InstarfsError
from instarfs.text import printable
from planner.errors import PlannerError

NAME = "instarfs"

Failure = InstarfsError | PlannerError
"""What ends a command, or its work on one of several images: its sentence, and its exit code."""


def complain(sentence: str) -> None:
    """Say it."""
    remark(f"{NAME}: {sentence}")


def remark(line: str) -> None:
    """Say what is no result: a line on stderr."""
    click.echo(printable(line), err=True)
