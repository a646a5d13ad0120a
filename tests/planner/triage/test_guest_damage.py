"""Impact and missing places as one column, and what of it is not believed."""

import numpy as np

from planner.triage.guest_damage import GuestHarm, guest_damage, missing_places
from planner.triage.impact import Harm, Impact, Ranges
from planner.triage.losses import Cause, CauseKind, Losses
from planner.triage.triage import Triage


def ranges(*bounds: tuple[int, int]) -> Ranges:
    start, end = np.array(bounds, dtype=np.int64).reshape(-1, 2).T
    return Ranges(start, end)


def impact(size: int, **harms: Ranges) -> Impact:
    return Impact(size, {harm: harms.get(harm.name, ranges()) for harm in Harm}, is_whole=True)


def test_each_byte_has_the_worst_of_its_harms_and_what_is_not_read_is_not_believed() -> None:
    known = impact(100, LOST=ranges((10, 20)), SUSPECT=ranges((40, 50)), AT_RISK=ranges((20, 30)))
    damage = guest_damage(known, ranges((0, 45)))
    rows = zip(damage.start.tolist(), damage.end.tolist(), damage.harm.tolist(), strict=True)
    assert list(rows) == [
        (0, 10, GuestHarm.MISSING),
        (10, 20, GuestHarm.LOST),
        (20, 30, GuestHarm.AT_RISK),
        (30, 40, GuestHarm.MISSING),
        (40, 50, GuestHarm.SUSPECT),
    ]
    assert damage.unreadable.tolist() == [True, True, False, True, True]
    assert damage.doubtful.tolist() == [False, False, False, False, True]


def test_places_are_within_the_disk_and_of_the_disk_that_is_asked_about() -> None:
    causes = (
        Cause(CauseKind.EMPTY_ENTRY, l1_index=1, count=3, entries=3, coverage=10),
        Cause(CauseKind.EMPTY_ENTRY, snapshot=0, l1_index=0, count=1, entries=1, coverage=10),
        Cause(CauseKind.DAMAGED_ENTRY, what="past-end"),
    )
    triage = Triage(losses=Losses(causes=causes))
    assert list(missing_places(triage, 35).first(9)) == [(10, 25)]
    assert list(missing_places(triage, 35, 0).first(9)) == [(0, 10)]
