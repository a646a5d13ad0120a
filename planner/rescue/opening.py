"""What of an image QEMU would not open is left out, where nothing brings it back; or why not.

QEMU opens no image of which it cannot load the snapshot table, or a persistent bitmap; nor one with
a LUKS header that is none. The tiers that a person may choose leave out entries and bitmaps.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.check.report import Report
from planner.errors import RepairError
from planner.findings.kinds import FindingKind, Structure
from planner.progress import Progress, tell_nobody
from planner.repair.bitmaps import STRUCTURES
from planner.repair.plan import Plan, RepairTier
from planner.repair.tiers import propose
from planner.source import Source

_BITMAPS = (FindingKind.BITMAP_DIRECTORY_INVALID, FindingKind.BITMAP_ENTRY_INVALID)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What leaves something out of an image; its check; and what goes, a sentence each."""

    plan: Plan
    after: Report
    notes: tuple[str, ...]


def leave_out(
    source: Source, report: Report, *, can_grow: bool = True, progress: Progress = tell_nobody
) -> LeftOut | None:
    """What leaves out one thing that stops QEMU; None where nothing does that can be.

    *report*: the check of *source*.
    """
    stops = {RepairTier.SNAPSHOTS: has_no_table(report), RepairTier.BITMAPS: _no_bitmaps(report)}
    for tier in (tier for tier, is_it in stops.items() if is_it):
        try:
            found = propose(source, report, tier, can_grow=can_grow, progress=progress)
        except RepairError:
            continue
        if not found.plan.changes_nothing:
            return LeftOut(found.plan, found.after, found.notes)
    return None


def has_no_table(report: Report) -> bool:
    """Whether QEMU cannot load the snapshot table."""
    found = report.findings.of(FindingKind.CHECK_STOPPED, Structure.SNAPSHOT_TABLE)
    # What is about one entry stops a check of its L1 table alone.
    return bool((found.index < 0).any())


def _no_bitmaps(report: Report) -> bool:
    kinds = (*_BITMAPS, FindingKind.CHECK_STOPPED)
    return any(len(report.findings.of(kind, *STRUCTURES)) for kind in kinds)


def why_refused(report: Report) -> str | None:
    """Why QEMU would not open the image of which this is the check, in a few words."""
    if report.error is not None:
        return str(report.error)
    if report.luks_error is not None:
        return str(report.luks_error)
    if not (has_no_table(report) or _no_bitmaps(report)):
        return None
    return str(report.stopped[0]) if report.stopped else "a table of a bitmap has invalid entries"
