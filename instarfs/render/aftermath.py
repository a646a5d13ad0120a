"""What is known of an image beyond its check: all that a report for a reader is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from instarfs.image.surroundings import Gone, Surroundings
from instarfs.repair.outcome import Pending
from planner.guestfs.files import FilesUnknown, HitFiles
from planner.repair.plan import Plan, RepairTier
from planner.repair.tiers import Proposal
from planner.triage.beside import Beside
from planner.triage.triage import Triage

Proposals = Mapping[RepairTier, Proposal | Exception]


@dataclass(frozen=True, slots=True)
class Mounted:
    """Where an image is mounted. ``has_controls``: whether it can be repaired there, and
    ``keeps_undo``: be taken back then, if an undo file can be made. ``preview``: the plan that is
    laid over it, of which nothing is written.
    """

    directory: str
    has_controls: bool = True
    keeps_undo: bool = True
    preview: Plan | None = None


@dataclass(frozen=True, slots=True)
class Aftermath:
    """What is known beyond a check. ``proposals``: of the tiers, or why there is none.

    ``triage``: or why the leaked clusters could not be looked into. ``mounted``: if it is.
    ``gone``: that its file has no name any more. ``files``: of the guest, those that are hit.
    """

    triage: Triage | Exception = field(default_factory=Triage)
    proposals: Proposals = field(default_factory=dict)
    pending: Pending | None = None
    mounted: Mounted | None = None
    surroundings: Surroundings = field(default_factory=Surroundings)
    beside: Beside = field(default_factory=Beside)
    gone: Gone | None = None
    files: HitFiles | FilesUnknown | None = None
