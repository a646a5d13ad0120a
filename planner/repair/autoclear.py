"""Autoclear bits that are not known: the specification has every writer clear them.

They vouch for something that this repair may change. A repair that writes nothing leaves them.
"""

from __future__ import annotations

from planner.errors import AmbiguousCorruption
from planner.findings.kinds import FindingKind, Structure
from planner.qcow2.header import AUTOCLEAR_AT, Header, read_header
from planner.repair.draft import Draft
from planner.repair.plan import Edit, StageKind
from planner.repair.scope import Scope


def clear_unknown_autoclear(scope: Scope) -> None:
    """Draft them cleared before all else; raises where the header may not be written to."""
    if not scope.draft.writes_anything:
        return
    header = read_header(scope.draft.source)  # As drafted it may vouch for other bitmaps.
    if not header.unknown_autoclear:
        return
    if not scope.may_write_header:
        raise AmbiguousCorruption(
            "autoclear bits that are not known would have to be cleared, and something else refers"
            " to the header's cluster, so that it is not written to",
            "export the disk",
            FindingKind.MULTIPLE_OWNERS.label,
        )
    draft_known_autoclear(scope.draft, header)


def draft_known_autoclear(draft: Draft, header: Header) -> None:
    """Draft that of the autoclear bits of *header* only those that are known stay."""
    draft.write(StageKind.GUARD, AUTOCLEAR_AT, header.known_autoclear.to_bytes(8, "big"))
    why = StageKind.GUARD, Structure.HEADER, FindingKind.UNKNOWN_AUTOCLEAR
    draft.explain(lambda: [Edit(*why, AUTOCLEAR_AT, 8, 1)], 1)
