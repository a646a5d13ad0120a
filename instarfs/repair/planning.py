"""What a repair would do to an image: a plan from a check of it, all of one moment.

The command line, the mount and a library plan like this. What is planned is decided in
`planner.repair.tiers`.
"""

from __future__ import annotations

from collections.abc import Callable

from instarfs.errors import RepairPending
from instarfs.image.file import Image
from instarfs.repair.checking import Checked, run_check
from instarfs.repair.interrupted import pending
from planner.check.check import check_image
from planner.check.report import Report
from planner.errors import AmbiguousCorruption, RepairError, as_value
from planner.progress import Progress, tell_nobody
from planner.repair.plan import RepairTier
from planner.repair.tiers import Proposal, propose
from planner.triage.triage import Triage


def run_plan(
    image: Image,
    tier: RepairTier,
    *,
    path: str | None = None,
    progress: Progress = tell_nobody,
) -> Proposal:
    """Check *image* and plan a repair of *tier*. Nothing is written. *path*: what to call it.

    Raises `RepairPending`, `ImageReadFailed`, and a `RepairError` where the tier refuses, or the
    image changed meanwhile.
    """
    interrupted = pending(image)
    if interrupted is not None:
        raise RepairPending(path or image.path, interrupted.sentence)
    checked = run_check(image, lambda source: check_image(source, progress=progress))
    return plan_checked(checked, tier, progress=progress)


def plan_checked(
    checked: Checked,
    tier: RepairTier,
    *,
    triage: Triage | None = None,
    progress: Progress = tell_nobody,
) -> Proposal:
    """Plan a repair from a check that was just made. *triage*: of its leaks, where that is known.

    Raises `ImageReadFailed`, and a `RepairError` as `run_plan`.
    """
    found = propose_for(checked.image, checked.report, tier, triage=triage, progress=progress)
    found = of_one_moment(
        found, checked.report, lambda: not checked.still_holds, "stop its writer first"
    )
    if isinstance(found, RepairError):
        raise found
    return found


def propose_for(
    image: Image,
    report: Report,
    tier: RepairTier,
    *,
    triage: Triage | None = None,
    progress: Progress = tell_nobody,
) -> Proposal | RepairError:
    """What a repair would do to *image* from its *report*, or why the tier refuses."""
    try:
        return propose(
            image.source(),
            report,
            tier,
            can_grow=not image.is_device,
            triage=triage,
            progress=progress,
        )
    except RepairError as error:
        return as_value(error)


def of_one_moment(
    found: Proposal | RepairError, report: Report, changed: Callable[[], bool], wayout: str
) -> Proposal | RepairError:
    """*found*, unless the image has *changed* since its check: then a refusal, with *wayout*.

    A refusal, too, may come of the change; that of a torn report has the better advice.
    """
    if report.torn or not changed():
        return found
    return AmbiguousCorruption("the image changed while it was planned", wayout)
