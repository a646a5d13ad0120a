"""In which order a rescue is written: no crash leaves what reads as neither before nor after.

A rescue is planned step by step, and each step may be a repair of its own. What is written is one
plan with each kind of stage once.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from planner.check.report import Report
from planner.qcow2.header import AUTOCLEAR_AT, FEATURES_AT, Incompatible
from planner.repair.draft import Draft
from planner.repair.overlay import Overlay
from planner.repair.plan import Plan, StageKind
from planner.rescue.hypotheses import Hypothesis
from planner.source import SECTOR, Source, read_tables


def then(plan: Plan, more: Plan) -> Plan:
    """*plan*, and then *more*, which was made of what it leaves."""
    return replace(
        plan,
        stages=(*plan.stages, *more.stages),
        size_after=more.size_after,
        edits=(*plan.edits, *more.edits),
        edit_count=plan.edit_count + more.edit_count,
    )


def in_order(source: Source, plan: Plan, before: Report) -> Plan:
    """*plan*, which was made step by step, with each kind of stage once, and in their order.

    What is raised comes before what will refer to it. Where there is no header before, nobody reads
    anything else until there is one: that comes last, and when it is taken back, first.
    """
    draft, last = Draft(source), Overlay(source, plan)
    draft.size = plan.size_after
    kinds = [stage.kind for stage in plan.stages]
    if StageKind.GUARD in kinds[1:] and kinds[0] is not StageKind.GUARD:
        _draft_guard(draft, before)
    for number, stage in enumerate(plan.stages):
        if before.error is None:
            # The guard of a later step holds what an earlier one pointed the header at.
            is_later = number > 0 and stage.kind is StageKind.GUARD
            kind = StageKind.SWITCH if is_later else stage.kind
            draft.write_tables(kind, stage.sectors * SECTOR, stage.after)
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


def draft_header(draft: Draft, header: Hypothesis, before: Report) -> None:
    """Draft *header*: the sector last, and at once, that makes it an image, or another one.

    Autoclear bits that are not known do not come with it: whoever writes clears them.
    One that can be read as it is, by *before*, is marked corrupt while it has parts of both.
    """
    content = header.content
    if header.header.unknown_autoclear:
        known = header.header.known_autoclear.to_bytes(8, "big")
        content = content[:AUTOCLEAR_AT] + known + content[AUTOCLEAR_AT + len(known) :]
    fields, rest = content[:SECTOR], content[SECTOR:]
    if rest:
        _draft_guard(draft, before)
        draft.write(StageKind.PREPARE, SECTOR, rest)
    draft.write(StageKind.SWITCH, 0, fields)


def _draft_guard(draft: Draft, before: Report) -> None:
    """Mark the header corrupt, where one can be read that has a bit for it."""
    if before.layout is not None and before.layout.header.version >= 3:
        bits = before.layout.header.incompatible_features | int(Incompatible.CORRUPT)
        draft.write(StageKind.GUARD, FEATURES_AT, bits.to_bytes(8, "big"))
