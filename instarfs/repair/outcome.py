"""What became of a repair, an undo or a trim, as a value.

Made in `instarfs.repair.run` and shown by `instarfs.render`; nothing is decided or worded here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from instarfs.errors import InstarfsError
from planner.check.report import RepairCounters, Report
from planner.errors import PlannerError
from planner.repair.plan import PlanTier
from planner.repair.split import Shares
from planner.repair.tiers import Left
from planner.triage.triage import Suspect

NOTHING_MENDED = RepairCounters(leaks=0, refcounts=0, corruptions=0, incomplete=False)


class Status(StrEnum):
    """How it ended."""

    REPAIRED = "repaired"
    INCOMPLETE = "incomplete"
    NOTHING_TO_DO = "nothing-to-do"
    REFUSED = "refused"
    ROLLED_BACK = "rolled-back"
    INTERRUPTED = "interrupted"
    UNDONE = "undone"
    TRIMMED = "trimmed"


@dataclass(frozen=True, slots=True)
class RepairOutcome:
    """What a repair, an undo or a trim did.

    ``found``, ``planned``, ``repaired``, ``left_count``: the numbers of a repair. ``counters``:
    what it mended, by sort. ``suspects``: leaked clusters that look like something lost, the first
    of ``suspect_count``. ``shares``: who had clusters in common and has no more. ``after``: the
    check of the image as it now is, where known. ``recovered``: an interrupted repair was taken
    back first. ``trimmed``: bytes of disk space given back. ``undoable``: how many repairs can be
    taken back now, one by one; ``stale``: how many before this one cannot, since the image was
    written to after them. ``error``: None exactly where all that was asked for was done; ``reason``
    then says what else is worth knowing.
    """

    status: Status = Status.REFUSED
    tier: PlanTier | None = None
    plan_id: str = ""
    found: int = 0
    planned: int = 0
    repaired: int = 0
    left_count: int = 0
    left: tuple[Left, ...] = ()
    counters: RepairCounters = NOTHING_MENDED
    suspects: tuple[Suspect, ...] = ()
    suspect_count: int = 0
    reason: str = ""
    before: Report | None = None
    after: Report | None = None
    shares: Shares = field(default_factory=Shares)
    undo_file: str = ""
    undoable: int = 0
    stale: int = 0
    recovered: bool = False
    trimmed: int = 0
    error: InstarfsError | PlannerError | None = None

    @property
    def stands(self) -> bool:
        """Whether the image is now as this repair left it."""
        return self.status in (Status.REPAIRED, Status.INCOMPLETE)

    @property
    def leaks_fixed(self) -> int:
        """By how much the counter of leaks went down; as ``qemu-img check -r`` counts."""
        return self._fixed("leaks")

    @property
    def corruptions_fixed(self) -> int:
        """By how much the counter of corruptions went down, wrong refcounts included."""
        return self._fixed("corruptions")

    def _fixed(self, counter: str) -> int:
        if not self.stands or self.before is None or self.after is None:
            return 0
        before: int = getattr(self.before.counters, counter)
        after: int = getattr(self.after.counters, counter)
        return max(0, before - after)


@dataclass(frozen=True, slots=True)
class Pending:
    """A repair that was interrupted, or an undo file that cannot be read: it comes first."""

    sentence: str
    undo_file: str
    tier: PlanTier | None = None
    plan_id: str = ""
