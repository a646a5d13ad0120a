"""Whether QEMU mends an image by itself, when it next opens it for writing.

It repairs what is marked dirty: a program with lazy refcounts was killed. Source: docs/interop/
qcow2.txt, "Dirty bit"; qcow2_do_open, which then does what `qemu-img check -r all` does.
"""

from __future__ import annotations

from planner.check.report import Report
from planner.findings.kinds import KINDS, FindingKind, Severity
from planner.qcow2.header import Incompatible

_OUT_OF_DATE = frozenset(
    {
        FindingKind.LEAK,
        FindingKind.REFCOUNT_LOW,
        FindingKind.REFCOUNT_MISSING,
        FindingKind.L1_COPIED,
        FindingKind.L2_COPIED,
    }
)
"""What a program leaves behind that had not written its refcounts yet."""


def is_mended_when_opened(report: Report) -> bool:
    """Whether all that a check found is what QEMU then mends, and takes no harm from.

    It frees what is leaked, and does not look at it: whether something among that is lost is for
    the caller to know.
    """
    if report.layout is None or not report.complete or report.torn:
        return False
    bits = report.layout.header.incompatible_features
    if not bits & Incompatible.DIRTY or bits & Incompatible.CORRUPT:
        return False
    return all(
        kind in _OUT_OF_DATE or KINDS[kind].severity is Severity.NOTICE for kind in report.counts()
    )
