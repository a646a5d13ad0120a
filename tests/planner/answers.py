"""How the planner answers: with a value, or with the one error that it may raise."""

from collections.abc import Callable

from planner.errors import ImageError


def refusal(function: Callable[..., object], *arguments: object) -> ImageError | None:
    """The error that a call is refused with; None where it is answered.

    Any other exception is a defect of the planner and passes through.
    """
    try:
        function(*arguments)
    except ImageError as error:
        return error
    return None
