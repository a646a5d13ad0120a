"""What a rescue brings back, as one value: what was found, the plan, and the proof of it.

What is lost is found elsewhere in `planner.rescue`; here it becomes stages in an order of which no
crash leaves an image that reads otherwise than before or after: the header first, if that is gone;
then the tables that no entry leads to; then refcounts that are lost, too, by the census of what was
put back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from planner.check.check import check_image
from planner.check.report import Report
from planner.errors import AmbiguousCorruption, HeaderUnknown, RepairError
from planner.findings.kinds import FindingKind, Structure
from planner.progress import Progress, tell_nobody
from planner.qcow2 import entries
from planner.qcow2.header import FEATURES_AT, Header, Incompatible
from planner.qcow2.snapshots import Snapshot
from planner.repair.draft import Draft
from planner.repair.overlay import Overlay
from planner.repair.plan import Edit, Plan, RepairTier, RescueTier, StageKind
from planner.repair.tiers import propose
from planner.rescue.bare import Bare, find_bare
from planner.rescue.disk_size import DiskSize, disk_size
from planner.rescue.headers import Found, Hypothesis, find_headers, mapping_all
from planner.rescue.placing.place import Placed, Placement, find_placements
from planner.rescue.snapshots import plan_snapshots
from planner.source import SECTOR, Source, read_bytes, read_tables

_LOST_REFCOUNTS = (
    FindingKind.REFCOUNT_MISSING,
    FindingKind.REFCOUNT_LOW,
    FindingKind.REFCOUNT_UNREADABLE,
    FindingKind.L1_COPIED,
    FindingKind.L2_COPIED,
)


@dataclass(frozen=True, slots=True, eq=False)
class Rescue:
    """What was found of an image, and what puts it back.

    ``headers``: what was found of the header. ``placements``: every table that no entry leads to,
    by its place in the file. ``holes``: L1 indices that such a table may belong to, and that cannot
    be read until somebody knows. ``snapshots``: those that are listed again. ``larger``: the disk
    that is mapped, where that is more than its header says. ``before``, ``after``: the checks
    without and with the ``plan``.
    """

    plan: Plan
    headers: Found
    before: Report
    after: Report
    placements: tuple[Placement, ...] = ()
    holes: tuple[int, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    larger: DiskSize | None = None

    @property
    def placed(self) -> int:
        """How many tables have a place now."""
        return sum(each.placed for each in self.placements)

    @property
    def count(self) -> int:
        """How many things come back: a header, tables that were placed, snapshots."""
        return self.changes_header + self.placed + len(self.snapshots)

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
    free: bool = False,
    can_grow: bool = True,
    progress: Progress = tell_nobody,
) -> Rescue:
    """What *source* lost, and the plan that puts it back; changes nothing.

    *assumed*, *like*: as `find_headers` takes them. *free*: whether tables are looked for in free
    clusters too, as they are left where refcounts were made anew. *can_grow*: whether the image may
    become longer. Raises `HeaderUnknown` where no header is believed, another `RepairError` where
    what was found does not bear a plan.
    """
    before = check_image(source, progress=progress)
    means = _Means(free=free, can_grow=can_grow, progress=progress)
    listed = None if assumed or like else _listed_again(source, before, means)
    if listed is not None:
        image = Overlay(source, listed.plan)
        # Under this header its snapshots were found: no other is looked for.
        found = _found(image, listed.after, assumed, like, means, is_believed=True)
        plan = _in_order(source, _then(listed.plan, found.plan), before)
        return replace(found, plan=plan, before=before, snapshots=listed.snapshots)
    found = _found(source, before, assumed, like, means)
    if not found.changes_header:
        return replace(found, larger=_larger(source, before))
    listed = _listed_again(Overlay(source, found.plan), found.after, means)
    if listed is None:
        return found
    plan = _in_order(source, _then(found.plan, listed.plan), before)
    return replace(found, plan=plan, after=listed.after, snapshots=listed.snapshots)


def _larger(source: Source, report: Report) -> DiskSize | None:
    if report.layout is None or FindingKind.BEYOND_DISK_END not in report.counts():
        return None
    return disk_size(source, mapping_all(report.layout.header))


@dataclass(frozen=True, slots=True)
class _Means:
    """How it is looked for: in free clusters too, whether the image may grow, whom to tell how far
    that is.
    """

    free: bool
    can_grow: bool
    progress: Progress


@dataclass(frozen=True, slots=True)
class _Listed:
    """What lists lost snapshots again, refcounts included, and the check of it."""

    plan: Plan
    after: Report
    snapshots: tuple[Snapshot, ...]


def _listed_again(source: Source, report: Report, means: _Means) -> _Listed | None:
    """The snapshots that the table lost; None where none are, or not without new damage."""
    can_grow, progress = means.can_grow, means.progress
    step = plan_snapshots(source, report, can_grow=can_grow, progress=progress)
    if step is None:
        return None
    plan, snapshots = step
    after = check_image(Overlay(source, plan), progress=progress)
    plan, after = _with_refcounts(source, plan, after, can_grow=can_grow, progress=progress)
    was = report.counts()
    more = [kind for kind, number in after.counts().items() if number > was.get(kind, 0)]
    return None if more else _Listed(plan, after, snapshots)


def _found(
    source: Source,
    before: Report,
    assumed: Mapping[str, int] | None,
    like: Header | None,
    means: _Means,
    *,
    is_believed: bool = False,
    may_be_bare: bool = True,
) -> Rescue:
    """The header and the tables, of an image of which *before* is the check.

    *is_believed*: whether the header is that which is there. *may_be_bare*: whether the L1 table
    may be gone with the header.
    """
    can_grow, progress = means.can_grow, means.progress
    tables = None if assumed or like else _tables_under(source, before, means)
    draft = Draft(source, can_grow=can_grow)
    if (is_believed or tables is not None) and before.layout is not None:
        # With a header under which tables are found there is nothing wrong but that.
        header = before.layout.header
        headers, report = Found(header, [Hypothesis(header, b"", before.counters, ())]), before
    else:
        is_known = bool(assumed) or like is not None or before.error is None
        bare = None if is_known or not may_be_bare else find_bare(source, progress)
        headers, size = _find_headers(source, bare, assumed, like, progress)
        best = headers.best
        if best is None or (size > source.size and not can_grow):
            raise HeaderUnknown(_why(headers), _WAYOUT)
        report, draft.size = before, max(size, source.size)
        if best.changed:
            draft_header(draft, best, before)
            report = check_image(draft.overlay(), progress=progress)
            tables = _tables_under(draft.overlay(), report, means)
    if tables is not None:
        tables = _without_contested(tables)
    placements = tables.placements if tables is not None else ()
    if tables is None or not any(each.placed for each in placements):
        if draft.size > source.size:
            # Without a table it was not there to be found, or else it is.
            return _found(source, before, assumed, like, means, may_be_bare=False)
        return Rescue(draft.plan(RescueTier.RESCUE), headers, before, report, placements)
    _draft_l1(draft, tables)
    plan = draft.plan(RescueTier.RESCUE)
    plan, holes, after = _settled(source, plan, tables, can_grow=can_grow, progress=progress)
    result = Rescue(_in_order(source, plan, before), headers, before, after, placements, holes)
    _require_proof(result, report)
    return result


def _find_headers(
    source: Source,
    bare: Bare | None,
    assumed: Mapping[str, int] | None,
    like: Header | None,
    progress: Progress,
) -> tuple[Found, int]:
    """What the header may have been, and how long the file is under it.

    Where nothing is left of the L1 table either, one is made, and a header that leads to it.
    """
    if bare is not None and not bare.has_l1:
        return bare.found, bare.end
    found = find_headers(source, assumed=assumed, like=like, progress=progress)
    return found, source.size


def _settled(
    source: Source, plan: Plan, tables: Placed, *, can_grow: bool, progress: Progress
) -> tuple[Plan, tuple[int, ...], Report]:
    """*plan* with refcounts that agree with it, the L1 indices that stay open, and its check."""
    after = check_image(Overlay(source, plan), progress=progress)
    plan, after = _with_refcounts(source, plan, after, can_grow=can_grow, progress=progress)
    holes = _holes(tables)
    if holes:
        plan = _then(plan, _unreadable(Overlay(source, plan), tables.l1.offset, holes))
        after = check_image(Overlay(source, plan), progress=progress)
    return plan, holes, after


def _then(plan: Plan, more: Plan) -> Plan:
    """*plan*, and then *more*, which was made of what it leaves."""
    return replace(
        plan,
        stages=(*plan.stages, *more.stages),
        size_after=more.size_after,
        edits=(*plan.edits, *more.edits),
        edit_count=plan.edit_count + more.edit_count,
    )


def _in_order(source: Source, plan: Plan, before: Report) -> Plan:
    """*plan*, which was made step by step, with each kind of stage once, and in their order.

    What is raised comes before what will refer to it. Where there is no header before, nobody reads
    anything else until there is one: that comes last, and when it is taken back, first.
    """
    draft, last = Draft(source), Overlay(source, plan)
    draft.size = plan.size_after
    for stage in plan.stages:
        if before.error is None:
            draft.write_tables(stage.kind, stage.sectors * SECTOR, stage.after)
            continue
        is_header = stage.sectors == 0
        for kind, mine in ((StageKind.PREPARE, ~is_header), (StageKind.SWITCH, is_header)):
            draft.write_tables(kind, stage.sectors[mine] * SECTOR, stage.after[mine])
    # Where a step that comes later now had come first, its sectors are what they are in the end.
    made = draft.plan(plan.tier)
    for stage in made.stages:
        rows = np.empty_like(stage.after)
        for part, content in read_tables(last, stage.sectors * SECTOR, SECTOR):
            rows[part] = content
        later = [each.sectors for each in made.stages if each.kind > stage.kind]
        final = ~np.isin(stage.sectors, np.concatenate([*later, stage.sectors[:0]]))
        draft.write_tables(stage.kind, stage.sectors[final] * SECTOR, rows[final])
    ordered = draft.plan(plan.tier)
    return replace(ordered, edits=plan.edits, edit_count=plan.edit_count)


def _tables_under(source: Source, report: Report, means: _Means) -> Placed | None:
    """The tables without a place, under a header that makes sense; None where there are none."""
    if report.error is not None or report.mismatches is None:
        return None
    found = find_placements(source, report, means.progress, free=means.free)
    return found if found is not None and found.placements else None


# ---- the header ----


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


# ---- the L1 table ----


def _without_contested(found: Placed) -> Placed:
    """*found* without placements of tables that lead to what another leads to as its own."""
    board = found.board
    placed = np.array([each.placed for each in found.placements], dtype=np.bool_)
    rows = np.searchsorted(board.tables.offset, [each.offset for each in found.placements])[placed]
    own = board.tables.own[rows]
    clusters = np.where(own, board.tables.clusters[rows], 0)
    used, count = np.unique(clusters[clusters > 0], return_counts=True)
    twice = used[count > 1]
    referenced = used[found.mismatches.count_references(used.astype(np.int64)) > 0]
    bad = np.isin(clusters, np.concatenate((twice, referenced))) & (clusters > 0)
    is_bad = np.zeros(len(placed), dtype=np.bool_)
    is_bad[placed] = bad.any(axis=1)
    placements = tuple(
        replace(each, placed=False) if wrong else each
        for each, wrong in zip(found.placements, is_bad.tolist(), strict=True)
    )
    return replace(found, placements=placements)


def _draft_l1(draft: Draft, found: Placed) -> None:
    """Draft the L1 table with what was placed, and without what leads nowhere."""
    l1 = found.l1
    words = np.where(l1.leads, l1.words, np.uint64(0))
    for each in found.placements:
        if each.placed:
            copied = 0 if each.offset in found.shared else entries.COPIED
            words[each.l1_index] = np.uint64(each.offset | copied)
    draft.write(StageKind.CORRECT, l1.offset, words.astype(">u8").tobytes())
    changed = np.flatnonzero(words != l1.words)
    _explain(draft, l1.offset, changed.tolist())


def _explain(draft: Draft, l1_offset: int, indices: Sequence[int]) -> None:
    def edits() -> Iterator[Edit]:
        why = StageKind.CORRECT, Structure.L1_TABLE, FindingKind.LEAK
        return (Edit(*why, l1_offset + at * 8, 8, 1) for at in indices)

    draft.explain(edits, len(indices))


def _holes(found: Placed) -> tuple[int, ...]:
    """The indices that a table may belong to which was not placed."""
    if all(each.placed for each in found.placements):
        return ()
    placed = {each.l1_index for each in found.placements if each.placed}
    vacant = np.flatnonzero(~found.l1.leads[: found.board.tables.windows]).tolist()
    return tuple(index for index in vacant if index not in placed)


def _unreadable(image: Source, l1_offset: int, holes: tuple[int, ...]) -> Plan:
    """What makes those entries of an L1 table lead where nothing can be read."""
    draft = Draft(image)
    words = np.frombuffer(read_bytes(image, l1_offset, (holes[-1] + 1) * 8), dtype=">u8").copy()
    words[list(holes)] = entries.UNREADABLE
    draft.write(StageKind.CORRECT, l1_offset, words.tobytes())
    _explain(draft, l1_offset, holes)
    return draft.plan(RescueTier.RESCUE)


# ---- refcounts that are lost, too ----


def _with_refcounts(
    source: Source, plan: Plan, after: Report, *, can_grow: bool, progress: Progress
) -> tuple[Plan, Report]:
    """*plan*, and behind it what mends the refcounts by the census of what it puts back."""
    counts = after.counts()
    if not any(kind in counts for kind in _LOST_REFCOUNTS) and not after.needs_rebuild:
        return plan, after
    try:
        more = propose(
            Overlay(source, plan), after, RepairTier.ALL, can_grow=can_grow, progress=progress
        )
    except RepairError:
        return plan, after
    return _then(plan, more.plan), more.after


# ---- the proof ----


def _require_proof(result: Rescue, report: Report) -> None:
    """Raise unless the check of the outcome bears it out. *report*: under the header found."""
    after = result.after
    if after.error is not None:
        raise _unproven(f"the image could not be opened afterwards: {after.error}")
    was, now = report.counts(), after.counts()
    allowed = dict.fromkeys(_OF_HOLES, len(result.holes))
    for kind in _NEVER_MORE:
        if now.get(kind, 0) > was.get(kind, 0) + allowed.get(kind, 0):
            raise _unproven(f"{kind.label} would go from {was.get(kind, 0)} to {now[kind]}")
    if after.counters.check_errors > report.counters.check_errors:
        raise _unproven("more of it could not be looked at")


_OF_HOLES = (FindingKind.L2_TABLE_MISALIGNED, FindingKind.PAST_END)
_NEVER_MORE = (
    FindingKind.MULTIPLE_OWNERS,
    FindingKind.L1_ENTRY_RESERVED,
    FindingKind.L2_TABLE_MISALIGNED,
    FindingKind.PAST_END,
)


def _unproven(what: str) -> AmbiguousCorruption:
    return AmbiguousCorruption(
        f"the rescue was planned and then not proven: {what}",
        "nothing was written; report the image",
    )
