"""A tier's planners joined into one proposal, and the proof that it keeps its promise.

Each planner sees the image as the ones before it leave it, checked anew. Nothing is proposed that
the proof does not bear out.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from planner.arrays import I64, is_among, union
from planner.check.check import check_image
from planner.check.refcounts_again import check_refcounts_again
from planner.check.report import RepairCounters, Report
from planner.errors import AmbiguousCorruption, ParseFailed, UnsupportedRepair
from planner.findings.kinds import KINDS, FindingKind, Severity
from planner.findings.wording import plural
from planner.progress import Progress, tell_nobody
from planner.repair.autoclear import clear_unknown_autoclear
from planner.repair.choices import CHOICES, choices_for, is_promise_kept
from planner.repair.copied import (
    stuck_targets,
    unfollowed_targets,
    update_copied_flags_for_l1,
)
from planner.repair.draft import Draft
from planner.repair.entries import (
    clear_copied_of_compressed,
    clear_reserved_bits,
    make_plain_zero,
)
from planner.repair.flags import foresee_flags, settle_flags
from planner.repair.plan import DETERMINED, Plan, RepairTier
from planner.repair.proof import require_proof
from planner.repair.put_back import put_back_blocks
from planner.repair.refcounts import (
    DAMAGED_STRUCTURE,
    must_rebuild,
    reclaim_leaks_in_refblocks,
)
from planner.repair.scope import Scope
from planner.repair.snapshot_table import has_no_snapshots, rewrite_snapshot_table
from planner.repair.split import Shares, shared_by
from planner.repair.steps import (
    Drafted,
    Means,
    checked_anew,
    checked_for_flags,
    draft_refcounts,
    leaked_clusters,
    to_check_anew,
    uncounted_to_keep,
)
from planner.source import Source
from planner.triage.triage import Suspect, Triage, triage_leaks

TABLES_NAMED = 3
"""Tables that look lost that a refusal names."""

_GIVEN_UP = "with the rest mended nothing speaks for what leaks any more, so that it is freed"

_MENDED = frozenset(kind for kind, info in KINDS.items() if info.tier)
"""What `all` mends."""

MAX_DRAFTS = 4
"""Drafts of a plan: what one shows not to work, the next leaves alone."""


@dataclass(frozen=True, slots=True)
class Left:
    """Findings that stay after a repair, and why."""

    kind: FindingKind
    count: int
    reason: str


@dataclass(frozen=True, slots=True)
class Proposal:
    """A plan with its reason and its proof.

    ``before``: the check that it was made from. ``after``: the check of the image with the plan
    laid on it. ``triage``: what the leaked clusters look like. ``kept``: clusters whose refcounts
    are lost, that are counted again since they may be evidence, or that a choice ceases to refer to
    and does not free. ``shares``: who had clusters in common and has no more. ``notes``: what a
    choice comes to, or what `all` leaves no trace of, a sentence each. ``gives_up``: `all` frees
    what may be left of something lost, since in the image as it mends it nothing would speak for
    that any more.
    """

    tier: RepairTier
    plan: Plan
    before: Report
    after: Report
    triage: Triage
    left: tuple[Left, ...]
    kept: int = 0
    shares: Shares = field(default_factory=Shares)
    notes: tuple[str, ...] = ()
    gives_up: bool = False

    def in_brief(self) -> Proposal:
        """The same to who shows it: of the check after it no more is held than what it came to."""
        return replace(self, after=self.after.in_brief())

    @property
    def suspects(self) -> tuple[Suspect, ...]:
        """Leaked clusters that look like something lost."""
        return self.triage.suspects

    @property
    def found(self) -> int:
        """How many things there are to mend or to keep: what the check finds, and what is kept."""
        return total(self.before) + self.kept

    @property
    def left_count(self) -> int:
        """How many of them stay."""
        return total(self.after)

    @property
    def planned(self) -> int:
        """How many of them the plan mends."""
        return self.found - self.left_count

    @property
    def has_something_to_say(self) -> bool:
        """Whether it changes anything, or should and cannot; a tier that nobody needs has not."""
        return not self.tier.is_chosen or not (self.plan.changes_nothing and self.complete)

    @property
    def complete(self) -> bool:
        """Whether the tier's promise is kept in full: no leaks, nothing at all left, or nothing of
        what it was chosen for.
        """
        if self.tier is RepairTier.LEAKS:
            return not self.after.counters.leaks
        if self.tier.is_chosen:
            return is_promise_kept(self.tier, self.after)
        return not self.left_count

    @property
    def needs_quote(self) -> bool:
        """Whether its id must be quoted: something may be lost, and who repairs must know.

        `all` frees nothing of that, as long as something speaks for it; a cluster that an entry has
        lost it leaves, and names. What the image does not determine somebody has to have read.
        """
        if self.tier.is_chosen:
            return not self.plan.changes_nothing
        if self.tier is RepairTier.ALL:
            return self.triage.is_table_lost or self.gives_up or bool(self.notes)
        return self.triage.is_evidence and not self.plan.changes_nothing

    @property
    def warnings(self) -> list[str]:
        """Why the id must be quoted, a line each; empty where it need not be."""
        if self.tier.is_chosen:
            return list(self.notes) if self.needs_quote else []
        if not self.needs_quote:
            return []
        given_up = [_GIVEN_UP] if self.gives_up else []
        return [*self.triage.warnings(TABLES_NAMED), *self.notes, *given_up]

    @property
    def counters(self) -> RepairCounters:
        """What it mends, by sort."""
        before, after = self.before.counts(), self.after.counts()
        refcounts = (FindingKind.REFCOUNT_LOW, FindingKind.REFCOUNT_MISSING)
        mended = {kind: max(0, before[kind] - after.get(kind, 0)) for kind in before}
        leaks = mended.get(FindingKind.LEAK, 0)
        wrong = sum(mended.get(kind, 0) for kind in refcounts)
        return RepairCounters(leaks, wrong, self.planned - leaks - wrong, not self.complete)


def total(report: Report) -> int:
    """How many things a repair could be about: all findings but notices that none mends."""
    return sum(
        number
        for kind, number in report.counts().items()
        if KINDS[kind].tier or KINDS[kind].severity > Severity.NOTICE
    )


def tiers_for(report: Report) -> tuple[RepairTier, ...]:
    """The tiers that may have something to do: the two that know what is right first."""
    if not is_repairable(report):
        return ()
    return (*DETERMINED, *choices_for(report))


def is_repairable(report: Report) -> bool:
    """Whether there is anything that a plan could be about, and the check bears one."""
    return report.error is None and not report.torn and bool(total(report))


def same_outcome(one: Report, other: Report) -> bool:
    """Whether two checks say the same: every counter, and how often each kind occurs."""
    return one.counters == other.counters and one.counts() == other.counts()


def propose(
    source: Source,
    report: Report,
    tier: RepairTier,
    *,
    can_grow: bool = True,
    triage: Triage | None = None,
    progress: Progress = tell_nobody,
) -> Proposal:
    """What a repair would do to an image whose check gave *report*, proven on an overlay.

    *can_grow*: whether the image may become longer. *triage*: of it as it is, where that is known.
    *progress*: of each check, and of that. Raises a `RepairError` where the tier refuses.
    """
    known = triage

    def check(image: Source, only: I64 | None) -> Report:
        return check_image(image, progress=progress, only=only)

    def look(scope: Scope, ignored: I64) -> Triage:
        nonlocal known
        if scope.report is report and known is not None:
            return known
        found = triage_leaks(scope.source, scope.report, ignored=ignored, progress=progress)
        known = found if scope.report is report else known
        return found

    _require_sound_basis(report)

    def again(image: Source, last: Report) -> Report | None:
        return check_refcounts_again(image, last, progress=progress)

    means = Means(check, again, look, can_grow)
    drafted = _draft_tier(source, report, tier, means)
    scope, triage = drafted.scope, drafted.triage
    if tier is RepairTier.ALL or (tier.is_chosen and not scope.draft.is_empty):
        settle_flags(scope, report)
    clear_unknown_autoclear(scope)
    plan, proof = scope.draft.plan(tier), to_check_anew(scope, means)
    spared, shares = union(drafted.kept, triage.uncounted), drafted.shares
    notes, gives_up = drafted.notes, drafted.gives_up
    del scope, drafted  # The draft is as large as the plan that it has become.
    after = proof().report
    del proof
    kept = int(is_among(leaked_clusters(after), spared).sum())
    left = _left(tier, after, triage)
    proposal = Proposal(
        tier,
        plan,
        report,
        after,
        triage,
        left,
        kept,
        shares=shares,
        notes=notes,
        gives_up=gives_up,
    )
    require_proof(source, plan, report, after, kept=kept)
    return proposal


def _require_sound_basis(report: Report) -> None:
    if report.error is not None:
        raise ParseFailed(
            f"the header cannot be interpreted: {report.error}",
            "everything follows from the header: `instarfs rescue` looks for what it said",
        )
    if report.torn:
        raise AmbiguousCorruption("the image changed while it was checked", "stop its writer first")


@dataclass(frozen=True, slots=True)
class _Begun:
    """What all drafts of a plan have in common.

    ``stay``: clusters that leak and keep their refcounts. ``kept``: clusters without one that are
    counted again. ``shown``: those that leak by refcounts that could not be looked up before.
    """

    scope: Scope
    triage: Triage
    stay: I64
    kept: I64
    shown: I64 = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


def _draft_tier(source: Source, report: Report, tier: RepairTier, means: Means) -> Drafted:
    """A tier's draft, repeated without the refcounts that COPIED flags could not follow.

    What only clears reserved bits makes no flag wrong, and comes with the flags.
    """
    first = Scope(Draft(source, can_grow=means.can_grow), source, report)
    if tier.is_chosen:
        return _draft_choice(first, tier, means)
    begun = _BEGIN[tier](first, means)
    del first
    scope = _draft_determined(begun, report, tier, means)
    if not begun.triage.is_buried or _speaks_still(begun, scope, means):
        return _with_notes(begun, Drafted(scope, begun.triage, kept=begun.shown))
    del scope
    nothing = np.zeros(0, dtype=np.int64)
    begun = replace(begun, stay=nothing, kept=nothing)
    scope = _draft_determined(begun, report, tier, means)
    return _with_notes(begun, Drafted(scope, begun.triage, gives_up=True))


def _with_notes(begun: _Begun, drafted: Drafted) -> Drafted:
    """With what the old refcounts told, and new ones do not: a sentence each.

    That the file was cut off; and that something reads refcounts in place of its own.
    """
    before, after = begun.scope, drafted.scope
    if after.report is before.report:
        return drafted
    kind = FindingKind.LEAK_PAST_END
    is_gone = kind not in after.report.counts()
    lost = int(before.report.findings.of(kind).found.sum()) if is_gone else 0
    shares = _no_longer_shared(before, after)
    number = len(shares.clusters)
    of_loss = (
        f"{plural(lost, 'cluster')} behind the end of the file {'is' if lost == 1 else 'are'}"
        " counted, of a table that is lost: nothing will show it any more"
    )
    of_shares = (
        f"{plural(number, 'cluster')} of refcounts {'is' if number == 1 else 'are'} something"
        " else's too, which reads wrong bytes there: with refcounts made anew elsewhere it keeps"
        " the place, and nothing will show it any more"
    )
    notes = (*([of_loss] if lost else []), *([of_shares] if number else []))
    return replace(drafted, shares=shares.with_refcounts_anew(), notes=notes)


def _no_longer_shared(before: Scope, after: Scope) -> Shares:
    """Who had a cluster in common with refcounts, which lie elsewhere now."""
    if not before.refcounts_are_shared:
        return Shares()
    shares = shared_by(before.report).without(shared_by(after.report).clusters)
    return shares.select(np.flatnonzero(is_among(shares.owners.cluster, before.shared_refcounts)))


def _draft_determined(begun: _Begun, report: Report, tier: RepairTier, means: Means) -> Scope:
    """Refcounts, and what follows them; anew where a flag cannot, which is mostly known before all
    is checked.
    """
    settle, follow = _STEPS[tier]
    left, stay = MAX_DRAFTS, np.zeros(0, dtype=np.int64)
    while True:
        left -= 1
        scope = settle(begun, report, stay)
        more = union(stay, stuck_targets(report, scope, means.check))
        if len(more) == len(stay) or not left:
            scope = follow(checked_for_flags(scope, means), report, means)
            more = union(stay, unfollowed_targets(report, scope))
        if len(more) == len(stay) or not left:
            return scope
        stay = more
        del scope  # The draft may be large, and the next is as large.


def _speaks_still(begun: _Begun, scope: Scope, means: Means) -> bool:
    """Whether what leaks and may be lost looks so in the image as it is mended, too.

    Where not, to keep it would only leave it to the next repair, which would free it unasked.
    """
    keeps = len(begun.stay) > 0 or len(begun.kept) > 0
    if not keeps or scope.report is begun.scope.report or not scope.report.counters.leaks:
        return True
    nothing = np.zeros(0, dtype=np.int64)
    return not scope.report.complete or means.triage(scope, nothing).is_buried


def _draft_choice(first: Scope, tier: RepairTier, means: Means) -> Drafted:
    """The draft of a tier that a person chooses, repeated like the others."""
    settle, stay = CHOICES[tier](first, means), np.zeros(0, dtype=np.int64)
    for _ in range(MAX_DRAFTS - 1):
        drafted = settle(stay)
        more = union(stay, unfollowed_targets(first.report, drafted.scope))
        if len(more) == len(stay):
            return drafted
        stay = more
        del drafted
    return settle(stay)


def _begin_leaks(scope: Scope, means: Means) -> _Begun:
    nothing = np.zeros(0, dtype=np.int64)
    triage = means.triage(scope, nothing)
    if scope.report.counters.leaks:
        _require_known_leaks(scope.report)
    return _Begun(scope, triage, nothing, nothing)


def _settle_leaks(begun: _Begun, before: Report, stay: I64) -> Scope:
    scope = begun.scope.forked()
    if before.counters.leaks:
        reclaim_leaks_in_refblocks(scope, stay)
    return replace(scope, refcounts_alone=True)


def _follow_leaks(scope: Scope, _before: Report, means: Means) -> Scope:
    if scope.report.complete:
        # Lowered to one reference, an entry gets its COPIED flag back.
        update_copied_flags_for_l1(scope, settled=True)
    return checked_anew(scope, means)


def _require_known_leaks(report: Report) -> None:
    """Raise where a cluster may be in use that seems leaked, or its refcount cannot be lowered."""
    if not report.complete:
        raise AmbiguousCorruption(
            "a table that could refer to the leaked clusters cannot be read, so that they are not"
            " proven to be free",
            "the report of the check names it",
            report.hidden[0].label,
        )
    counts = report.counts()
    damaged = [kind.label for kind in DAMAGED_STRUCTURE if kind in counts]
    if damaged:
        raise UnsupportedRepair(
            "the refcount structure itself is damaged", "the tier `all` rebuilds it", damaged[0]
        )


def _begin_all(scope: Scope, means: Means) -> _Begun:
    before = scope.report
    _require_plain_header(scope)
    if has_no_snapshots(scope):  # what seems to be their table lies over all that follows
        rewrite_snapshot_table(scope)
        scope = checked_anew(scope, means)
    make_plain_zero(scope)
    scope = checked_anew(scope, means)
    if scope.may_write_header:
        rewrite_snapshot_table(scope)
        scope = checked_anew(scope, means)
    scope, shown = _with_blocks_put_back(scope, means)
    # Leaks are lowered only where that buries nothing: `leaks`, its plan id quoted, does the rest.
    # What the repair itself ceased to refer to is no such leak: that reference was known.
    triage = means.triage(scope, _leaked_since(scope, before, shown))
    if _is_cut(scope, before):
        _require_shown_loss(triage)
    stay = np.zeros(0, dtype=np.int64)
    if triage.is_buried or not scope.report.complete:
        stay = leaked_clusters(before)
        if scope.report is not before:
            stay = union(stay, shown)
            stay = stay[is_among(stay, leaked_clusters(scope.report))]
    clear_copied_of_compressed(scope)  # of which nothing that refcounts say depends
    return _Begun(scope, triage, stay, uncounted_to_keep(scope.report, triage), shown)


def _with_blocks_put_back(scope: Scope, means: Means) -> tuple[Scope, I64]:
    """With the refcount table as it was, where no other may be made; and what leaks by that."""
    nothing = np.zeros(0, dtype=np.int64)
    if scope.may_grow_for_refcounts or scope.refcounts_are_shared:
        return scope, nothing
    if not must_rebuild(scope, nothing):
        return scope, nothing
    put_back_blocks(scope)
    after = checked_anew(scope, means)
    if after is scope:
        return scope, nothing
    return after, np.setdiff1d(leaked_clusters(after.report), leaked_clusters(scope.report))


def _leaked_since(scope: Scope, before: Report, shown: I64) -> I64:
    """What leaks by now, and did not: but for what was only *shown* to."""
    if scope.report is before:  # of millions, to list them takes a quarter of all memory
        return np.zeros(0, dtype=np.int64)
    leaked = leaked_clusters(scope.report)
    return leaked[~is_among(leaked, union(leaked_clusters(before), shown))]


def _settle_all(begun: _Begun, before: Report, stay: I64) -> Scope:
    scope = begun.scope.forked()
    # Flags of compressed entries change nothing but what a table looks like that is gone.
    is_alone = scope.draft.revision == scope.revision
    is_alone |= FindingKind.TABLE_OVERWRITTEN not in scope.report.counts()
    draft_refcounts(scope, union(stay, begun.stay), begun.kept)
    foresee_flags(scope, before, _MENDED)
    return replace(scope, refcounts_alone=is_alone)


def _follow_all(scope: Scope, before: Report, means: Means) -> Scope:
    update_copied_flags_for_l1(scope)
    clear_reserved_bits(scope)
    # Of refcounts that are right already nothing was drafted, and so nothing foreseen.
    foresee_flags(scope, before, _MENDED)
    return checked_anew(scope, means)


def _is_cut(scope: Scope, before: Report) -> bool:
    """Whether entries are cut off that were no zeros: what leaks may be what they listed."""
    was = before.layout.header.nb_snapshots if before.layout else 0
    return not before.complete and scope.layout.header.nb_snapshots < was


def _require_shown_loss(triage: Triage) -> None:
    """Raise where leaked clusters hold data of snapshots that are cut off, and do not look so.

    With nothing to show that they are lost, they would be freed.
    """
    if triage.losses.data and not triage.is_evidence:
        raise AmbiguousCorruption(
            "entries of the snapshot table are none, and leaked clusters that hold data may be"
            " what they listed",
            "export the disk",
            FindingKind.CHECK_STOPPED.label,
        )


_BEGIN = {RepairTier.LEAKS: _begin_leaks, RepairTier.ALL: _begin_all}
"""Of each tier: what all drafts begin with."""

_STEPS = {
    RepairTier.LEAKS: (_settle_leaks, _follow_leaks),
    RepairTier.ALL: (_settle_all, _follow_all),
}
"""What follows in each draft: refcounts, and then, checked anew, flags and what comes last."""


def _require_plain_header(scope: Scope) -> None:
    report, header = scope.report, scope.layout.header
    is_there = header.nb_snapshots and header.snapshots_offset < scope.geometry.cluster_size
    if is_there and not has_no_snapshots(scope):
        raise AmbiguousCorruption(
            "the snapshot table is said to lie in the header's cluster: that is not written to",
            "export the disk",
            FindingKind.CHECK_STOPPED.label,
        )
    if report.owners.truncated:
        raise AmbiguousCorruption(
            "more clusters have two owners than can be listed",
            "export the disk",
            FindingKind.MULTIPLE_OWNERS.label,
        )


def _left(tier: RepairTier, after: Report, triage: Triage) -> tuple[Left, ...]:
    """What stays, worst first, each kind with its reason."""
    left = []
    for kind, number in sorted(after.counts().items(), key=lambda item: -KINDS[item[0]].severity):
        info = KINDS[kind]
        if not info.tier and info.severity is Severity.NOTICE:
            continue
        left.append(Left(kind, number, _reason(tier, kind, after, triage)))
    return tuple(left)


_NOT_SPLIT = (
    "its owners have to stay where they are (the header, encrypted data, bitmaps, what leads to it"
    " was overwritten), or it is more than one repair copies: then `split` goes on the next time"
)


def _reason(tier: RepairTier, kind: FindingKind, after: Report, triage: Triage) -> str:
    info = KINDS[kind]
    is_leak = kind is FindingKind.LEAK
    for applies, reason in (
        (tier is RepairTier.SPLIT and kind is FindingKind.MULTIPLE_OWNERS, _NOT_SPLIT),
        (bool(info.left), info.left),
        (
            tier not in {RepairTier.ALL, info.tier} and bool(info.tier),
            f"the tier `{tier}` leaves it; `{info.tier}` looks at this",
        ),
        (
            is_leak and not after.complete,
            "a table that could refer to these clusters cannot be read",
        ),
        (
            is_leak and triage.is_buried,
            "something among them may be lost; `leaks` with its plan id reclaims them",
        ),
        (kind in (FindingKind.CORRUPT_BIT, FindingKind.DIRTY_BIT), "the image is not clean"),
        (
            FindingKind.TABLE_OVERWRITTEN in after.counts(),
            "it lies in a table that was overwritten, whose words may be somebody's data",
        ),
        (
            FindingKind.MULTIPLE_OWNERS in after.counts(),
            "it lies in, or leads to, a cluster with two owners, which is not written to",
        ),
    ):
        if applies:
            return reason
    return "what it should be is not determined by the rest of the image"
