"""``check/findings.jsonl``: all findings, one JSON object a line, of which there may be millions.

What a finding looks like is said in `instarfs.render.check`, for one. Findings of one shape differ
in nothing but numbers, the names of snapshots, and the owners of clusters: one of them, with marks
that can be told apart, is the pattern for all. So are owners of one shape among each other. What a
pattern is filled with are cells, or their lengths where nothing is wanted but how many bytes it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Generic

import numpy as np

from instarfs.render import columns, lengths
from instarfs.render.check import (
    finding_value,
    guest_offset_of,
    owner_phrase,
    owner_value,
    snapshot_name,
)
from instarfs.render.columns import Cells, T
from instarfs.text import json_text
from planner.arrays import I32, I64, GuestOffset, HostOffset, Mask
from planner.check.report import Report
from planner.findings.kinds import (
    NONE,
    NOWHERE,
    OWNERS_LIMIT,
    Finding,
    FindingKind,
    Findings,
    Owner,
    Owners,
    Structure,
    no_owners,
)

FEW = 16
"""Findings of one shape for which no pattern is worth the while."""

OWNERS_AT_ONCE = 1 << 14
"""Owners in a part, as if all findings in it had as many as the one that has most."""


def findings_jsonl(report: Report) -> Iterator[bytes]:
    """One JSON object a finding, worst first; in parts."""
    return map(columns.content, _Lines(report, columns).parts())


def findings_jsonl_length(report: Report) -> int:
    """How many bytes `findings_jsonl` gives, in a fraction of the time."""
    return sum(map(lengths.content, _Lines(report, lengths).parts()))


# ---- shapes ----

_ABSENT = ("l1_index", "l2_index", "index", "guest_offset")
"""What not every finding has: left out of its object."""

_COUNTED = ("count", "expected")
"""What is said otherwise of one than of several."""

_NUMBERS = ("host_offset", "length", *_ABSENT, "guest_length", "found", *_COUNTED)

_OWNER_INDICES = ("l1_index", "l2_index", "index")

_MARK = 1_777_000_000_000_000_000
"""And its successors stand for the numbers in a pattern: longer than any offset of a real file."""

_SNAPSHOT = _MARK + len(_NUMBERS)
_OWNER = _SNAPSHOT + 1


def _state(snapshot: I32 | I64) -> I64:
    """Of a column of snapshots what makes a shape: none, the active disk, or any."""
    return np.minimum(snapshot, 0) - NOWHERE


def _shapes(findings: Findings, owned: Mask) -> I64:
    """What findings of one shape have alike, in one number each."""
    shape = _state(findings.snapshot)
    absent = [(getattr(findings, name) == NONE, 1) for name in _ABSENT]
    parts = [(owned, 1), (findings.kind, 6), (findings.structure, 4), *absent]
    parts += [(getattr(findings, name) == 1, 1) for name in _COUNTED]
    for column, bits in parts:
        shape = shape << bits | column
    return shape


def _example(shape: int) -> tuple[Finding, bool]:
    """The finding of a shape whose numbers are marks; and whether it has owners."""
    numbers = {name: _MARK + at for at, name in enumerate(_NUMBERS)}
    for name in reversed(_COUNTED):
        numbers[name], shape = 1 if shape & 1 else numbers[name], shape >> 1
    for name in reversed(_ABSENT):
        numbers[name], shape = NONE if shape & 1 else numbers[name], shape >> 1
    structure, kind, owned, state = shape & 15, shape >> 4 & 63, shape >> 10 & 1, shape >> 11
    finding = Finding(
        kind=FindingKind(kind),
        structure=Structure(structure),
        snapshot=_snapshot_of(state),
        host_offset=HostOffset(numbers.pop("host_offset")),
        guest_offset=GuestOffset(numbers.pop("guest_offset")),
        **numbers,
    )
    return finding, bool(owned)


def _snapshot_of(state: int) -> int:
    return _SNAPSHOT if state + NOWHERE >= 0 else state + NOWHERE


def _owner_shapes(owners: Owners) -> I64:
    shape = _state(owners.snapshot) << 4 | owners.structure
    for name in _OWNER_INDICES:
        shape = shape << 1 | (getattr(owners, name) == NONE)
    return shape


def _owner_example(shape: int) -> Owner:
    numbers = {name: _OWNER + at for at, name in enumerate(_OWNER_INDICES)}
    for name in reversed(_OWNER_INDICES):
        numbers[name], shape = NONE if shape & 1 else numbers[name], shape >> 1
    return Owner(Structure(shape & 15), _snapshot_of(shape >> 4), **numbers)


# An owner that no cluster has: where it is in a pattern, all owners of a finding are.
_ANY_OWNER = Owner(Structure.CLUSTER, NOWHERE, NONE, NONE, _OWNER + len(_OWNER_INDICES))


def _with_any_owner(report: Report, finding: Finding) -> Report:
    """*report* in which a finding has that owner, and nothing has another."""
    cluster = np.array([finding.host_offset >> report.geometry.cluster_bits])
    one = _ANY_OWNER
    structure = np.array([one.structure], dtype=np.uint8)
    l1, l2, index = (np.array([getattr(one, name)]) for name in _OWNER_INDICES)
    owners = Owners(cluster, structure, np.array([one.snapshot]), l1, l2, index)
    return replace(report, owners=owners)


# ---- lines ----


class _Lines(Generic[T]):
    """Lines of JSON as cells, or whatever *cells* makes."""

    def __init__(self, report: Report, cells: Cells[T]) -> None:
        self._report, self._cells = report, cells
        self._patterns: dict[int, list[str]] = {}
        self._snapshots: dict[int, str] = {}

    def parts(self) -> Iterator[T]:
        """The lines of all findings, a bounded number at a time."""
        for batch in self._report.batches():
            low, high = self._owners_of(batch)
            at_once = max(1, OWNERS_AT_ONCE // max(1, int((high - low).max(initial=0))))
            for start in range(0, len(batch), at_once):
                part = slice(start, start + at_once)
                yield self._lines(batch.select(part), low[part], high[part])

    def _owners_of(self, findings: Findings) -> tuple[I64, I64]:
        """Between which positions the owners of each finding are, as `Owners.of` gives them."""
        nowhere = np.zeros(len(findings), dtype=np.int64)
        report = self._report
        if report.layout is None or not len(report.owners.cluster):
            return nowhere, nowhere
        bits = report.geometry.cluster_bits
        first = findings.host_offset >> bits
        end = first + np.maximum(findings.length >> bits, 1)
        low, high = np.searchsorted(report.owners.cluster, np.stack((first, end)))
        high = np.minimum(high, low + OWNERS_LIMIT)
        return low, np.where(findings.structure == Structure.CLUSTER, high, low)

    def _lines(self, findings: Findings, low: I64, high: I64) -> T:
        shape = _shapes(findings, low < high)
        # What lies over a table is told in words.
        shape[findings.kind == FindingKind.TABLE_OVERWRITTEN] = NONE
        _, which, times = np.unique(shape, return_inverse=True, return_counts=True)
        shape[times[which.reshape(-1)] < FEW] = NONE
        parts = []
        for number in np.unique(shape).tolist():
            at = np.flatnonzero(shape == number)
            rows = findings.select(at)
            if number == NONE:
                parts.append((at, self._each(rows)))
            else:
                parts.append((at, self._alike(number, rows, low[at], high[at])))
        return self._cells.interleaved(parts)

    def _each(self, findings: Findings) -> T:
        """Each for itself."""
        values = [json_text(finding_value(self._report, row)) for row in findings.rows()]
        return self._cells.labels(values, np.arange(len(values)))

    def _alike(self, shape: int, findings: Findings, low: I64, high: I64) -> T:
        """Findings of one shape."""
        cells, owner = self._cells, _ANY_OWNER
        report = self._report
        fillings: dict[str, Callable[[], T]] = {
            **self._of_snapshots(findings.snapshot),
            json_text(owner_value(report, owner)): lambda: self._owners(low, high, _as_object),
            owner_phrase(owner, report.geometry, ()): lambda: self._owners(low, high, _as_phrase),
        }
        for at, name in enumerate(_NUMBERS):
            values = getattr(findings, name)
            fillings[f"{_MARK + at}"] = partial(cells.decimals, values)
            fillings[f"{_MARK + at:#018x}"] = partial(cells.hexadecimals, values)
        if shape not in self._patterns:
            example, owned = _example(shape)
            shown = _with_any_owner(report, example) if owned else _without_owners(report)
            self._patterns[shape] = _split(json_text(finding_value(shown, example)), fillings)
        return self._fill(self._patterns[shape], fillings)

    def _fill(self, pattern: list[str], fillings: Mapping[str, Callable[[], T]]) -> T:
        """Text, mark, text, mark, …, text; with what *fillings* has for the marks."""
        made: dict[str, T] = {}
        for position, piece in enumerate(pattern):
            if piece not in made:
                is_mark = position % 2 == 1
                made[piece] = fillings[piece]() if is_mark else self._cells.same(piece.encode())
        return self._cells.beside(*(made[piece] for piece in pattern))

    def _of_snapshots(self, numbers: I32 | I64) -> dict[str, Callable[[], T]]:
        """Fillings for a snapshot's number, and for what it is called in a sentence."""

        def names() -> T:
            distinct, which = np.unique(numbers, return_inverse=True)
            for number in distinct.tolist():
                if number not in self._snapshots:
                    self._snapshots[number] = _inside_text(snapshot_name(self._report, number))
            known = [self._snapshots[number] for number in distinct.tolist()]
            return self._cells.labels(known, which.reshape(-1))

        return {
            f"{_SNAPSHOT}": lambda: self._cells.decimals(numbers),
            f"snapshot {_SNAPSHOT}": names,
        }

    def _owners(self, low: I64, high: I64, written: _Written) -> T:
        """The owners from *low* to *high*, one after the other, of each row."""
        count = high - low
        row = np.repeat(np.arange(len(low)), count)
        place = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        all_of_them = self._report.owners
        owners = all_of_them.select(low[row] + place)
        shapes, parts = _owner_shapes(owners), []
        for shape in np.unique(shapes).tolist():
            at = np.flatnonzero(shapes == shape)
            parts.append((at, self._owners_alike(shape, owners.select(at), written)))
        separator, _ = written
        separators = self._cells.labels(["", separator], place > 0)
        cells = self._cells.beside(separators, self._cells.interleaved(parts))
        return self._cells.gathered(cells, row, place, len(low))

    def _owners_alike(self, shape: int, owners: Owners, written: _Written) -> T:
        example, geometry = _owner_example(shape), self._report.geometry
        guest = owners.l1_index * geometry.l2_entries + owners.l2_index
        guest *= geometry.cluster_size
        cells = self._cells
        fillings = {
            **self._of_snapshots(owners.snapshot),
            f"{guest_offset_of(example, geometry)}": lambda: cells.decimals(guest),
        }
        for at, name in enumerate(_OWNER_INDICES):
            values = getattr(owners, name)
            fillings[f"{_OWNER + at}"] = partial(cells.decimals, values)
        _, write = written
        return self._fill(_split(write(self._report, example), fillings), fillings)


_Written = tuple[str, Callable[[Report, Owner], str]]
"""How owners are listed: what stands between them, and one of them."""

_as_object: _Written = (", ", lambda report, owner: json_text(owner_value(report, owner)))
_as_phrase: _Written = (
    "; ",
    lambda report, owner: _inside_text(owner_phrase(owner, report.geometry, ())),
)


def _without_owners(report: Report) -> Report:
    return replace(report, owners=no_owners())


def _inside_text(text: str) -> str:
    return json_text(text)[1:-1]


def _split(text: str, marks: Iterable[str]) -> list[str]:
    """Text, mark, text, mark, …, text."""
    longest_first = sorted(marks, key=len, reverse=True)
    return re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
