"""The order of a check, a plan and a repair; the one writer, and the way back.

This room has the name of a function that `instarfs` offers to other programs, and is called as it:
a package's room is an attribute of the package from when it is loaded.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from os import PathLike

    from instarfs.repair.outcome import RepairOutcome
    from planner.progress import Progress
    from planner.repair.plan import RepairTier


class _Room(ModuleType):
    def __call__(
        self,
        path: str | PathLike[str],
        tier: RepairTier | str,
        quote: str = "",
        *,
        progress: Progress | None = None,
    ) -> RepairOutcome:
        """See `instarfs.repair.library.repair`."""
        from instarfs.repair.library import repair  # noqa: PLC0415
        from planner.progress import tell_nobody  # noqa: PLC0415

        return repair(path, tier, quote, progress=progress or tell_nobody)


sys.modules[__name__].__class__ = _Room
