"""Proposals and outcomes of repairs as JSON and text: ``repair/`` in the mount, and the commands.

The same four numbers everywhere: found, planned, repaired, left.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from instarfs.render.check import counters_value
from instarfs.render.outcome import left_values, pending_value, repair_value
from instarfs.render.shares import shares_lines, shares_value
from instarfs.render.triage import triage_lines, triage_value
from instarfs.repair.outcome import Pending, RepairOutcome, Status
from instarfs.text import json_bytes, json_parts, printable, shell_path, text_lines
from planner.errors import RepairError
from planner.findings.kinds import KINDS
from planner.findings.wording import plural
from planner.repair.plan import Edit, Plan, RepairTier, RescueTier
from planner.repair.tiers import Left, Proposal


def quoting(plan: Plan) -> str:
    """The command that does exactly *plan*, but for the name of its image."""
    how = "rescue --in-place" if plan.tier is RescueTier.RESCUE else f"check -r {plan.tier}"
    return f"instarfs {how} --plan {plan.id}"


SHOWN_BYTES = 16
"""Bytes of an edit that are shown before and after; longer ones are cut and say so."""

LISTED_EDITS = 20
"""Edits that a text for reading lists."""


# ---- the dry run ----


def plan_json(proposal: Proposal, filename: str) -> Iterator[bytes]:
    """A proposal, in parts: id, numbers, stages, edits, the counters that the proof found."""
    plan = proposal.plan
    return json_parts(
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
            "plan-id-must-be-quoted-because": proposal.warnings,
            "suspects": [printable(suspect.sentence) for suspect in proposal.suspects],
            **shares_value(proposal.before, proposal.shares),
            **triage_value(proposal.triage),
            "leaks-in-words": triage_lines(proposal.triage),
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
            "edits": (_edit_value(plan, edit) for edit in plan.edits),
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
    plan = proposal.plan
    lines = [_numbers_line(proposal)]
    if plan.changes_nothing:
        lines.insert(0, f"{filename}: the tier `{proposal.tier}` has nothing to change.")
        return text_lines([*lines, *_left_section(proposal.left)])
    lines.insert(0, f"{filename}: plan {plan.id} for the tier `{proposal.tier}`")
    if proposal.needs_quote:
        lines += ["", f"WARNING: {quote_warning(proposal)}"]
    lines += [] if proposal.tier.is_chosen else _leaks_section(proposal)
    lines += _notes_section(proposal)
    if proposal.needs_quote:
        lines.append("If it is to be done all the same, quote the plan's id when you repair.")
    lines += ["", "Stages:"]
    lines += [
        f"  {stage.kind.name.lower()}: {plural(stage.changed_bytes(), 'byte')} in"
        f" {plural(len(stage.sectors), 'sector')}; {stage.kind.meaning}"
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
    lines += _left_section(proposal.left)
    lines += ["", f"Afterwards the check says: {proposal.after.verdict}."]
    return text_lines(lines)


def _leaks_section(proposal: Proposal) -> list[str]:
    words = triage_lines(proposal.triage, "see: instarfs mount, lost/triage.json")
    return ["", "Leaked clusters:", *(f"  - {line}" for line in words)] if words else []


def _notes_section(proposal: Proposal) -> list[str]:
    """What it comes to, and who had clusters in common."""
    if not (proposal.tier.is_chosen or proposal.notes):
        return []
    lines = ["", "What it comes to:", *(f"  - {line}" for line in map(printable, proposal.notes))]
    shared = shares_lines(proposal.before, proposal.shares, LISTED_EDITS)
    return [*lines, *(f"  - {line}" for line in shared)]


def quote_warning(proposal: Proposal) -> str:
    """Why the id of a plan must be quoted, in a few words."""
    if proposal.tier.is_chosen:
        return "the image does not say that this is right: a person has to choose it."
    if not proposal.triage.is_buried:
        return "something may be lost, and afterwards nothing would show it any more."
    if proposal.tier is RepairTier.LEAKS or proposal.gives_up:
        return "it would free clusters that may be what is left of something lost."
    return "something may be lost, and this does not bring it back; the leaked clusters stay."


def _numbers_line(proposal: Proposal) -> str:
    return f"found {proposal.found}, planned {proposal.planned}, left {proposal.left_count}"


def left_lines(left: tuple[Left, ...]) -> list[str]:
    """What stays and why, the worst first, a line each."""
    worst = sorted(left, key=lambda each: -KINDS[each.kind].severity)
    return [f"{each.count} x {each.kind.label}: {each.reason}" for each in worst]


def _left_section(left: tuple[Left, ...]) -> list[str]:
    return ["", "Left:", *(f"  {line}" for line in left_lines(left))] if left else []


# ---- what became of it ----


def outcome_json(outcome: RepairOutcome | None, filename: str, pending: Pending | None) -> bytes:
    """What the last repair, undo or trim did; *pending*: a repair that was interrupted."""
    value: dict[str, object] = {"filename": filename, "status": "none"}
    if outcome is not None:
        error, after = outcome.error, outcome.after
        refusal = error if isinstance(error, RepairError) else None
        value |= {
            "status": outcome.status.value,
            "errno": errno.errorcode.get(error.errno) if error else None,
            "refusal": refusal.kind if refusal else None,
            "finding": (refusal.finding or None) if refusal else None,
            **repair_value(outcome),
            **(shares_value(outcome.before, outcome.shares) if outcome.before else {}),
            "leaks-fixed": outcome.leaks_fixed,
            "corruptions-fixed": outcome.corruptions_fixed,
            "interrupted-repair-taken-back": outcome.recovered,
            "undoable": outcome.undoable,
            "no-longer-undoable": outcome.stale,
            "trimmed-bytes": outcome.trimmed,
            "verdict": after.verdict if after else None,
            "counters": counters_value(after) if after else None,
        }
    if pending is not None:
        value |= {"interrupted-repair": pending_value(pending)}
        if outcome is None:
            value["status"] = Status.INTERRUPTED.value
    return json_bytes(value)


TAKEN_BACK_FIRST = "A repair that had been interrupted was taken back first."


def outcome_human(outcome: RepairOutcome, filename: str, undo_file: str | None = None) -> str:
    """What a repair, an undo or a trim did, for a reader; after the check that followed it.

    *undo_file*: where the undo file is, if that was said in the command.
    """
    lines = [outcome_line(outcome)]
    if outcome.recovered and outcome.status is not Status.UNDONE:
        lines.insert(0, TAKEN_BACK_FIRST)
    if outcome.before is not None:
        shared = shares_lines(outcome.before, outcome.shares, LISTED_EDITS)
        what = "At least one owner of each of these reads wrong bytes:"
        lines += ["", what, *(f"  {line}" for line in shared)] if shared else []
    lines += _left_section(outcome.left)
    place = f"--undo-file {shell_path(undo_file)} " if undo_file is not None else ""
    command = f"instarfs undo {place}{shell_path(filename)}"
    if outcome.undo_file and outcome.stands:
        before = outcome.undoable - 1
        more = (
            f" ({plural(before, 'repair')} before it can be taken back after that)"
            if before
            else ""
        )
        lines.append(f"To take it back: {command}{more}")
        if outcome.stale:
            lines.append(f"{stale_sentence(outcome.stale).capitalize()}.")
    elif outcome.status is Status.UNDONE and outcome.undoable:
        lines.append(f"To go on: {command}")
    return text_lines(lines)


def stale_sentence(number: int) -> str:
    """That so many repairs before the last stay as they are, and why."""
    before = "the repair before it" if number == 1 else f"the {number} repairs before it"
    return f"{before} can no longer be taken back: the image was written to in between"


def fixed_human(outcome: RepairOutcome) -> str:
    """What ``qemu-img check -r`` prints before the check that follows; empty if nothing changed."""
    if not outcome.leaks_fixed and not outcome.corruptions_fixed:
        return ""
    return (
        "The following inconsistencies were found and repaired:\n\n"
        f"    {outcome.leaks_fixed} leaked clusters\n"
        f"    {outcome.corruptions_fixed} corruptions\n\n"
        "Double checking the fixed image now...\n"
    )


def outcome_line(outcome: RepairOutcome) -> str:
    """The same in one line, for a log."""
    plan = f"tier {outcome.tier}" if outcome.tier else ""
    plan += f", plan {outcome.plan_id}" if plan and outcome.plan_id else ""
    line = outcome.status.value.replace("-", " ")
    match outcome.status:
        case Status.UNDONE:
            line += f": {plan or 'what an interrupted repair had written'}"
        case Status.TRIMMED:
            line += f": {outcome.trimmed} bytes given back"
        case _ if plan:
            line += (
                f": {plan}: found {outcome.found}, planned {outcome.planned},"
                f" repaired {outcome.repaired}, left {outcome.left_count}"
            )
    if outcome.recovered and outcome.error is not None:
        line += ": a repair that had been interrupted was taken back first; then"
    if outcome.reason and outcome.status is not Status.INCOMPLETE:
        line += f": {outcome.reason}"
    if outcome.status is Status.UNDONE and outcome.undoable:
        line += f": {plural(outcome.undoable, 'repair')} more can be taken back"
    return printable(line)
