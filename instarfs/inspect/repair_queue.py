"""The repairs of one image under inspection: one at a time, in a worker thread, and what came of
them.

When a repair may begin, what is known while it runs and afterwards, and how it ends early live
here. How one goes is up to `instarfs.repair.run`; nothing here is rendered.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import trio

from instarfs.errors import (
    ImageReadFailed,
    InstarfsError,
    RepairCancelled,
    RepairIncomplete,
    RepairRunning,
    UndoFileDamaged,
)
from instarfs.image.file import Generation, Image
from instarfs.image.memory import give_back as give_back_memory
from instarfs.image.rwlock import Sharing
from instarfs.inspect.shared_value import while_wanted
from instarfs.inspect.stages import IDLE, percentage
from instarfs.repair.journal import Summary, read_summary
from instarfs.repair.outcome import RepairOutcome, Status
from instarfs.repair.run import Repairer
from instarfs.repair.undo_place import UndoPlace
from planner.errors import Cancelled, PlannerError, RepairError
from planner.progress import Progress
from planner.repair.plan import PlanTier, RepairTier

_APPLIED = (Status.REPAIRED, Status.INCOMPLETE, Status.NOTHING_TO_DO)
_NO_LONGER_KNOWN = (Status.UNDONE, Status.INTERRUPTED)

_Asked = tuple[RepairTier, str]
"""A tier and a quoted plan id."""


class MakeRepairer(Protocol):
    """`instarfs.repair.run.Repairer`, or what stands in for it in a test."""

    def __call__(self, image: Image, *, progress: Progress) -> Repairer: ...


class Repairs:
    """Repairs, undoes and trims what *find_image* returns, one at a time.

    *find_image* is called when a repair begins and may raise a domain error; *let_go* before and
    after it, to give memory back that others hold. ``outcome``: what came
    of the last one, or of what was asked for since and not begun. ``applied``: the tier last
    applied, unless it was taken back.
    """

    def __init__(
        self,
        find_image: Callable[[], Image],
        sharing: Sharing,
        make_repairer: MakeRepairer = Repairer,
        let_go: Callable[[], None] = lambda: None,
    ) -> None:
        self._find_image = find_image
        self._let_go = let_go
        self._sharing = sharing
        self._make_repairer = make_repairer
        self._scope: trio.CancelScope | None = None
        self._progress = IDLE
        self._failed: tuple[_Asked, Generation | None, RepairOutcome] | None = None
        self._standing: tuple[Generation | None, RepairOutcome] | None = None
        self.outcome: RepairOutcome | None = None
        self.applied: PlanTier | None = None

    @property
    def is_running(self) -> bool:
        """Whether a repair, an undo or a trim is under way."""
        return self._scope is not None

    def progress(self) -> str:
        """What it is doing: `IDLE`, or its stage and percentage."""
        return self._progress

    def standing(self, generation: Generation) -> RepairOutcome | None:
        """The repair that left the image as it is in this *generation*, if there is one."""
        known = self._standing
        return known[1] if known and known[0] == generation else None

    async def repair(self, tier: RepairTier, quote: str = "") -> RepairOutcome:
        """As `Repairer.repair`. Raises `RepairRunning`, and `RepairCancelled` before it began.

        What could not be done cannot be done to the same image a moment later either: then it is
        the outcome of before. Python's files write again when they are closed what has failed.
        """
        asked, failed = (tier, quote), self._failed
        if failed is not None:
            now = await trio.to_thread.run_sync(
                self._find_image().generation, abandon_on_cancel=True
            )
            if failed[:2] == (asked, now):
                self.outcome = failed[2]
                return failed[2]
        return await self._run(lambda repairer: repairer.repair(tier, quote), asked)

    async def undo(self) -> RepairOutcome:
        """As `Repairer.undo`. Raises as `repair` does."""
        return await self._run(Repairer.undo)

    async def trim(self) -> RepairOutcome:
        """As `Repairer.trim`. Raises as `repair` does."""
        return await self._run(Repairer.trim)

    def refuse(self, error: InstarfsError | PlannerError) -> None:
        """Remember that something else was asked for, of which nothing was begun."""
        self.outcome = RepairOutcome(reason=str(error), error=error)

    def cancel(self) -> None:
        """End what is under way, if anything; what it has written is put back."""
        if self._scope is not None:
            self._scope.cancel()

    async def _run(
        self, job: Callable[[Repairer], RepairOutcome], asked: _Asked | None = None
    ) -> RepairOutcome:
        image = self._find_image()
        if self._scope is not None:
            raise RepairRunning(image.path)
        self._scope = trio.CancelScope()
        self._let_go()
        try:
            # A thread that has begun is waited for, come what may, and its outcome returned: also
            # when the caller has been cancelled, which the thread is told.
            with self._scope, suppress(Cancelled):
                return await trio.to_thread.run_sync(self._work, image, job, asked)
        finally:
            self._scope, self._progress = None, IDLE
            self._let_go()
        raise RepairCancelled(image.path)

    def _work(
        self, image: Image, job: Callable[[Repairer], RepairOutcome], asked: _Asked | None
    ) -> RepairOutcome:
        self._progress = "waiting for a check to end"
        repairer = self._make_repairer(image, progress=while_wanted(self._set_progress))
        with self._sharing.writing(while_wanted()):
            give_back_memory()  # It needs as much as others have just let go of.
            before = image.generation()
            outcome = job(repairer)
            after = _generation(image)
            self._remember(before, after, outcome)
            is_final = isinstance(outcome.error, RepairError | RepairIncomplete)
            self._failed = (asked, after, outcome) if asked and is_final else None
        give_back_memory()
        return outcome

    def _remember(
        self, before: Generation, after: Generation | None, outcome: RepairOutcome
    ) -> None:
        self.outcome = outcome
        if outcome.status in _APPLIED:
            self.applied = outcome.tier
        elif outcome.status in _NO_LONGER_KNOWN:
            self.applied = None
        standing = None if outcome.status in _NO_LONGER_KNOWN else self.standing(before)
        if outcome.stands:
            standing = outcome
        self._standing = (after, standing) if standing else None

    def _set_progress(self, stage: str, done: int, total: int) -> None:
        self._progress = percentage(stage, done, total)


def _generation(image: Image) -> Generation | None:
    """What it is after what was done; where that is not told None, which it never is again."""
    try:
        return image.generation()
    except ImageReadFailed:
        return None


def last_repair(image: Image) -> Summary | UndoFileDamaged | None:
    """What the undo file of *image* says of itself, or why it cannot; None where there is none."""
    try:
        place = UndoPlace.of(image)
        if place is None:
            return None
        with place:
            return read_summary(place)
    except UndoFileDamaged as error:
        return error
    except OSError:
        return None
