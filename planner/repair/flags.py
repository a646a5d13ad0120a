"""The corrupt and dirty bits around a repair, and as it leaves them.

An image in which nothing is wrong but leaks is marked neither corrupt nor dirty; meanwhile it is
marked corrupt. Both bits are findings, so that they belong to what the check after a plan is of.
"""

from __future__ import annotations

from planner.check.report import Report
from planner.findings.kinds import KINDS, FindingKind, Severity, Structure
from planner.qcow2.header import FEATURES_AT, Header, Incompatible
from planner.repair.draft import Draft
from planner.repair.plan import StageKind
from planner.repair.scope import Scope
from planner.source import read_bytes

COPIED = frozenset({FindingKind.L1_COPIED, FindingKind.L2_COPIED})
"""Flags of entries, which the last step of a repair corrects."""


def foresee_flags(scope: Scope, before: Report, mended: frozenset[FindingKind]) -> None:
    """Draft the bits as the outcome will most likely have them, where anything is drafted.

    Often the next check is the proof then: nothing is left but what is *mended*, or something that
    is not. `settle_flags` corrects what was foreseen wrong.
    """
    if not scope.draft.is_empty:
        _draft_outcome(scope, before, clean=_is_clean(scope.report, mended))


def settle_flags(scope: Scope, before: Report) -> None:
    """Draft the corrupt and dirty bits as the outcome has them, and say why they go."""
    clean = _is_clean(scope.report)
    _draft_outcome(scope, before, clean=clean)
    if not clean or before.layout is None or not _has_flags(scope):
        return
    bits = before.layout.header.incompatible_features
    for kind, bit in (
        (FindingKind.CORRUPT_BIT, Incompatible.CORRUPT),
        (FindingKind.DIRTY_BIT, Incompatible.DIRTY),
    ):
        if bits & bit:
            place = [(FEATURES_AT, 8, 1)]
            scope.explain(StageKind.RELEASE, Structure.HEADER, kind, place)


def _is_clean(report: Report, mended: frozenset[FindingKind] = frozenset()) -> bool:
    """Whether nothing but leaks, and what is *mended*, is wrong."""
    return not any(KINDS[kind].severity > Severity.LEAK for kind in report.counts().keys() - mended)


def _draft_outcome(scope: Scope, before: Report, *, clean: bool) -> None:
    """Draft both bits for an outcome, unless they are, so that they were checked, too."""
    if before.layout is None or not _has_flags(scope):
        return
    draft, final = scope.draft, _final_bits(before.layout.header, clean=clean)
    if draft.has(StageKind.GUARD):
        drafted = int.from_bytes(read_bytes(scope.drafted, FEATURES_AT, 8), "big")
        if drafted == final:
            return
    for stage in (StageKind.GUARD, StageKind.RELEASE):
        draft.withdraw(stage)
    _draft_flags(draft, before.layout.header, final)


def _has_flags(scope: Scope) -> bool:
    """Whether there are a corrupt and a dirty bit, where they may be written."""
    return scope.layout.header.version >= 3 and scope.may_write_header


def _draft_flags(draft: Draft, header: Header, final: int) -> None:
    """Put the corrupt bit around what is drafted, and the *final* bits behind it."""
    bits = header.incompatible_features
    if not draft.is_empty:
        guarded = bits | int(Incompatible.CORRUPT)
        draft.write(StageKind.GUARD, FEATURES_AT, guarded.to_bytes(8, "big"))
    elif final == bits:
        return
    draft.write(StageKind.RELEASE, FEATURES_AT, final.to_bytes(8, "big"))


def _final_bits(header: Header, *, clean: bool) -> int:
    """The incompatible features as a repair leaves them."""
    bits = header.incompatible_features
    return bits & ~int(Incompatible.DIRTY | Incompatible.CORRUPT) if clean else bits
