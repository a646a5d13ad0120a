"""Findings of every kind as a check collects and holds them: in groups, each of one kind.

Most columns say the same in every row of a group, and take no memory then: of a table with an entry
every eight bytes, no finding takes more than 40. Nothing is decided here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt

from planner.findings.kinds import (
    COLUMNS,
    KINDS,
    Columns,
    FindingKind,
    Findings,
    Structure,
    fill_columns,
    join_findings,
    make_findings,
    no_findings,
    refuse_unknown,
)

_Key = tuple[FindingKind, Structure]
_Column = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class GroupedFindings:
    """Findings by kind and structure: the worst severity first, then by kind.

    The rows of a group stand in the order of their host offsets.
    """

    groups: Mapping[_Key, Findings] = field(default_factory=dict)

    def of(self, kind: FindingKind, *structures: Structure) -> Findings:
        """All rows of a kind, or those of it about *structures*. A single group is not copied."""
        chosen = [
            group
            for (each, structure), group in self.groups.items()
            if each is kind and (structure in structures or not structures)
        ]
        return chosen[0] if len(chosen) == 1 else join_findings(*chosen, no_findings())

    def structures(self, kind: FindingKind) -> list[Structure]:
        """What the findings of a kind are about."""
        return [structure for each, structure in self.groups if each is kind]

    def joined(self, other: GroupedFindings) -> GroupedFindings:
        """These and those of *other*, in whose groups none of these are."""
        groups = {**self.groups, **other.groups}
        return GroupedFindings({key: groups[key] for key in sorted(groups, key=_order)})

    def counts(self) -> dict[FindingKind, int]:
        """How often each kind that is there occurs."""
        counts = Counter[FindingKind]()
        for (kind, _), group in self.groups.items():
            counts[kind] += int(group.count.sum())
        return dict(counts)

    def batches(self, *kinds: FindingKind) -> Iterator[Findings]:
        """The rows of these kinds, at most `BATCH_ROWS` at a time."""
        for (kind, _), group in self.groups.items():
            if kind in kinds:
                yield from group.batches()


class FindingsBuilder:
    """Collects rows, many a call, and orders them once."""

    def __init__(self) -> None:
        self._parts: dict[_Key, list[Findings]] = {}
        self._single: dict[_Key, list[tuple[object, ...]]] = {}

    def add(self, kind: FindingKind, **columns: Unpack[Columns]) -> None:
        """Add rows, `make_findings` says of what. Nothing where a column is empty."""
        refuse_unknown(columns)
        key = kind, columns.get("structure", Structure.CLUSTER)
        if not any(isinstance(value, np.ndarray) for value in columns.values()):
            # A row each for thousands of snapshots: making it arrays of their own takes 100 µs.
            said = {"kind": kind, **columns}
            row = tuple(said.get(name, default) for name, (_, default) in COLUMNS.items())
            self._single.setdefault(key, []).append(row)
        elif all(np.asarray(value).size for value in columns.values()):
            self._parts.setdefault(key, []).append(make_findings(kind, **columns))

    def build(self) -> GroupedFindings:
        """What was collected, which the builder lets go of."""
        for key, rows in self._single.items():
            columns = dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
            self._parts.setdefault(key, []).append(fill_columns(columns))
        self._single.clear()
        order = sorted(self._parts, key=_order)
        return GroupedFindings({key: _joined(self._parts.pop(key)) for key in order})


def _order(key: _Key) -> tuple[int, FindingKind, Structure]:
    return -KINDS[key[0]].severity, *key


def _joined(parts: list[Findings]) -> Findings:
    """One group of all *parts*, in order; column by column, so that little is there twice."""
    columns = {name: [getattr(part, name) for part in parts] for name in COLUMNS}
    parts.clear()
    offsets = columns["host_offset"] = [np.concatenate(columns["host_offset"])]
    is_ascending = bool((offsets[0][1:] >= offsets[0][:-1]).all())
    order = None if is_ascending else np.argsort(offsets[0], kind="stable")
    del offsets
    return Findings(**{name: _column(columns.pop(name), order) for name in COLUMNS})


def _column(parts: list[_Column], order: npt.NDArray[np.int64] | None) -> _Column:
    """*parts* one after the other, in *order*; a single number where all of them are the same."""
    first = parts[0][0]
    if all((part == first).all() for part in parts):
        return np.broadcast_to(first, sum(map(len, parts)))
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return whole if order is None else whole[order]
