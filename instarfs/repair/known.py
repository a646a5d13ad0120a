"""What somebody knows of a header that a rescue looks for, in their words and as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # all of the format, which a mount loads late
    from planner.qcow2.header import Header


@dataclass(frozen=True, slots=True)
class Known:
    """``like``: the path of an image that was made in the same way, of which ``header`` is; and
    ``assumed``: FIELD=VALUE, of which ``fields`` are.
    """

    like: str | None = None
    assumed: tuple[str, ...] = ()
    header: Header | None = None
    fields: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_something(self) -> bool:
        """Whether anything was said."""
        return self.like is not None or bool(self.assumed)
