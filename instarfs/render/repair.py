"""Proposals and outcomes of repairs as JSON and text: ``repair/`` in the mount, and the commands.

The same four numbers everywhere: found, planned, repaired, left.
"""

from __future__ import annotations

from collections.abc import Iterable

from instarfs.render.check import counters_value
from instarfs.render.text import json_bytes, printable
from planner.errors import RepairError
from planner.findings import KINDS
from planner.plan import Edit, Plan, RepairTier
from planner.repair.tiers import Left, Proposal

SHOWN_BYTES = 16
"""Bytes of an edit that are shown before and after; longer ones are cut and say so."""

LISTED_EDITS = 20
"""Edits that a text for reading lists."""


# ---- the dry run ----


def plan_json(proposal: Proposal, filename: str) -> bytes:
    """A proposal: id, numbers, stages, every edit, the counters that the proof found."""
    plan = proposal.plan
    return json_bytes(
        {
            "filename": filename,
            "tier": proposal.tier.value,
            "status": "nothing-to-do" if plan.changes_nothing else "planned",
            "plan-id": plan.id,
            "found": proposal.found,
            "planned": proposal.planned,
            "left": proposal.left_count,
            "complete": proposal.complete,
            "plan-id-must-be-quoted": proposal.needs_quote,
            "suspects": [suspect.sentence for suspect in proposal.suspects],
            "leaked-clusters-looked-at": proposal.triage.looked_at,
            "left-findings": left_values(proposal.left),
            "predicted": counters_value(proposal.after),
            "predicted-verdict": proposal.after.verdict,
            "file-size-before": plan.size_before,
            "file-size-after": plan.size_after,
            "stages": [
                {
                    "name": stage.kind.name.lower(),
                    "meaning": stage.kind.meaning,
                    "sectors": len(stage.sectors),
                    "changed-bytes": stage.changed_bytes(),
                }
                for stage in plan.stages
            ],
            "edit-count": plan.edit_count,
            "edits": [_edit_value(plan, edit) for edit in plan.edits],
        }
    )


def refusal_json(error: RepairError, tier: RepairTier, filename: str) -> bytes:
    """Why there is no plan."""
    return json_bytes(
        {
            "filename": filename,
            "tier": tier.value,
            "status": "refused",
            "refusal": error.kind,
            "finding": error.finding or None,
            "reason": error.reason,
            "way-out": error.wayout or None,
        }
    )


def left_values(left: Iterable[Left]) -> list[dict[str, object]]:
    """What stays, and why."""
    return [{"kind": each.kind.label, "count": each.count, "reason": each.reason} for each in left]


def _edit_value(plan: Plan, edit: Edit) -> dict[str, object]:
    before, after = _bytes_of(plan, edit)
    return {
        "stage": edit.stage.name.lower(),
        "structure": edit.structure.label,
        "offset": edit.offset,
        "length": edit.length,
        "count": edit.count,
        "finding": edit.kind.label,
        "before": _hex(before),
        "after": _hex(after),
    }


def _bytes_of(plan: Plan, edit: Edit) -> tuple[bytes, bytes]:
    """What an edit's bytes are before and after its stage."""
    for stage in plan.stages:
        if stage.kind is edit.stage:
            return stage.bytes_at(edit.offset, edit.length)
    return b"", b""


def _hex(data: bytes) -> str:
    return data[:SHOWN_BYTES].hex() + ("..." if len(data) > SHOWN_BYTES else "")


def plan_human(proposal: Proposal, filename: str) -> str:
    """The dry run for a reader."""
    plan, name = proposal.plan, printable(filename)
    lines = [_numbers_line(proposal)]
    if plan.changes_nothing:
        lines.insert(0, f"{name}: the tier `{proposal.tier}` has nothing to change.")
        return "\n".join([*lines, *_left_lines(proposal.left)]) + "\n"
    lines.insert(0, f"{name}: plan {plan.id} for the tier `{proposal.tier}`")
    if proposal.needs_quote:
        lines += [
            "",
            "WARNING: it would free clusters that look like something lost:",
            *(f"  - {suspect.sentence}" for suspect in proposal.suspects[:LISTED_EDITS]),
            "If that is what you want, quote the plan's id when you repair.",
        ]
    lines += ["", "Stages:"]
    lines += [
        f"  {stage.kind.name.lower()}: {stage.changed_bytes()} bytes in {len(stage.sectors)}"
        f" sectors; {stage.kind.meaning}"
        for stage in plan.stages
    ]
    lines += ["", f"Changes ({plan.edit_count}):"]
    for edit in plan.edits[:LISTED_EDITS]:
        before, after = (_hex(data) for data in _bytes_of(plan, edit))
        lines.append(
            f"  {edit.structure.label} at {edit.offset}, {edit.count} x {edit.kind.label}:"
            f" {before} -> {after}"
        )
    if plan.edit_count > LISTED_EDITS:
        lines.append("  ... all of them: --output json")
    lines += _left_lines(proposal.left)
    lines += ["", f"Afterwards the check says: {proposal.after.verdict}."]
    return "\n".join(lines) + "\n"


def _numbers_line(proposal: Proposal) -> str:
    return f"found {proposal.found}, planned {proposal.planned}, left {proposal.left_count}"


def _left_lines(left: tuple[Left, ...]) -> list[str]:
    if not left:
        return []
    worst = sorted(left, key=lambda each: -KINDS[each.kind].severity)
    return ["", "Left:", *(f"  {each.count} x {each.kind.label}: {each.reason}" for each in worst)]
