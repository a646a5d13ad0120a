"""A check of an image that a program writes meanwhile: a verdict that can be acted on.

First a moment is looked for in which all metadata holds still (`planner.check.held`); the check is
then of that moment. Guest writes in place touch no metadata, and a program writes its tables when
its caches are full or its guest says so, so that this is the usual case. Then each corruption is
looked at again by its own words (`planner.check.confirm`), whether there was such a moment or not.
What is left: nothing that could be wrong, as of a moment; corruption that was confirmed; or neither
within the time that was given, and the image is unsettled. Nothing is written, and no lock is
needed. The clock is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from planner.check.check import check_image
from planner.check.confirm import (
    ROUNDS,
    Recheck,
    confirm,
    has_suspects,
    without_refcounts,
)
from planner.check.held import Held, Look
from planner.check.report import Live, Report
from planner.errors import ImageError
from planner.findings.grouped import FindingsBuilder
from planner.findings.kinds import Structure
from planner.metadata.locate import take_survey
from planner.metadata.regions import Regions
from planner.qcow2.layout import Layout
from planner.source import Source

SETTLE = 5.0
"""Seconds within which a moment is looked for."""

LUKS_BYTES = 4 << 20
"""So much of a LUKS header is looked at, whatever length it claims."""

ATTEMPTS = 4
"""So often it is looked once more, when the time is over and nothing was confirmed."""

_SHORT, _LONG = 0.001, 0.25
"""Seconds between two attempts: the first, and the most."""

_HURRIED = 3
"""Attempts before the first pause."""


@dataclass(frozen=True, slots=True)
class Clock:
    """``now``: seconds from any moment on. ``pause``: lets so many pass."""

    now: Callable[[], float]
    pause: Callable[[float], None]


def check_live(
    look: Look,
    clock: Clock,
    check: Callable[[Source], Report] = check_image,
    again: Recheck = check_image,
    *,
    settle: float = SETTLE,
) -> Report:
    """Check an image that changes, for about *settle* seconds at most and a few checks.

    *check* looks at all of it, *again* once more at what was found. The report has a ``live``; its
    ``as_of`` is by *clock*. Raises what *look*'s sources raise.
    """
    return _Watch(look, clock, check, again, settle).run()


class _Watch:
    """One such check. `run` is the order of its steps."""

    def __init__(
        self,
        look: Look,
        clock: Clock,
        check: Callable[[Source], Report],
        again: Recheck,
        settle: float,
    ) -> None:
        self._look, self._clock, self._check, self._again = look, clock, check, again
        self._deadline = clock.now() + settle
        self._held = Held(look)
        self._moved = 0
        self._late = 0
        self._wait = _SHORT

    def run(self) -> Report:
        self._locate()
        while True:
            as_of = self._settle()
            report = self._check(self._held)
            is_known = not self._held.add(*_ranges(report.regions))
            if not self._held.is_whole and self._held.look_again():
                is_known = False
            concluded = self._conclude(report, as_of if is_known else None)
            if concluded is not None:
                return concluded

    def _is_over(self) -> bool:
        return self._clock.now() >= self._deadline

    def _pause(self) -> None:
        """Let the program go on with what it does; longer each time."""
        left = self._deadline - self._clock.now()
        self._clock.pause(max(0.0, min(self._wait, left)))
        self._wait = min(2 * self._wait, _LONG)

    def _locate(self) -> None:
        """Hold all that is metadata, as far as one look tells."""
        try:
            layout = Layout.read(self._held)
        except ImageError:
            return
        survey = take_survey(self._held, layout, FindingsBuilder())
        self._held.add(*_ranges(survey.every_region))

    def _settle(self) -> float | None:
        """Have all metadata held as of one moment; which. None where it never stood still."""
        self._held.look_again()
        attempt = 0
        while True:
            between = self._clock.now()
            self._moved = self._held.look_again()
            if not self._moved:
                return between
            if self._is_over():
                return None
            attempt += 1
            if attempt > _HURRIED:
                self._pause()
                self._held.look_again()

    def _conclude(self, report: Report, as_of: float | None) -> Report | None:
        """What is to be said; None where it is worth looking once more."""
        if report.layout is not None and report.layout.header.dirty:
            report = without_refcounts(report)
        if report.error is not None:
            return self._of_header(report, as_of)
        if as_of is not None and not has_suspects(report):
            return replace(report, live=Live(as_of))
        if as_of is None and not self._is_over():
            return None
        told = confirm(self._look, report, self._again)
        live = told.live or Live(None)
        if as_of is not None and not live.in_motion:
            return replace(told, live=replace(live, as_of=as_of))
        if self._is_over():
            self._late += 1
            if live.confirmed or self._late == ATTEMPTS:
                return replace(told, live=replace(live, in_motion=live.in_motion + self._moved))
        self._pause()
        return None

    def _of_header(self, report: Report, as_of: float | None) -> Report | None:
        """Of an image whose header makes no sense: whether it makes none each time it is read."""
        for _ in range(ROUNDS):
            if self._is_over():
                break
            self._pause()
            if str(self._again(self._look()).error) != str(report.error):
                return None
        return replace(report, live=Live(as_of, in_motion=self._moved))


def _ranges(regions: Regions) -> tuple[np.ndarray, np.ndarray]:
    """Where metadata lies that a check reads: where each begins, and where it ends."""
    size = np.where(
        regions.structure == Structure.LUKS, np.minimum(regions.size, LUKS_BYTES), regions.size
    )
    read = regions.structure != Structure.BITMAP_DATA
    return regions.offset[read], (regions.offset + size)[read]
