"""What became of a repair as JSON values: the same keys and numbers wherever they are shown.

Found, planned, repaired, left: `check/result.json`, `repair/result.json` and `instarfs check -r`
all take them from here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from instarfs.text import printable

if TYPE_CHECKING:  # a check alone loads nothing of repairs
    from instarfs.repair.outcome import Pending, RepairOutcome
    from planner.repair.tiers import Left

LISTED_SUSPECTS = 20
"""Leaked clusters that look like something lost and are named; the plan names all of them."""


def repair_value(repair: RepairOutcome) -> dict[str, object]:
    """What a repair came to, under the keys that say so everywhere."""
    return {
        "repair-incomplete": repair.error is not None,
        "tier": repair.tier.value if repair.tier else None,
        "plan-id": repair.plan_id or None,
        "found": repair.found,
        "planned": repair.planned,
        "repaired": repair.repaired,
        "left": repair.left_count,
        "left-findings": left_values(repair.left),
        "suspects": [printable(each.sentence) for each in repair.suspects[:LISTED_SUSPECTS]],
        "suspect-count": repair.suspect_count,
        "undo-file": repair.undo_file or None,
        "reason": repair.reason or None,
    }


def left_values(left: Iterable[Left]) -> list[dict[str, object]]:
    """What stays, and why."""
    return [{"kind": each.kind.label, "count": each.count, "reason": each.reason} for each in left]


def pending_value(pending: Pending) -> dict[str, object]:
    """A repair that was interrupted."""
    return {
        "message": pending.sentence,
        "undo-file": pending.undo_file,
        "tier": pending.tier.value if pending.tier else None,
        "plan-id": pending.plan_id or None,
    }
