"""instarfs.repair.words: the words that are taken are those that mean something."""

from instarfs.repair.words import PREVIEWS, TIERS
from planner.repair.plan import RepairTier, RescueTier


def test_they_are_those_of_the_tiers() -> None:
    assert tuple(RepairTier) == TIERS
    assert (*RepairTier, *RescueTier) == PREVIEWS
