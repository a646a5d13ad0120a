"""Findings about L2 entries, of which there can be as many as entries: each held in a few bytes.

Where it is and what was found is held: 16 bytes, or 13 for a run of entries with the same wrong
COPIED flag. Everything else follows from the tables, and is worked out when somebody reads it, a
bounded number of rows at a time. What is a finding is decided elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from planner.arrays import I64, U32, U64, Mask, distinct, expand_ranges
from planner.check.entry_rules import expected
from planner.findings.kinds import (
    BATCH_ROWS,
    NONE,
    FindingKind,
    Findings,
    Structure,
    join_findings,
    make_findings,
    no_findings,
)
from planner.metadata.mapping_tables import L2Tables, TableParts
from planner.qcow2.geometry import Geometry
from planner.source import HOLE

CHUNK = 1 << 18
"""Findings that are gone through at a time where all of them are."""


@dataclass(frozen=True, slots=True)
class _Held:
    """Findings of one kind about one structure, each once, in the order of the tables.

    ``position``: the table's number times the entries of a table, plus the index of the (first)
    entry in it. ``length``: entries, uint32; None where each is one. ``found``: as
    `planner.findings.kinds.KINDS` says; of COPIED flags bool, else uint64.
    """

    position: I64
    length: U32 | None
    found: npt.NDArray[Any]

    def __len__(self) -> int:
        return len(self.position)

    def select(self, which: slice | I64) -> _Held:
        length = None if self.length is None else self.length[which]
        return _Held(self.position[which], length, self.found[which])

    def lengths(self) -> I64:
        if self.length is None:
            return np.ones(len(self), dtype=np.int64)
        return self.length.astype(np.int64)


@dataclass(frozen=True, slots=True)
class EntryFindings:
    """Findings about L2 entries, in the order of their kinds, and of their tables in the file.

    ``cut_at``: so many bytes of its last cluster the file has, where it does not end with one.
    """

    geometry: Geometry
    tables: L2Tables
    cut_at: int
    _held: Mapping[tuple[FindingKind, Structure], _Held]
    _counts: Mapping[FindingKind, int]

    def counts(self) -> dict[FindingKind, int]:
        """How often each kind that is there occurs, as in `Findings.counts`."""
        return dict(self._counts)

    def structures(self, kind: FindingKind) -> list[Structure]:
        """What the findings of a kind are about."""
        return [structure for each, structure in self._held if each is kind]

    def snapshots(self) -> I64:
        """In whose tables there are findings: `ACTIVE`, or indices of snapshots; ascending."""
        tables = [self._tables_of(held) for held in self._held.values()]
        which = distinct(np.concatenate([*tables, np.zeros(0, dtype=np.int64)]))
        return distinct(self.tables.snapshot[which].astype(np.int64))

    def of(self, *kinds: FindingKind) -> Findings:
        """All rows of these kinds at once, however many there are."""
        return join_findings(*self.batches(*kinds), no_findings())

    def batches(self, *kinds: FindingKind) -> Iterator[Findings]:
        """The rows of these kinds (none given: of every kind), at most `BATCH_ROWS` at a time.

        In each batch they are of one kind.
        """
        for (kind, structure), held in self._held.items():
            if not kinds or kind in kinds:
                for start in range(0, len(held), BATCH_ROWS):
                    part = held.select(slice(start, start + BATCH_ROWS))
                    yield self._told(kind, structure, part)

    def at(self, word: int) -> Findings:
        """The rows about the entry that the byte at host offset *word* is part of."""
        width, size = self.geometry.l2_entries, self.geometry.cluster_size
        low = int(np.searchsorted(self.tables.offset, word - size, side="right"))
        high = int(np.searchsorted(self.tables.offset, word, side="right"))
        found = [no_findings()]
        for table in range(low, high):
            inside = (word - int(self.tables.offset[table])) // self.geometry.l2_entry_size
            position = table * width + inside
            for (kind, structure), held in self._held.items():
                row = int(np.searchsorted(held.position, position, side="right")) - 1
                part = held.select(slice(max(row, 0), row + 1))
                part = part.select(np.flatnonzero(part.position + part.lengths() > position))
                found.append(self._told(kind, structure, part))
        return join_findings(*found)

    def furthest(self, kind: FindingKind, structure: Structure, below: int) -> Findings:
        """The row of these with the largest ``found`` below a number; none where there is none."""
        held = self._held.get((kind, structure))
        if held is None:
            return no_findings()
        best, most = NONE, -1
        for start in range(0, len(held), CHUNK):
            part = held.found[start : start + CHUNK].astype(np.int64)
            part[part >= below] = -1
            at = int(np.argmax(part))
            if part[at] > most:
                best, most = start + at, int(part[at])
        if best == NONE:
            return no_findings()
        return self._told(kind, structure, held.select(slice(best, best + 1)))

    def with_kind(
        self, kind: FindingKind, structure: Structure, position: I64, found: U64
    ) -> EntryFindings:
        """The same and single entries at *position*, as of `_Held`, of a kind that it has not."""
        parts = _Parts(position=[position], found=[found])
        held = dict(sorted({**self._held, (kind, structure): _joined(parts)}.items()))
        total = _total(kind, held[kind, structure], self.tables, self.geometry)
        counts = {**self._counts, kind: total}
        return replace(self, _held=held, _counts=counts)

    def singles(self, kind: FindingKind, structure: Structure) -> tuple[I64, I64, U64]:
        """Of these findings each entry: its host offset, ascending, the guest offset that it maps,
        and what was found.
        """
        held = self._held[kind, structure]
        position = expand_ranges(held.position, held.position + held.lengths() - 1)
        table, inside = np.divmod(position, self.geometry.l2_entries)
        offset = self.tables.offset[table] + inside * self.geometry.l2_entry_size
        found = np.repeat(held.found, held.lengths()).astype(np.uint64)
        guest = self.tables.l1_index[table] * self.geometry.l2_entries + inside
        return offset, guest << self.geometry.cluster_bits, found

    def keeping(self, kept: Mapping[tuple[FindingKind, Structure], Mask]) -> EntryFindings:
        """The same without those entries where *kept*, in the order of `singles`, is not true."""
        held, counts = dict(self._held), Counter[FindingKind]()
        for key, mask in kept.items():
            mine = held.pop(key)
            position = expand_ranges(mine.position, mine.position + mine.lengths() - 1)[mask]
            if len(position):
                held[key] = _Held(position, None, np.repeat(mine.found, mine.lengths())[mask])
        for key in sorted(held):
            counts[key[0]] += _total(key[0], held[key], self.tables, self.geometry)
        return replace(self, _held={key: held[key] for key in sorted(held)}, _counts=counts)

    def with_flags(self, flags: EntryFindings) -> EntryFindings:
        """The same with the wrong COPIED flags of *flags*, of the same tables, for its own."""
        kind = FindingKind.L2_COPIED
        held = {key: mine for key, mine in self._held.items() if key[0] is not kind}
        held |= flags._held
        counts = {each: number for each, number in self._counts.items() if each is not kind}
        counts |= flags._counts
        return replace(flags, _held={key: held[key] for key in sorted(held)}, _counts=counts)

    def groups(self) -> list[tuple[FindingKind, Structure]]:
        """Of which kinds, and about what, there are findings."""
        return list(self._held)

    def tables_with(self, kind: FindingKind) -> I64:
        """Host offsets of the tables that have findings of a kind, ascending."""
        tables = [self._tables_of(held) for (each, _), held in self._held.items() if each is kind]
        which = distinct(np.concatenate([*tables, np.zeros(0, dtype=np.int64)]))
        return self.tables.offset[which]

    def parts_with(self, kind: FindingKind) -> TableParts:
        """The parts of tables in which there are findings of a kind: small tables are one."""
        size, each = self.geometry.cluster_size, self.geometry.l2_entry_size
        part = min(size, HOLE)
        found = [np.zeros(0, dtype=np.int64)]
        for (other, _), held in self._held.items():
            for at in range(0, len(held) if other is kind else 0, CHUNK):
                some = held.select(slice(at, at + CHUNK))
                first, last = (some.position, some.position + some.lengths() - 1)
                found.append(distinct(expand_ranges(first * each // part, last * each // part)))
        table, inside = np.divmod(distinct(np.concatenate(found)), size // part)
        which = distinct(table)
        number = np.searchsorted(which, table)
        return TableParts(self.tables.offset[which], number, inside * part, part)

    def marks(self, kind: FindingKind, parts: TableParts, some: slice) -> Mask:
        """Which entries of *some* of the *parts* of tables have findings of a kind.

        bool, (parts, entries of a part).
        """
        width, each = self.geometry.l2_entries, self.geometry.l2_entry_size
        offsets, per_part = parts.offsets[parts.table[some]], parts.size // each
        marks: Mask = np.zeros(len(offsets) * per_part, dtype=np.bool_)
        table = np.searchsorted(self.tables.offset, offsets)
        table[table == len(self.tables)] = 0
        known = self.tables.offset[table] == offsets if len(self.tables) else offsets < 0
        rows = np.flatnonzero(known)
        begin = table[rows] * width + parts.inside[some][rows] // each
        for (other, _), held in self._held.items():
            if other is not kind:
                continue
            low, high = np.searchsorted(held.position, (begin, begin + per_part))
            if held.length is not None:
                low = np.maximum(low - 1, 0)  # It may go on into this part.
            found = held.select(expand_ranges(low, high - 1))
            start, which = np.repeat(begin, high - low), np.repeat(rows, high - low) * per_part
            first = np.maximum(found.position - start, 0)
            last = np.minimum(found.position + found.lengths() - start, per_part) - 1
            inside = first <= last
            marks[expand_ranges((which + first)[inside], (which + last)[inside])] = True
        return marks.reshape(len(offsets), per_part)

    def _tables_of(self, held: _Held) -> I64:
        """Numbers of the tables, some more than once."""
        width, chunks = self.geometry.l2_entries, range(0, len(held), CHUNK)
        tables = [distinct(held.position[at : at + CHUNK] // width) for at in chunks]
        return np.concatenate(tables)

    def _told(self, kind: FindingKind, structure: Structure, held: _Held) -> Findings:
        geometry, tables = self.geometry, self.tables
        table, inside = np.divmod(held.position, geometry.l2_entries)
        length = held.lengths()
        l1_index = tables.l1_index[table]
        guest = (l1_index * geometry.l2_entries + inside) << geometry.cluster_bits
        guest_length: I64 = length << geometry.cluster_bits
        if kind is FindingKind.CUT_OFF and structure is Structure.DATA:
            guest, guest_length = guest + self.cut_at, held.found.astype(np.int64)
        return make_findings(
            kind=kind,
            structure=structure,
            count=_counted(kind, tables, table, length),
            host_offset=tables.offset[table] + inside * geometry.l2_entry_size,
            length=length * geometry.l2_entry_size,
            snapshot=tables.snapshot[table],
            l1_index=l1_index,
            l2_index=inside,
            guest_offset=guest,
            guest_length=guest_length,
            found=held.found,
            expected=expected(kind, held.found),
        )


def _counted(kind: FindingKind, tables: L2Tables, table: I64, length: I64) -> I64:
    """How often QEMU counts a finding: its COPIED pass follows fewer L1 entries than its census."""
    each = tables.copied if kind is FindingKind.L2_COPIED else tables.weight
    return each[table] * length


@dataclass(slots=True)
class _Parts:
    """Columns of `_Held`, as they come."""

    position: list[I64] = field(default_factory=list)
    length: list[U32] = field(default_factory=list)
    found: list[npt.NDArray[Any]] = field(default_factory=list)


class EntryFindingsBuilder:
    """Collects findings about the entries of *tables*, and puts them in order once.

    *keeps*: whether anybody wants them; of millions they take more than all that is counted.
    """

    def __init__(
        self, geometry: Geometry, tables: L2Tables, cut_at: int, *, keeps: bool = True
    ) -> None:
        self._geometry, self._tables, self._cut_at = geometry, tables, cut_at
        self._keeps = keeps
        self._parts: dict[tuple[FindingKind, Structure], _Parts] = {}

    def add(
        self,
        kind: FindingKind,
        position: I64,
        found: npt.NDArray[Any],
        structure: Structure = Structure.L2_TABLE,
    ) -> None:
        """Single entries at *position*, as of `_Held`; where there are none, nothing.

        Of COPIED flags *found* is bool, and the same wrong one in neighbours in a table, where they
        are given one after the other, is one finding.
        """
        if not len(position) or not self._keeps:
            return
        parts = self._parts.setdefault((kind, structure), _Parts())
        if kind is FindingKind.L2_COPIED:
            new = np.ones(len(position), dtype=np.bool_)
            new[1:] = (np.diff(position) != 1) | (found[1:] != found[:-1])
            new |= position % self._geometry.l2_entries == 0
            start = np.flatnonzero(new)
            parts.length.append(np.diff(start, append=len(position)).astype(np.uint32))
            position, found = position[start], found[start]
        else:
            found = found.view(np.uint64)
        parts.position.append(position)
        parts.found.append(found)

    def build(self) -> EntryFindings:
        """What was collected, which the builder lets go of."""
        held, counts = {}, Counter[FindingKind]()
        for key in sorted(self._parts):
            held[key] = _joined(self._parts.pop(key))
            counts[key[0]] += _total(key[0], held[key], self._tables, self._geometry)
        return EntryFindings(self._geometry, self._tables, self._cut_at, held, counts)


def _total(kind: FindingKind, held: _Held, tables: L2Tables, geometry: Geometry) -> int:
    total, width = 0, geometry.l2_entries
    for start in range(0, len(held), CHUNK):
        part = held.select(slice(start, start + CHUNK))
        total += int(_counted(kind, tables, part.position // width, part.lengths()).sum())
    return total


def _joined(parts: _Parts) -> _Held:
    """In order; column by column, so that little is there twice."""
    at = sorted(range(len(parts.position)), key=lambda part: parts.position[part][:1].sum())
    columns: list[npt.NDArray[Any]] = []
    for column in (parts.position, parts.length, parts.found):
        pieces = [column[part] for part in at] if column else [np.zeros(0, dtype=np.uint32)]
        columns.append(np.concatenate(pieces))
        column.clear()
        del pieces
    position = columns[0]
    if not (position[1:] > position[:-1]).all():
        # Of batch after batch in order each: so many runs are merged, not sorted anew.
        order = np.argsort(position, kind="stable")
        del position
        for number in range(len(columns)):
            columns[number] = columns[number][order] if len(columns[number]) else columns[number]
    position, length, found = columns
    return _Held(position, length if len(length) else None, found)
