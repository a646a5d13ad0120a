"""What is wrong with a guest's disk as one column of ranges: each byte with the worst of its harms.

From the impact of a check, and from the places that something may be missing from.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from planner.arrays import I64, join_ranges
from planner.findings.kinds import ACTIVE
from planner.guestfs.files import Damage
from planner.guestfs.overlaps import Rest, overlaps
from planner.triage.impact import Harm, Impact, Ranges
from planner.triage.l1_holes import PlaceKind
from planner.triage.losses import CauseKind
from planner.triage.triage import Triage


class GuestHarm(IntEnum):
    """As `Harm`, and what reads as if it had never been written, where something may be missing."""

    LOST = Harm.LOST
    SUSPECT = Harm.SUSPECT
    AT_RISK = Harm.AT_RISK
    MISSING = 3


_EMPTY = (
    CauseKind.EMPTY_TABLE,
    CauseKind.EMPTY_PART,
    CauseKind.EMPTY_ENTRY,
    CauseKind.OVERWRITTEN_TABLE,
)
"""What leaked data may have come from, where that is a place on the disk."""


def missing_places(triage: Triage, size: int, snapshot: int = ACTIVE) -> Ranges:
    """Ranges that a lost table may have mapped, or leaked data may have come from.

    What in them is mapped is not missing: only the mapping can tell.
    """
    found = [
        (place.l1_index, place.count, place.coverage)
        for table in triage.suspects
        for place in table.places
        if place.snapshot == snapshot and place.kind in (PlaceKind.EMPTY, PlaceKind.DAMAGED)
    ]
    found += [
        (cause.l1_index, cause.count, cause.coverage)
        for cause in triage.losses.causes
        if cause.snapshot == snapshot and cause.kind in _EMPTY and cause.l1_index >= 0
    ]
    rows = np.array(found, dtype=np.int64).reshape(-1, 3)
    start = np.minimum(rows[:, 0] * rows[:, 2], size)
    end = np.minimum(start + rows[:, 1] * rows[:, 2], size)
    some = start < end
    return Ranges(*join_ranges(start[some], end[some]))


def guest_damage(impact: Impact, missing: Ranges) -> Damage:
    """All that is wrong with a disk. *missing*: what of the places of that name is not mapped."""
    harmed_start, harmed_end = _all_of(impact)
    left = Rest(missing.start, missing.end)
    over = overlaps(harmed_start, harmed_end, missing.start, missing.end)
    left.take(over.start, over.end)
    missing_start, missing_end = left.left()
    start = [missing_start, *(ranges.start for ranges in impact.ranges.values())]
    end = [missing_end, *(ranges.end for ranges in impact.ranges.values())]
    harms = [GuestHarm.MISSING, *(GuestHarm(harm) for harm in impact.ranges)]
    harm = np.repeat(
        np.array(harms, dtype=np.uint8), np.array([len(each) for each in start], dtype=np.int64)
    )
    starts, ends = np.concatenate(start), np.concatenate(end)
    order = np.argsort(starts, kind="stable")
    harm = harm[order]
    return Damage(
        starts[order],
        ends[order],
        harm,
        unreadable=harm != GuestHarm.AT_RISK,
        doubtful=harm == GuestHarm.SUSPECT,
    )


def _all_of(impact: Impact) -> tuple[I64, I64]:
    nothing = np.zeros(0, dtype=np.int64)
    return join_ranges(
        np.concatenate([nothing, *(ranges.start for ranges in impact.ranges.values())]),
        np.concatenate([nothing, *(ranges.end for ranges in impact.ranges.values())]),
    )
