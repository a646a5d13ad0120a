"""Errors of the planner with the image's name in them."""

from __future__ import annotations

from instarfs.errors import ImageNotQcow2, ImageUnreadable, InstarfsError
from planner.errors import NotQcow2, PlannerError


def named(error: InstarfsError | PlannerError, path: str) -> InstarfsError | PlannerError:
    """*error* with the image in its sentence: the planner does not know what that is called."""
    if isinstance(error, NotQcow2):
        return ImageNotQcow2(path, str(error))
    return ImageUnreadable(path, str(error)) if isinstance(error, PlannerError) else error
