"""Every error that leaves the planner, and nothing else.

An error is a class with structured fields; its sentence is made in one place, here. ``exit_code``
is what a command ends with, ``errno`` what a read in the mount answers.
"""

from __future__ import annotations

import errno as _errno
from typing import TypeVar

_E = TypeVar("_E", bound=Exception)


def as_value(error: _E) -> _E:
    """*error*, to be kept: without the frames it came through, which hold all that they worked on,
    an open image and its tables among it.
    """
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


class ReadFailed(Exception):
    """What a source raises where its bytes cannot be read; the base of errors of its own."""


class PlannerError(Exception):
    """Base of what the planner raises."""

    exit_code = 1
    errno = _errno.EUCLEAN


class ImageError(PlannerError):
    """The image cannot be interpreted: one field, its value, and one sentence why.

    ``field`` is the name that QEMU's specification gives it, ``value`` what was found there.
    """

    def __init__(self, field: str, value: int | str, problem: str) -> None:
        super().__init__(field, value, problem)
        self.field = field
        self.value = value
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.field} is {self.value}: {self.problem}"


class NotQcow2(ImageError):
    """The file is not a qcow2 image at all."""

    exit_code = 63
    errno = _errno.EMEDIUMTYPE

    def __str__(self) -> str:
        return f"not a qcow2 image: {self.problem}"


class HeaderCutOff(ImageError):
    """The file begins like a qcow2 image and ends before its header does."""

    def __str__(self) -> str:
        return f"the file is cut off inside the qcow2 header: {self.problem}"


class NotAMapfile(PlannerError):
    """A text is no mapfile: the number of the line where that shows, and one sentence why."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(line, problem)
        self.line = line
        self.problem = problem

    def __str__(self) -> str:
        return f"line {self.line}: {self.problem}"


class RepairError(PlannerError):
    """A repair is refused: nothing is written.

    ``reason`` says why, ``wayout`` what can be done, ``finding`` which kind of finding is in the
    way.
    """

    kind = "REFUSED"

    def __init__(self, reason: str, wayout: str = "", finding: str = "") -> None:
        super().__init__(reason, wayout, finding)
        self.reason = reason
        self.wayout = wayout
        self.finding = finding

    def __str__(self) -> str:
        return f"{self.reason}; {self.wayout}" if self.wayout else self.reason


class RefcountExhausted(RepairError):
    """A cluster has more references than the image's refcounts can count."""

    kind = "REFCOUNT_EXHAUSTED"


class AmbiguousCorruption(RepairError):
    """More than one outcome is possible, or what looks like waste may be something lost."""

    kind = "AMBIGUOUS_CORRUPTION"


class UnsupportedRepair(RepairError):
    """The image asks for something that a repair in place cannot do."""

    kind = "UNSUPPORTED"


class ParseFailed(RepairError):
    """A structure that would have to be understood cannot be."""

    kind = "PARSE_FAILED"


class HeaderUnknown(RepairError):
    """No header of the image can be believed more than any other."""

    kind = "HEADER_UNKNOWN"


class Cancelled(PlannerError):
    """The caller asked for the check to end before it was done."""

    errno = _errno.EINTR

    def __str__(self) -> str:
        return "cancelled"
