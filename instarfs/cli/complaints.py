"""How a command says what went wrong: one line on stderr, whatever is in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from instarfs.errors import InstarfsError
from instarfs.text import printable
from planner.errors import PlannerError

if TYPE_CHECKING:
    from instarfs.repair.outcome import Pending

NAME = "instarfs"

Failure = InstarfsError | PlannerError
"""What ends a command, or its work on one of several images: its sentence, and its exit code."""


def complain(sentence: str) -> None:
    """Say it."""
    remark(f"{NAME}: {sentence}")


def remark(line: str) -> None:
    """Say what is no result: a line on stderr."""
    click.echo(printable(line), err=True)


def remark_interrupted(left_over: Pending | None, label: str = "") -> None:
    """Say that a repair was interrupted, if one was: what is shown is of the image as it lies."""
    if left_over is not None:
        remark(f"{label}NOTE {left_over.sentence}")
