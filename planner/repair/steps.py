"""Steps that the drafts of several tiers have in common, and what they are given.

Each planner sees the image as the steps before leave it, checked anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from planner.arrays import I64, is_among
from planner.check.classify import Look
from planner.check.report import Report
from planner.errors import AmbiguousCorruption
from planner.findings.kinds import FindingKind, Structure
from planner.repair.draft import Draft
from planner.repair.plan import StageKind
from planner.repair.rebuild import rebuild_refcount_structure
from planner.repair.refcounts import correct_refcounts_in_refblocks, must_rebuild
from planner.repair.scope import Scope
from planner.repair.split import Shares
from planner.source import Source
from planner.triage.triage import Triage


@dataclass(frozen=True, slots=True)
class Means:
    """How an image is looked at while a repair of it is drafted, and whether it may grow.

    ``check``: of all L2 tables, or only of those at some host offsets, see `check_image`.
    ``again``: of refcounts and flags alone, see `check_refcounts_again`.
    """

    check: Callable[[Source, I64 | None], Report]
    again: Callable[[Source, Report], Report | None]
    triage: Callable[[Scope, I64], Triage]
    can_grow: bool


@dataclass(frozen=True, slots=True)
class Drafted:
    """What a tier has drafted. ``triage``: what the leaked clusters look like.

    Of what a person has to choose: ``shares``, who had clusters in common and has no more;
    ``notes``, what it comes to, a sentence each; ``kept``, clusters that nothing refers to any
    more and that are not freed. ``gives_up``: what may be lost is freed, since nothing would speak
    for it any more.
    """

    scope: Scope
    triage: Triage
    shares: Shares = field(default_factory=Shares)
    notes: tuple[str, ...] = ()
    kept: I64 = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    gives_up: bool = False


def checked_anew(scope: Scope, means: Means) -> Scope:
    """The scope after what was drafted; the same where nothing was added."""
    return to_check_anew(scope, means)()


def to_check_anew(scope: Scope, means: Means) -> Callable[[], Scope]:
    """`checked_anew`, to be asked for once nobody holds the scope any more: its report is as large
    as the one that is made then.
    """
    if scope.draft.revision == scope.revision:
        return lambda: scope
    return partial(_checked, scope.draft, scope.end_of_used, means)


def _checked(draft: Draft, formerly_used: int, means: Means) -> Scope:
    image = draft.overlay()
    return Scope(draft, image, means.check(image, None), draft.revision, formerly_used)


class Basis:
    """A scope that drafts go on from, mostly a single one.

    Its report is as large as that of the last check: the first has it, for a further one the image
    is checked again.
    """

    def __init__(self, scope: Scope, means: Means) -> None:
        self.means = means
        self._draft, self._formerly_used = scope.draft, scope.formerly_used
        self._scope: Scope | None = scope

    def forked(self) -> Scope:
        """The scope, with a draft to go on with on its own."""
        scope, self._scope = self._scope, None
        return (scope or _checked(self._draft, self._formerly_used, self.means)).forked()


def checked_for_flags(scope: Scope, means: Means) -> Scope:
    """What `to_check_for_flags` gives."""
    return to_check_for_flags(scope, means)()


def to_check_for_flags(scope: Scope, means: Means) -> Callable[[], Scope]:
    """As `to_check_anew` for who corrects the flags that follow refcounts, and then checks anew.

    Where it is refcounts alone that were drafted, and a flag most likely follows, the check is one
    of these. As no other it proves nothing: to `checked_anew` nothing was checked.
    """
    is_enough = scope.refcounts_alone and not scope.draft.has(StageKind.SWITCH)
    if scope.draft.revision == scope.revision or not is_enough or not _flags_follow(scope.report):
        return to_check_anew(scope, means)
    image = scope.draft.overlay()
    report = means.again(image, scope.report)
    if report is None:
        return to_check_anew(scope, means)
    judged = replace(scope, source=image, report=report, refcounts_alone=False)
    return lambda: judged


def _flags_follow(report: Report) -> bool:
    """Whether flags are most likely wrong once refcounts are right: not those that only seem so,
    since a refcount is missing.
    """
    counts = report.counts()
    wrong = sum(counts.get(kind, 0) for kind in (FindingKind.L1_COPIED, FindingKind.L2_COPIED))
    return FindingKind.REFCOUNT_LOW in counts or wrong > counts.get(FindingKind.REFCOUNT_MISSING, 0)


def uncounted_to_keep(report: Report, triage: Triage) -> I64:
    """Clusters whose refcounts are lost that stay counted: what they hold may be lost too.

    Where nothing hides references, that is not so of what refcounts were in: counted, it would be
    a leak that nothing speaks for any more.
    """
    hidden = set(report.hidden)
    # Refcounts that lie past the end hide no reference.
    past_end = {kind for kind, _ in report.findings.groups if kind is FindingKind.PAST_END}
    if past_end and set(report.findings.structures(FindingKind.PAST_END)) == {Structure.REFTABLE}:
        hidden -= past_end
    if hidden:
        return triage.uncounted
    if not triage.is_buried:
        return triage.uncounted[:0]
    look = triage.look[is_among(triage.clusters, triage.uncounted)]
    of_refcounts = np.isin(look, (Look.REFBLOCK, Look.OLD_REFBLOCK, Look.REFTABLE))
    clusters = report.layout.host_clusters if report.layout else 0
    most = 1 + clusters // report.geometry.refblock_entries
    if np.count_nonzero(of_refcounts) > most:  # as many there never were
        return triage.uncounted
    return triage.uncounted[~of_refcounts]


def leaked_clusters(report: Report) -> I64:
    """All leaked clusters."""
    if report.mismatches is None:
        return np.zeros(0, dtype=np.int64)
    return report.mismatches.clusters(FindingKind.LEAK, report.counters.leaks)


def draft_refcounts(scope: Scope, stay: I64, kept: I64) -> None:
    """In place where every block that must change is sound, else anew; not of what must *stay*.

    The clusters in *kept* are counted once, though nothing refers to them.
    """
    if must_rebuild(scope, stay) and not scope.refcounts_must_stay:
        require_writable_header(scope)
        rebuild_refcount_structure(scope, stay, kept)
    else:
        correct_refcounts_in_refblocks(scope, stay, kept)


def require_writable_header(scope: Scope) -> None:
    """Raise `AmbiguousCorruption` where something else lies in the header's cluster."""
    if not scope.may_write_header:
        raise AmbiguousCorruption(
            "something else refers to the header's cluster, so that it is not written to",
            "export the disk",
            FindingKind.MULTIPLE_OWNERS.label,
        )
