"""What is known of one image under inspection, as values: no more than fields.

How each is computed is `instarfs.inspect.inspector`'s business, how it looks `instarfs.render`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # all that checks and repairs, which a mount loads late
    from instarfs.errors import InstarfsError
    from instarfs.image.surroundings import Gone, Surroundings
    from instarfs.repair.outcome import Pending, RepairOutcome
    from planner.check.report import Report
    from planner.errors import ImageError, PlannerError
    from planner.guestfs.files import FilesUnknown, HitFiles
    from planner.progress import Progress
    from planner.qcow2.contents import Contents
    from planner.qcow2.header import Header
    from planner.repair.plan import RepairTier
    from planner.repair.tiers import Proposal
    from planner.source import Source
    from planner.triage.beside import Beside
    from planner.triage.triage import Triage
    from planner.views.bitmap_state import BitmapStates
    from planner.views.explain import GuestExplanation


@dataclass(frozen=True, slots=True)
class Description:
    """What an image says of itself; where that makes no sense, why, and the header as it stands.

    Sizes in bytes, from the file system.
    """

    contents: Contents | ImageError
    header: Header | None
    file_size: int
    allocated_size: int


@dataclass(frozen=True, slots=True)
class Bitmaps:
    """The persistent bitmaps, or why nothing is known of them.

    ``is_written``: a program has the image open for writing, and uses those that are in use.
    """

    states: BitmapStates | ImageError
    is_written: bool


@dataclass(frozen=True, slots=True)
class Checkup:
    """The check of an image, and what is known of its repairs.

    ``repaired``: the repair that left the image as it was checked. ``pending``: one that was
    interrupted and comes first. ``gone``: that the file has no name any more.
    """

    report: Report
    repaired: RepairOutcome | None = None
    pending: Pending | None = None
    gone: Gone | None = None


@dataclass(frozen=True, slots=True)
class Leaks:
    """What a check found leaked, and what that looks like."""

    report: Report
    triage: Triage


@dataclass(frozen=True, slots=True)
class Briefing:
    """A check, and what follows from it: all that a person needs who has to decide.

    ``proposals``: of each tier, or why there is none; empty where there is nothing to repair, or
    nobody knows. ``surroundings``: what is around the image, to make files there; ``beside``: what
    the check did without. ``files``: those of the guest that are hit.
    """

    checkup: Checkup
    triage: Triage | InstarfsError
    proposals: dict[RepairTier, Proposal | InstarfsError | PlannerError]
    surroundings: Surroundings
    beside: Beside
    files: HitFiles | FilesUnknown | None = None


@dataclass(frozen=True, slots=True)
class GuestByte:
    """The way to a byte of the guest's disk, and whose it is there, where there is a way."""

    way: GuestExplanation | ImageError
    owner: HitFiles | FilesUnknown | None = None


class Check(Protocol):
    """`planner.check.check.check_image`, or what stands in for it in a test."""

    def __call__(self, source: Source, *, progress: Progress) -> Report: ...
