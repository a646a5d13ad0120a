"""How the planner answers: with a value, or with the one error that it may raise."""

from collections.abc import Callable
from dataclasses import replace

from planner.arrays import GuestOffset, HostOffset
from planner.check.report import Report
from planner.errors import ImageError
from planner.findings.kinds import Finding, FindingKind


def refusal(function: Callable[..., object], *arguments: object) -> ImageError | None:
    """The error that a call is refused with; None where it is answered.

    Any other exception is a defect of the planner and passes through.
    """
    try:
        function(*arguments)
    except ImageError as error:
        return error
    return None


def answers(report: Report) -> list[object]:
    """All that a report says, for comparison, but for how it groups COPIED flags into findings."""
    stopped = [str(error) for error in report.stopped]
    rows = [single for row in report.rows() for single in singles(row, report)]
    return [report.counters, stopped, report.complete, *rows]


def singles(row: Finding, report: Report) -> list[Finding]:
    """A finding about many L2 entries as findings about one each."""
    if row.kind is not FindingKind.L2_COPIED:
        return [row]
    entry, cluster = report.geometry.l2_entry_size, report.geometry.cluster_size
    number = row.length // entry
    return [
        replace(
            row,
            count=row.count // number,
            host_offset=HostOffset(row.host_offset + at * entry),
            length=entry,
            l2_index=row.l2_index + at,
            guest_offset=GuestOffset(row.guest_offset + at * cluster),
            guest_length=cluster,
        )
        for at in range(number)
    ]
