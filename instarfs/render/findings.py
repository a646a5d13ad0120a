"""``check/findings.jsonl``: all findings, one JSON object a line, of which there may be millions.

What a finding looks like is said in `instarfs.render.check`, for one. Findings of one shape differ
in nothing but numbers: one of them, with numbers that can be told apart, is the pattern for all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from instarfs.render.check import finding_value
from instarfs.render.columns import (
    beside,
    content,
    decimals,
    hexadecimals,
    interleaved,
    labels,
    same,
)
from instarfs.text import json_text
from planner.arrays import I64, U8, Mask
from planner.check.report import Report
from planner.findings.kinds import NONE, NOWHERE, Finding, FindingKind, Findings, Structure

_NUMBERS = (
    "host_offset",
    "length",
    "count",
    "l1_index",
    "l2_index",
    "index",
    "guest_offset",
    "guest_length",
    "found",
    "expected",
)
_MARK = 1_777_000_000_000_000_000
"""And its successors stand for the numbers in a pattern: longer than any offset of a real file."""


def findings_jsonl(report: Report) -> Iterator[bytes]:
    """One JSON object a finding, worst first; in parts."""
    patterns = _Patterns(report)
    for batch in report.batches():
        shape = np.where(_are_single(report, batch), NONE, _shapes(batch))
        _, which, times = np.unique(shape, return_inverse=True, return_counts=True)
        shape[times[which.reshape(-1)] < FEW] = NONE
        parts = []
        for number in np.unique(shape).tolist():
            at = np.flatnonzero(shape == number)
            rows = batch.select(at)
            parts.append(
                (at, patterns.fill(number, rows) if number != NONE else patterns.write(rows))
            )
        yield content(interleaved(parts))


FEW = 16
"""Findings of one shape for which no pattern is worth the while."""

_ABSENT = ("l1_index", "l2_index", "index", "guest_offset")
"""What not every finding has: left out of its object."""

_COUNTED = ("count", "expected")
"""What is said otherwise of one than of several."""


def _shapes(findings: Findings) -> I64:
    """What findings of one shape have alike, in one number each."""
    shape: I64 = findings.snapshot.astype(np.int64) - NOWHERE
    absent = [(getattr(findings, name) == NONE, 1) for name in _ABSENT]
    columns = [(findings.kind, 6), (findings.structure, 4), *absent]
    columns += [(getattr(findings, name) == 1, 1) for name in _COUNTED]
    for column, bits in columns:
        shape = shape << bits | column
    return shape


def _example(shape: int) -> Finding:
    """The finding of a shape whose numbers are marks."""
    numbers = {name: _MARK + at for at, name in enumerate(_NUMBERS)}
    for name in reversed(_COUNTED):
        numbers[name], shape = 1 if shape & 1 else numbers[name], shape >> 1
    for name in reversed(_ABSENT):
        numbers[name], shape = NONE if shape & 1 else numbers[name], shape >> 1
    structure, kind, snapshot = shape & 15, shape >> 4 & 63, (shape >> 10) + NOWHERE
    return Finding(
        kind=FindingKind(kind), structure=Structure(structure), snapshot=snapshot, **numbers
    )


def _are_single(report: Report, findings: Findings) -> Mask:
    """Which differ in words: about host clusters whose owners are known, or what a table holds."""
    if report.layout is None:
        return np.zeros(len(findings), dtype=np.bool_)
    bits = report.geometry.cluster_bits
    first = findings.host_offset >> bits
    end = first + np.maximum(findings.length >> bits, 1)
    low, high = np.searchsorted(report.owners.cluster, np.stack((first, end)))
    single: Mask = (findings.structure == Structure.CLUSTER) & (low != high)
    single |= findings.kind == FindingKind.TABLE_OVERWRITTEN
    return single


class _Patterns:
    """Lines of JSON as cells: of one shape of finding after the other."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._known: dict[int, list[str]] = {}

    def write(self, findings: Findings) -> U8:
        """Each for itself."""
        values = [json_text(finding_value(self._report, row)) for row in findings.rows()]
        return labels(values, np.arange(len(values)))

    def fill(self, shape: int, findings: Findings) -> U8:
        """Findings of one shape."""
        if shape not in self._known:
            # Text, number, text, number, …, text.
            text = json_text(finding_value(self._report, _example(shape)))
            self._known[shape] = _ANY_MARK.split(text)
        cells: dict[str, U8] = {}
        columns = []
        for position, piece in enumerate(self._known[shape]):
            if piece not in cells:
                is_number = position % 2 == 1
                cells[piece] = _numbers(piece, findings) if is_number else same(piece.encode())
            columns.append(cells[piece])
        return beside(*columns)


_ANY_MARK = re.compile(
    "(" + "|".join(f"{_MARK + at}|{_MARK + at:#018x}" for at in range(len(_NUMBERS))) + ")"
)


def _numbers(mark: str, findings: Findings) -> U8:
    """The column that a mark stands for, in its base."""
    values = getattr(findings, _NUMBERS[int(mark, 0) - _MARK])
    return hexadecimals(values) if mark.startswith("0x") else decimals(values)
