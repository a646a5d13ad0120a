"""The front door for other programs: `instarfs.check`, `plan`, `repair`, `undo` and `trim`.

Each does what the command of that name does, in the calling thread, under the same locks, and
returns it as a value. They set no limit on memory, which is the whole process': whoever looks at
hostile images sets one (RLIMIT_DATA), and has a MemoryError where it is not enough.

Each calls its *progress* often, in the calling thread, with a stage, how much of it is done and how
much there is. To end the work, raise `planner.Cancelled` there: it comes out of a check or a plan,
and of the others it is the ``error`` of their outcome, a `RepairCancelled` or `TrimCancelled`.
Whatever else is raised there comes out as it is. What a repair had begun is put back first.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

from instarfs.image import locks
from instarfs.image.opening import opened
from instarfs.repair.checking import LiveCheck, run_check
from instarfs.repair.outcome import RepairOutcome
from instarfs.repair.planning import run_plan
from instarfs.repair.run import Repairer
from planner.check.check import check_image
from planner.check.live import SETTLE
from planner.check.report import Report
from planner.progress import Progress, tell_nobody
from planner.repair.plan import RepairTier
from planner.repair.tiers import Proposal

ImagePath = str | os.PathLike[str]


def check(
    path: ImagePath,
    *,
    force_share: bool = False,
    settle: float = SETTLE,
    progress: Progress = tell_nobody,
) -> Report:
    """Check all metadata of the qcow2 image at *path*. Writes nothing, opens no other file.

    What is no qcow2 image, or has a header that makes no sense, gives a report with an ``error``;
    one that was written to meanwhile has the verdict ``torn``, and is good for nothing. Offsets and
    lengths in it are in bytes. With *force_share* a program may have it open for writing: what can
    be said of it within about *settle* seconds has a ``live``, the time that it is of in seconds
    since the epoch. Raises an `InstarfsError`: `ImageMissing` and its like, `ImageInUse` where a
    program has it open for writing, `ImageReadFailed`.
    """
    access, check = locks.READ_ONLY, partial(check_image, progress=progress)
    live = None
    if force_share:
        access, live = locks.FORCE_SHARE, LiveCheck(settle, check)
    with opened(os.fspath(path), access=access, is_bounded=False) as image:
        return run_check(image, check, live=live).report


def plan(path: ImagePath, tier: RepairTier | str, *, progress: Progress = tell_nobody) -> Proposal:
    """What a repair of *tier*, ``leaks`` or ``all``, would do to the image at *path*: a dry run.

    Its ``plan`` has the bytes that would change, its ``after`` the check of the image as it would
    be. Writes nothing. Raises as `check`; `RepairPending` where a repair was interrupted; a
    `planner.RepairError` where the tier refuses, or the image was written to meanwhile; ValueError
    for another tier.
    """
    tier = RepairTier(tier)
    with opened(os.fspath(path), is_bounded=False) as image:
        return run_plan(image, tier, progress=progress)


def repair(
    path: ImagePath,
    tier: RepairTier | str,
    quote: str = "",
    *,
    progress: Progress = tell_nobody,
) -> RepairOutcome:
    """Repair the image at *path* as far as *tier* goes; with *quote* exactly the plan of that id.

    The outcome's ``error`` says why not all that was asked for was done, and ``status`` what became
    of the image; what was begun is put back. `undo` takes it back. Raises an `InstarfsError` where
    there is no image to open, ValueError for another tier; what goes wrong later is in the outcome.
    """
    tier = RepairTier(tier)
    return _write(path, lambda repairer: repairer.repair(tier, quote), progress)


def undo(path: ImagePath, *, progress: Progress = tell_nobody) -> RepairOutcome:
    """Take the last repair of the image at *path* back, byte for byte; or an interrupted one.

    ``undoable`` of the outcome says how many more can be taken back. Raises as `repair`.
    """
    return _write(path, Repairer.undo, progress)


def trim(path: ImagePath, quote: str = "", *, progress: Progress = tell_nobody) -> RepairOutcome:
    """Give the disk space of the free clusters of the image at *path* back, for good.

    ``trimmed`` of the outcome is how much, in bytes. *quote*: the id that a refusal tells, where
    what may be left of a lost disk is to go too. Raises as `repair`.
    """
    return _write(path, lambda repairer: repairer.trim(quote), progress)


def _write(
    path: ImagePath, job: Callable[[Repairer], RepairOutcome], progress: Progress
) -> RepairOutcome:
    with opened(os.fspath(path), access=None, is_bounded=False) as image:
        return job(Repairer(image, progress=progress))
