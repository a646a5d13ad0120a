"""A cluster with two owners: each gets one of its own, with the bytes that both have read so far.

As e2fsck does with what is claimed twice. Which of them is right is not decided: no reading
changes, and the next write of one no longer changes the other's. Tables are moved away from a
guest's data, so that nothing is written to what the guest still reads; of two guest clusters the
first keeps the place. Copies go past the end of the file, where nothing can be lost.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from planner.arrays import I64, U64, Mask, distinct, distinct_rows, is_any_of
from planner.check.owners import contested_clusters
from planner.check.report import Report
from planner.errors import UnsupportedRepair
from planner.findings.kinds import (
    ACTIVE,
    NONE,
    FindingKind,
    Findings,
    Owners,
    Structure,
    no_owners,
)
from planner.qcow2 import entries
from planner.qcow2.header import CRYPT_LUKS
from planner.repair.plan import StageKind
from planner.repair.scope import Scope
from planner.repair.words import WORD, draft_words, read_words
from planner.source import Source, read_bytes, read_tables

MAX_COPIED = 64 << 20
"""Bytes that one repair copies: a plan is held in memory. The next one goes on."""

SMALL_COPIED = 4 << 20
"""What may be copied of an image of which there is less than that: all of it, and so much more."""

L1_OFFSET_AT = 40
"""Where the header holds l1_table_offset."""

GONE = -6
"""In place of a new host cluster: the owner is none any more, or was made anew elsewhere."""

_KIND = FindingKind.MULTIPLE_OWNERS

_REFCOUNTS = (Structure.REFTABLE, Structure.REFBLOCK)

_PRECEDENCE = (
    Structure.COMPRESSED,
    Structure.DATA,
    Structure.L2_TABLE,
    Structure.L1_TABLE,
    *_REFCOUNTS,
)
"""Who keeps the place, of those that can be moved: what is written to later moves away first."""


@dataclass(frozen=True, slots=True, eq=False)
class Shares:
    """Who had a cluster in common. ``new``: the host cluster of each of ``owners`` by now, `NONE`
    where it keeps the place, `GONE` where it is nowhere any more. At least one of those of a
    cluster reads wrong bytes.
    """

    owners: Owners = field(default_factory=no_owners)
    new: I64 = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @property
    def clusters(self) -> I64:
        """The clusters, ascending, each once."""
        return distinct(self.owners.cluster)

    def joined(self, *later: Shares) -> Shares:
        """All of them, each owner once: where it is in the end."""
        names = ("cluster", "structure", "snapshot", "l1_index", "l2_index", "index")
        every = (self, *later)
        columns = [np.concatenate([getattr(each.owners, name) for each in every]) for name in names]
        first, which = distinct_rows(*columns)
        # There may be hundreds of thousands: each column goes as soon as it is not needed.
        cluster, structure, snapshot, l1_index, l2_index, index = (
            columns.pop(0)[first] for _ in names
        )
        new = np.full(len(first), NONE)
        np.maximum.at(new, which, np.concatenate([each.new for each in every]))
        return Shares(Owners(cluster, structure, snapshot, l1_index, l2_index, index), new)

    def without(self, clusters: I64) -> Shares:
        """Those of other clusters."""
        return self.select(np.flatnonzero(~is_any_of(self.owners.cluster, clusters)))

    def with_refcounts_anew(self) -> Shares:
        """With refcounts that had their cluster in common made anew somewhere else."""
        return self.gone(np.isin(self.owners.structure, _REFCOUNTS))

    def gone(self, which: Mask) -> Shares:
        """With these rows as `GONE`."""
        return Shares(self.owners, np.where(which, GONE, self.new))

    def select(self, which: I64) -> Shares:
        """The rows at these positions."""
        return Shares(self.owners.select(which), self.new[which])


def shared_by(report: Report) -> Shares:
    """Who has clusters in common by a check, each in its place."""
    contested = report.findings.of(_KIND).host_offset >> report.geometry.cluster_bits
    owners = report.owners.select(np.flatnonzero(is_any_of(report.owners.cluster, contested)))
    return Shares(owners, np.full(len(owners.cluster), NONE))


def room_for_copies(source: Source) -> int:
    """How many bytes a repair of *source* copies at most."""
    room = min(SMALL_COPIED, MAX_COPIED)
    for start, end in source.data_extents(0, source.size):
        room += end - start
        if room >= MAX_COPIED:
            return MAX_COPIED
    return room


def part_owners(scope: Scope, structure: Structure, room: int) -> Shares:
    """Draft copies for those owners of a *structure* that cannot keep the place that they share.

    L1 tables come first, then L2 tables, then data: each step needs the check of the one before.
    At most *room* bytes are copied. Raises `UnsupportedRepair` where there is no place for them.
    """
    shares = shared_by(scope.report)
    if structure not in shares.owners.structure:
        return shares
    units = _Units(scope, structure, shares.owners)
    if not units.moves.any():
        return shares
    if not scope.may_grow:
        raise UnsupportedRepair(
            "copies would make the file grow over offsets past its end that the image refers to:"
            " what is lost would look as if it were there",
            "export the disk",
            FindingKind.PAST_END.label,
        )
    draft = {Structure.L1_TABLE: _move_l1_tables, Structure.L2_TABLE: _move_l2_tables}
    return draft.get(structure, _move_data)(scope, units, room)


def contested_but_for_refcounts(report: Report) -> I64:
    """The clusters that had two owners also if no refcounts were there, which are made anew."""
    owners = shared_by(report).owners
    others = owners.select(np.flatnonzero(~np.isin(owners.structure, _REFCOUNTS)))
    return contested_clusters(others, report.geometry.l2_entries)[0]


def are_refcounts_shared(scope: Scope) -> bool:
    """Whether a refcount block, or the table of them, has its cluster in common with anything."""
    contested = scope.report.findings.of(_KIND).host_offset >> scope.geometry.cluster_bits
    owners = scope.report.owners
    claimed = owners.cluster[np.isin(owners.structure, _REFCOUNTS)]
    return bool(is_any_of(claimed, contested).any())


class _Units:
    """The owners of contested clusters, those together that have to stay together.

    ``owners``: rows. ``unit``: of each row. ``moves``: which units are moved in this step.
    """

    def __init__(self, scope: Scope, structure: Structure, owners: Owners) -> None:
        self._scope, self._step, self.owners = scope, structure, owners
        self.bits = scope.geometry.cluster_bits
        first, self.unit = distinct_rows(*self._identities())
        self.cluster, self.structure = self.owners.cluster[first], self.owners.structure[first]
        fixed = self.of_units(self._fixed_rows())
        keeper, is_parted = self._keepers(fixed)
        self.moves: Mask = ~fixed & is_parted & (self.structure == structure)
        self.moves[keeper] = False

    def of_units(self, rows: Mask) -> Mask:
        """Which units have one of *rows*."""
        found: Mask = np.zeros(len(self.cluster), dtype=np.bool_)
        found[self.unit[rows]] = True
        return found

    def limited(self, cost: I64, room: int) -> None:
        """Of the units that move, of that *cost* in bytes, only as many as there is *room* for."""
        moves = np.flatnonzero(self.moves)
        self.moves[moves[np.cumsum(cost) > room]] = False

    def numbers(self) -> I64:
        """Of each row: which of the units that move it is, or `NONE`."""
        number = np.full(len(self.cluster), NONE)
        number[self.moves] = np.arange(np.count_nonzero(self.moves))
        return number[self.unit]

    def moved_to(self, new: I64) -> Shares:
        """The rows, when the units that move are at the *new* clusters."""
        number = self.numbers()
        at = np.where(number == NONE, NONE, new[number] if len(new) else NONE)
        return Shares(self.owners, at)

    # ---- who they are ----

    def _identities(self) -> tuple[npt.NDArray[Any], ...]:
        """Columns of which the rows are alike for those that are one: as `contested_clusters` has
        them.
        """
        owners = self.owners
        is_l1 = owners.structure == Structure.L1_TABLE
        position = np.where(owners.l2_index == NONE, owners.l1_index, self._positions())
        # Any number of compressed clusters may lie in one.
        position = np.where(owners.structure == Structure.COMPRESSED, 0, position)
        snapshot = np.where(is_l1, owners.snapshot, 0)
        return owners.cluster, owners.structure, position, snapshot, owners.index

    def _positions(self) -> I64:
        """Of each row its guest cluster, where it is one."""
        return self.owners.l1_index * self._scope.geometry.l2_entries + self.owners.l2_index

    def _keepers(self, fixed: Mask) -> tuple[I64, Mask]:
        """The unit that keeps the place in each cluster; and which units can be parted."""
        rank = np.full(len(self.cluster), len(_PRECEDENCE))
        for number, structure in enumerate(_PRECEDENCE):
            rank[self.structure == structure] = number
        rank[fixed] = -1
        order = np.lexsort((rank, self.cluster))
        _, first = np.unique(self.cluster[order], return_index=True)
        at = np.searchsorted(distinct(self.cluster), self.cluster)
        immovable = np.bincount(at[fixed], minlength=len(first))
        return order[first], immovable[at] <= 1

    # ---- which of them cannot be moved ----

    def _fixed_rows(self) -> Mask:
        structure = self.owners.structure
        fixed: Mask = ~np.isin(structure, _PRECEDENCE)
        fixed |= structure == Structure.COMPRESSED
        fixed |= self._is_fixed_l1()
        rows = np.flatnonzero(np.isin(structure, (Structure.L2_TABLE, Structure.DATA)))
        fixed[rows] |= self._is_fixed_in_tables(rows)
        return fixed

    def _is_fixed_l1(self) -> Mask:
        """L1 tables that what leads to them cannot be pointed elsewhere."""
        scope, snapshot = self._scope, self.owners.snapshot
        is_l1 = self.owners.structure == Structure.L1_TABLE
        fixed: Mask = np.zeros(len(is_l1), dtype=np.bool_)
        fixed[is_l1] = self.l1_offsets[snapshot[is_l1]] < scope.geometry.cluster_size
        fixed |= is_l1 & (snapshot == ACTIVE) & (not scope.may_write_header)
        rows = np.flatnonzero(is_l1 & (snapshot >= 0))
        place = scope.report.snapshots.offset[snapshot[rows]]
        fixed[rows] |= scope.contested(place >> self.bits)
        return fixed

    def _is_fixed_in_tables(self, rows: I64) -> Mask:
        """Of L2 tables and data those to which an entry leads that is not written to."""
        scope, size = self._scope, self._scope.geometry.cluster_size
        structure = self.owners.structure[rows]
        is_data = structure == Structure.DATA
        place = self.places(rows)
        word = read_words(scope.source, place)
        offset = np.where(is_data, entries.l2_offsets(word), entries.l1_offsets(word))
        # An L1 entry without an offset has no table, whatever else it says.
        fixed: Mask = (offset == 0) | (offset % size != 0)
        fixed |= self._is_overwritten(place)
        # Where encrypted data lies is part of its key.
        fixed |= is_data & (scope.layout.header.crypt_method == CRYPT_LUKS)
        mine = np.flatnonzero(structure == self._step)
        fixed[mine] |= ~self._is_writable(place[mine] >> self.bits)
        fixed |= is_data & self._is_of_two(place, self._positions()[rows])
        return fixed

    def _is_writable(self, clusters: I64) -> Mask:
        """In which clusters entries may be changed: of one owner, once refcounts are elsewhere."""
        others = contested_but_for_refcounts(self._scope.report)
        with_refcounts = is_any_of(clusters, self.cluster) & ~is_any_of(clusters, others)
        return with_refcounts | self._scope.is_writable(clusters)

    @staticmethod
    def _is_of_two(place: I64, position: I64) -> Mask:
        """Which entries are those of several guest clusters, in a table at two places."""
        if not len(place):
            return np.zeros(0, dtype=np.bool_)
        _, which = np.unique(place, return_inverse=True)
        low = np.full(int(which.max()) + 1, position.max())
        high = np.full(len(low), position.min())
        np.minimum.at(low, which, position)
        np.maximum.at(high, which, position)
        differs: Mask = (low != high)[which]
        return differs

    def _is_overwritten(self, place: I64) -> Mask:
        """Which words lie in what was written over a table, which is somebody's data."""
        gone = self._scope.report.findings.of(FindingKind.TABLE_OVERWRITTEN)
        return _is_inside(place, gone)

    # ---- where the words are that lead to them ----

    @cached_property
    def l1_offsets(self) -> I64:
        """Host offset of each L1 table, by snapshot; of the active disk at `ACTIVE`."""
        fields = self._scope.report.snapshots.fields()["l1_table_offset"].astype(np.int64)
        offsets = np.concatenate((fields, np.zeros(-ACTIVE, dtype=np.int64)))
        offsets[ACTIVE] = self._scope.layout.header.l1_table_offset
        return offsets

    def places(self, rows: I64) -> I64:
        """Where the entry is that leads to each: in an L1 table, or of data in an L2 table."""
        owners = self.owners
        place = self.l1_offsets[owners.snapshot[rows]] + WORD * owners.l1_index[rows]
        is_data = owners.l2_index[rows] != NONE
        words = read_words(self._scope.source, place)
        inside = owners.l2_index[rows] * self._scope.geometry.l2_entry_size
        return np.where(is_data, entries.l1_offsets(words) + inside, place)


def _is_inside(place: I64, runs: Findings) -> Mask:
    """Which of *place* lie in one of *runs*; both are host offsets."""
    if not len(runs):
        return np.zeros(len(place), dtype=np.bool_)
    order = np.argsort(runs.host_offset, kind="stable")
    start = runs.host_offset[order]
    end = np.maximum.accumulate(start + runs.length[order])
    at = np.searchsorted(start, place, side="right") - 1
    inside: Mask = (at >= 0) & (place < end[np.maximum(at, 0)])
    return inside


# ---- drafting ----


def _move_l1_tables(scope: Scope, units: _Units, room: int) -> Shares:
    size = scope.geometry.cluster_size
    owners, snapshots = units.owners, scope.report.snapshots
    rows = np.flatnonzero(units.moves[units.unit])
    lengths = np.append(snapshots.fields()["l1_size"].astype(np.int64), [0] * -ACTIVE)
    lengths[ACTIVE] = scope.layout.header.l1_size
    new = np.full(len(owners.cluster), NONE)
    rows = rows[np.argsort(owners.snapshot[rows], kind="stable")]
    numbers = np.unique(owners.snapshot[rows])
    parts = np.split(rows, np.searchsorted(owners.snapshot[rows], numbers[1:]))
    moved, words = list[int](), list[int]()
    for snapshot, mine in zip(numbers.tolist(), parts, strict=False):
        length, offset = int(lengths[snapshot]) * WORD, int(units.l1_offsets[snapshot])
        clusters = -(-length // size)
        if room < clusters * size:
            break
        room -= clusters * size
        first = _room_for(scope, clusters)
        raw = read_bytes(scope.draft.source, offset, length)
        scope.draft.write(StageKind.PREPARE, first * size, raw)
        _explain(scope, Structure.L1_TABLE, np.array([first]), clusters * size)
        if snapshot == ACTIVE:
            pointer = struct.pack(">Q", first * size)
            scope.draft.write(StageKind.SWITCH, L1_OFFSET_AT, pointer)
            scope.explain(StageKind.SWITCH, Structure.HEADER, _KIND, [(L1_OFFSET_AT, WORD, 1)])
        else:
            moved.append(snapshot)
            words.append(first * size)
        new[mine] = first + owners.cluster[mine] - (offset >> units.bits)
    # All at once: what each of them reads is the overlay of what was drafted before.
    place = snapshots.offset[np.array(moved, dtype=np.int64)]
    _repoint(scope, Structure.SNAPSHOT_TABLE, place, np.array(words, dtype=np.uint64))
    return Shares(owners, new)


def _move_l2_tables(scope: Scope, units: _Units, room: int) -> Shares:
    size = scope.geometry.cluster_size
    # As many as there is room for at best: more are not read, however many lead to one place.
    units.limited(np.full(np.count_nonzero(units.moves), size), room)
    moves = np.flatnonzero(units.moves)
    cost = np.full(len(moves), size)
    # A copy of a table maps what that table maps: each of it will be copied, too.
    alike = scope.report.owners.of_tables_alike()
    doubled = is_any_of(units.cluster[moves], alike) & (not scope.geometry.external_data)
    for part, rows in read_tables(scope.source, units.cluster[moves] * size, size):
        words, _ = entries.split_entries(entries.decode_words(rows), scope.geometry.extended_l2)
        types = entries.cluster_types(words.reshape(-1), scope.geometry).reshape(words.shape)
        cost[part] += np.where(doubled[part], entries.has_host_cluster(types).sum(axis=1), 0) * size
    units.limited(cost, room)
    return _move_clusters(scope, units, entries.L1_OFFSET)


def _move_data(scope: Scope, units: _Units, room: int) -> Shares:
    cost = np.full(np.count_nonzero(units.moves), scope.geometry.cluster_size)
    units.limited(cost, room)
    return _move_clusters(scope, units, entries.L2_OFFSET)


def _move_clusters(scope: Scope, units: _Units, mask: int) -> Shares:
    """Copy the clusters of all units that move, and point at the copies what led to them.

    *mask*: which bits of those words say where. COPIED follows when the refcounts are right.
    """
    size, moves = scope.geometry.cluster_size, np.flatnonzero(units.moves)
    if not len(moves):
        return units.moved_to(moves)
    structure = Structure(int(units.structure[moves[0]]))
    new = _room_for(scope, len(moves)) + np.arange(len(moves))
    for part, content in read_tables(scope.draft.source, units.cluster[moves] * size, size):
        scope.draft.write_tables(StageKind.PREPARE, new[part] * size, content.copy())
    _explain(scope, structure, new, size)
    number = units.numbers()
    rows = np.flatnonzero(number != NONE)
    # Several snapshots may have a table in common, and with it the entry.
    place, first = np.unique(units.places(rows), return_index=True)
    kept = read_words(scope.source, place) & ~np.uint64(mask | entries.COPIED)
    target = (new[number[rows[first]]] * size).astype(np.uint64)
    table = Structure.L1_TABLE if structure is Structure.L2_TABLE else Structure.L2_TABLE
    _repoint(scope, table, place, kept | target)
    return units.moved_to(new)


def _room_for(scope: Scope, count: int) -> int:
    """The first of *count* new clusters. Raises `UnsupportedRepair` where there are none."""
    size = scope.geometry.cluster_size
    first = scope.first_of_new(count)
    if not scope.make_room((first + count) * size):
        raise UnsupportedRepair(
            f"copies would reach up to {(first + count) * size}; a block device of"
            f" {scope.draft.size} bytes does not grow",
            "make the device larger, or export the disk",
            _KIND.label,
        )
    return first


def _repoint(scope: Scope, structure: Structure, place: I64, words: U64) -> None:
    draft_words(scope, _KIND, place, words, stage=StageKind.REPOINT, structure=structure)


def _explain(scope: Scope, structure: Structure, new: I64, length: int) -> None:
    offset = new * scope.geometry.cluster_size
    places = (offset, np.full_like(offset, length), np.ones_like(offset))
    scope.explain_runs(StageKind.PREPARE, structure, _KIND, places)
