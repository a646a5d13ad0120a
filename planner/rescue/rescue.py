"""What a rescue brings back, as one value: what was found, the plan, and the proof of it.

What is lost is found elsewhere in `planner.rescue`; here it becomes stages in an order of which no
crash leaves an image that reads otherwise than before or after.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from planner.check.check import check_image
from planner.check.report import Report
from planner.errors import HeaderUnknown
from planner.progress import Progress, tell_nobody
from planner.qcow2.header import FEATURES_AT, Header, Incompatible
from planner.repair.draft import Draft
from planner.repair.plan import Plan, RescueTier, StageKind
from planner.rescue.headers import Found, Hypothesis, find_headers
from planner.source import SECTOR, Source


@dataclass(frozen=True, slots=True)
class Placement:
    """A lost L2 table, and where it belongs.

    ``offset``: of the table in the file, bytes. ``l1_index``: the entry that is to lead there; of
    one that is not ``placed`` the likeliest, -1 where nothing speaks for any. ``evidence``: what
    says so; ``votes_for``, ``votes_against``: how often, and how often otherwise.
    """

    offset: int
    l1_index: int
    evidence: tuple[str, ...]
    votes_for: int
    votes_against: int
    placed: bool


@dataclass(frozen=True, slots=True, eq=False)
class Rescue:
    """What was found of an image, and what puts it back.

    ``headers``: what was found of the header. ``placements``: every table that no entry leads to.
    ``before``, ``after``: the checks without and with the ``plan``.
    """

    plan: Plan
    headers: Found
    before: Report
    after: Report
    placements: tuple[Placement, ...] = ()

    @property
    def placed(self) -> int:
        """How many tables have a place now."""
        return sum(each.placed for each in self.placements)

    @property
    def count(self) -> int:
        """How many things come back: a header, and tables that were placed."""
        return self.changes_header + self.placed

    @property
    def changes_header(self) -> bool:
        """Whether another header was found."""
        best = self.headers.best
        return best is not None and bool(best.changed)


def rescue(
    source: Source,
    *,
    assumed: Mapping[str, int] | None = None,
    like: Header | None = None,
    can_grow: bool = True,
    progress: Progress = tell_nobody,
) -> Rescue:
    """What *source* lost, and the plan that puts it back; changes nothing.

    *assumed*, *like*: as `find_headers` takes them. *can_grow*: whether the image may become
    longer. Raises `HeaderUnknown` where no header is believed.
    """
    before = check_image(source, progress=progress)
    headers = find_headers(source, assumed=assumed, like=like, progress=progress)
    best = headers.best
    if best is None:
        raise HeaderUnknown(_why(headers), _WAYOUT)
    draft = Draft(source, can_grow=can_grow)
    if best.changed:
        draft_header(draft, best, before)
    plan = draft.plan(RescueTier.RESCUE)
    return Rescue(plan, headers, before, before if plan.changes_nothing else best.report)


def draft_header(draft: Draft, header: Hypothesis, before: Report) -> None:
    """The bytes of *header*, with the sector last that makes it an image, or another one, at once.

    One that can be read as it is, by *before*, is marked corrupt while it has parts of both.
    """
    fields, rest = header.content[:SECTOR], header.content[SECTOR:]
    if rest:
        if before.layout is not None and before.layout.header.version >= 3:
            bits = before.layout.header.incompatible_features | int(Incompatible.CORRUPT)
            draft.write(StageKind.GUARD, FEATURES_AT, bits.to_bytes(8, "big"))
        draft.write(StageKind.PREPARE, SECTOR, rest)
    draft.write(StageKind.SWITCH, 0, fields)


_WAYOUT = (
    "nothing was written: name what you know of it with --assume FIELD=VALUE, or an image that was"
    " made in the same way with --header"
)


def _why(found: Found) -> str:
    if not found.hypotheses:
        return "no header was found under which its tables make sense"
    best, rival = found.hypotheses[0], found.rival
    if rival is None or best.score[0]:
        return "under no header that was tried its tables can all be read"
    return f"several headers are as likely: the best two leave {best.wrong} and {rival.wrong} wrong"
