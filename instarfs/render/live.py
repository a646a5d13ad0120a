"""What a check of an image that a program writes is to be believed for, in words and JSON.

How that is found out is told in `planner.check.live`.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime

from planner.check.report import Report
from planner.findings.kinds import FindingKind
from planner.findings.wording import plural

_LEAKS = (
    "What leaks may be in that program's caches, and not be written yet: whether anything is lost"
    " shows when it has ended."
)

_NO_REFCOUNTS = (
    "That program writes refcounts last (lazy_refcounts): they are out of date while it runs, and"
    " were not looked at."
)


def live_value(report: Report) -> dict[str, object]:
    """The keys of `result_json` about it; none where nobody wrote."""
    live = report.live
    if live is None:
        return {}
    as_of = None
    if live.as_of is not None:
        moment = datetime.fromtimestamp(live.as_of, UTC).isoformat(timespec="milliseconds")
        as_of = moment.replace("+00:00", "Z")
    return {
        "as-of": as_of,
        "in-use": report.in_use,
        "confirmed": live.confirmed,
        "in-motion": live.in_motion,
    }


def live_lines(report: Report) -> list[str]:
    """The sentences about it for a reader; none where nobody wrote."""
    live = report.live
    if live is None:
        return []
    writes = "while a program writes to it" if report.in_use else "while it was written to"
    lines = []
    if live.as_of is not None:
        lines.append(f"As of {time.strftime('%H:%M:%S', time.localtime(live.as_of))}, {writes}.")
    else:
        moved = plural(live.in_motion, "change")
        lines.append(f"Of no single moment, {writes}: {moved} of its metadata at the last look.")
    if live.confirmed:
        lines.append(
            f"Looked at again and confirmed: {plural(live.confirmed, 'finding')}. No moment between"
            " two writes of that program looks like that."
        )
    if {FindingKind.LEAK, FindingKind.LEAK_PAST_END} & report.counts().keys():
        lines.append(_LEAKS)
    if FindingKind.DIRTY_BIT in report.counts():
        lines.append(_NO_REFCOUNTS)
    return lines
