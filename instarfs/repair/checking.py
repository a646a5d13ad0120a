"""One check of one image: the order of its steps, for whoever wants one.

The command line, the mount, a repair and a library all check like this. What follows from a check,
a plan of a repair, is `instarfs.repair.planning`; what a check asks is `planner.check.check`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from instarfs.image import locks
from instarfs.image.file import Generation, Image
from instarfs.image.memory import keep_freed_memory
from instarfs.repair.interrupted import pending
from planner.check.check import check_image
from planner.check.live import SETTLE, Clock, check_live
from planner.check.report import Report
from planner.source import Source

if TYPE_CHECKING:
    from instarfs.repair.outcome import Pending


@dataclass(frozen=True, slots=True)
class Checked:
    """A check of ``image`` as it was ``before``. ``pending``: a repair that was interrupted."""

    image: Image
    before: Generation
    pending: Pending | None
    report: Report

    @property
    def still_holds(self) -> bool:
        """Whether the image is still what it was before the check. Raises `ImageReadFailed`."""
        return self.image.generation() == self.before

    def report_now(self) -> Report:
        """The report; torn where the image has changed by now, after more was read of it."""
        return self.report if self.still_holds else replace(self.report, changed=True)


@dataclass(frozen=True, slots=True)
class LiveCheck:
    """A check of an image that a program writes: `planner.check.live`, by the clock of this world.

    ``settle``: how long it may look for a moment, in seconds. ``again``: what looks once more at
    what was found, called with ``only`` some tables. ``pause``: sleeps.
    """

    settle: float = SETTLE
    again: Callable[..., Report] = check_image
    pause: Callable[[float], None] = time.sleep

    def run(self, image: Image, check: Callable[[Source], Report]) -> Report:
        """Its report, with ``as_of`` as a time of day."""
        clock = Clock(time.monotonic, self.pause)
        report = check_live(image.source, clock, check, self.again, settle=self.settle)
        live = report.live
        if live is None or live.as_of is None:
            return report
        as_of = time.time() - (time.monotonic() - live.as_of)
        return replace(report, live=replace(live, as_of=as_of))


def run_check(
    image: Image,
    check: Callable[[Source], Report],
    *,
    is_written: Callable[[], bool] | None = None,
    live: LiveCheck | None = None,
) -> Checked:
    """Have *check* look at *image*, and say whether all that it read is of one moment.

    *is_written*: whether somebody else may be writing just now; as QEMU's locks tell unless it is
    told otherwise. *live*: how to look for a moment, and once more at what may be damage, where
    somebody is, or did; the report then has a ``live``. Takes no lock. Raises `ImageReadFailed`,
    and what *check* raises.
    """

    def by_others() -> bool:
        return locks.is_written(image.fileno(), image.path)

    keep_freed_memory()
    is_written = is_written or by_others
    was_written, before, interrupted = is_written(), image.generation(), pending(image)
    # Of an image that is written anyway a check as if it were not would be for nothing.
    report = None if live and was_written else check(image.source())
    in_use = was_written or is_written()
    if report is None or (live and (in_use or image.generation() != before)):
        report = (live or LiveCheck()).run(image, check)
        in_use |= is_written()
    changed = image.generation() != before
    report = replace(report, in_use=in_use, changed=changed)
    return Checked(image, before, interrupted, report)
