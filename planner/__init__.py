"""The pure half of instarfs: bytes in, values out.

Everything that decides lives here: the on-disk format, the census, the check and its report, what a
repair would do. Nothing here opens a file, takes a lock, writes a byte or knows of the mounted
filesystem. Arrows point one way: rescue, repair, triage, views, check, guest, metadata, findings,
qcow2, guestfs, source.

The names in ``__all__`` are for other programs, and are loaded when they are asked for: importing
this package alone loads nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from planner.check.check import check_image
    from planner.check.report import Report
    from planner.errors import Cancelled, ImageError, RepairError
    from planner.findings.kinds import Finding, FindingKind
    from planner.progress import Progress
    from planner.repair.overlay import Overlay
    from planner.repair.plan import Patch, Plan, RepairTier
    from planner.repair.tiers import Proposal, propose
    from planner.source import Bytes, Source

__all__ = [
    "Bytes",
    "Cancelled",
    "Finding",
    "FindingKind",
    "ImageError",
    "Overlay",
    "Patch",
    "Plan",
    "Progress",
    "Proposal",
    "RepairError",
    "RepairTier",
    "Report",
    "Source",
    "check_image",
    "propose",
]

_HOMES = {
    "Bytes": "source",
    "Cancelled": "errors",
    "Finding": "findings.kinds",
    "FindingKind": "findings.kinds",
    "ImageError": "errors",
    "Overlay": "repair.overlay",
    "Patch": "repair.plan",
    "Plan": "repair.plan",
    "Progress": "progress",
    "Proposal": "repair.tiers",
    "RepairError": "errors",
    "RepairTier": "repair.plan",
    "Report": "check.report",
    "Source": "source",
    "check_image": "check.check",
    "propose": "repair.tiers",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
