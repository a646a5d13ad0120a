"""`check_image` and `propose`, each run once for the same bytes: tests repair the same often."""

from functools import lru_cache

from planner.check.check import check_image
from planner.check.report import Report
from planner.progress import Progress, tell_nobody
from planner.repair.plan import RepairTier
from planner.repair.tiers import Proposal, propose
from planner.source import Bytes, Source, read_bytes


@lru_cache(maxsize=256)
def check_bytes(content: bytes) -> Report:
    """The check of an image in memory."""
    return check_image(Bytes(content))


@lru_cache(maxsize=256)
def propose_bytes(content: bytes, tier: RepairTier) -> Proposal:
    """What a repair would do to an image in memory. Raises `RepairError`."""
    return propose(Bytes(content), check_bytes(content), tier)


def cached_check(
    source: Source,
    *,
    progress: Progress = tell_nobody,
) -> Report:
    """`planner.check.check.check_image`."""
    return check_bytes(read_bytes(source, 0, source.size))


def cached_propose(
    source: Source,
    report: Report,
    tier: RepairTier,
    *,
    can_grow: bool = True,
    progress: Progress = tell_nobody,
) -> Proposal:
    """`planner.repair.tiers.propose`, of a file."""
    assert can_grow
    return propose_bytes(read_bytes(source, 0, source.size), tier)
