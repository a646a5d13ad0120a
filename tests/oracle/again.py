"""A campaign of repairs one after the other: what one keeps, none frees later unasked.

Each image has snapshots, and entries that lead to what a snapshot has: where that has raised no
refcount, a repair that raises it leaves nothing behind that would speak for what the entry has
lost. Nothing but the planner is asked: which tier frees what, and whether its id must be quoted.
Case *number* of seed *seed* is the same image whoever runs it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from planner.check.check import check_image
from planner.errors import RepairError
from planner.qcow2.entries import COPIED, L1_OFFSET
from planner.repair.overlay import Overlay
from planner.repair.plan import DETERMINED
from planner.repair.tiers import propose
from planner.source import Source
from tests.images.matrix import MATRIX, Row, describe, random_row
from tests.images.random_damage import KINDS
from tests.oracle.campaign import GROUP_CASES, damaged_images
from tests.oracle.repair_judge import faults_of_freeing
from tests.oracle.scene import FileSource, Scene, Table

ROWS = tuple(row for row in MATRIX if row.snapshots and not row.empty)


@dataclass(frozen=True, slots=True)
class SequenceCase:
    """One image, what was done to it, what is wrong with any order of repairs, and which asked."""

    seed: int
    number: int
    row: Row
    damages: tuple[str, ...]
    faults: tuple[str, ...]
    asked: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"seed {self.seed}, case {self.number}, row {self.row.name} ({describe(self.row)})",
            *(f"  damage: {damage}" for damage in self.damages),
            *(f"  fault: {fault}" for fault in self.faults),
            f"  again: python -m tests.oracle --again --seed {self.seed} --only {self.number}",
        ]
        return "\n".join(lines)


def run_sequence_group(
    seed: int, group: int, only: int | None = None, keep: Path | None = None
) -> Iterator[SequenceCase]:
    """Judge the cases of *group*. *only*: this case alone. *keep*: its image stays here."""
    row = _row_of(seed, group)

    def damage(scene: Scene, number: int) -> tuple[str, ...]:
        return _inflict(scene, random.Random(f"again {seed} {number}"))

    first = group * GROUP_CASES
    wanted = range(first, first + GROUP_CASES) if only is None else (only,)
    images = damaged_images(row, seed, group, damage, wanted=wanted, keep=keep)
    for number, damages, image in images:
        with image.open("rb") as file:
            faults, asked = judge_sequences(FileSource(file.fileno()))
        yield SequenceCase(seed, number, row, damages, faults, asked)


def _row_of(seed: int, group: int) -> Row:
    """The rows with snapshots first; then combinations with some."""
    if group < len(ROWS):
        return ROWS[group]
    rng, row = random.Random(f"again {seed} {group}"), Row()
    while not row.snapshots:
        row = random_row(rng)
    return row


def judge_sequences(source: Source) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is wrong with repairs that follow each other, and the tiers that ask for an id first."""
    report, faults, asked = check_image(source), list[str](), list[str]()
    for tier in DETERMINED:
        try:
            found = propose(source, report, tier)
        except RepairError:
            continue
        if found.plan.changes_nothing:
            continue
        asked += [tier] if found.needs_quote else []
        wrong = faults_of_freeing(Overlay(source, found.plan), found.after)
        faults += [f"after {tier}: {fault}" for fault in wrong]
    return tuple(faults), tuple(asked)


# --- entries that lead to what a snapshot has ----------------------------------------------------


def _inflict(scene: Scene, rng: random.Random) -> tuple[str, ...]:
    """One or two entries, and sometimes something else; a line each."""
    done = [_as_in_a_snapshot(scene, rng) for _ in range(rng.choice((1, 1, 2)))]
    if rng.random() < 0.3:
        name = rng.choice(list(KINDS))
        what = KINDS[name].inflict(scene, rng)
        done.append(what and f"{name}: {what}")
    return tuple(filter(None, done))


def _as_in_a_snapshot(scene: Scene, rng: random.Random) -> str | None:
    """An entry of the disk's becomes one of a snapshot's, mostly that in its own place."""
    theirs = rng.choice(scene.at.snapshot_l1)
    indices = _differing(scene, scene.at.l1, theirs)
    if not indices:
        return None
    index = rng.choice(indices)
    mine, other = (table.offset + 8 * index for table in (scene.at.l1, theirs))
    if rng.random() < 0.3:
        return _replace(scene, rng, mine, other)
    of_l2 = (scene.at.geometry.l2_entries, scene.at.geometry.l2_entry_size)
    mine_l2, other_l2 = (Table(scene.get(at) & L1_OFFSET, *of_l2) for at in (mine, other))
    places = _differing(scene, mine_l2, other_l2)
    if not places:
        return None
    place = rng.choice(places)
    taken = place if rng.random() < 0.8 else rng.choice(places)
    width = mine_l2.width
    return _replace(scene, rng, mine_l2.offset + place * width, other_l2.offset + taken * width)


def _differing(scene: Scene, mine: Table, theirs: Table) -> list[int]:
    """The entries that both tables have, and that lead to different clusters."""
    count = min(mine.count, theirs.count)
    columns = (
        np.frombuffer(scene.read(table.offset, count * table.width), dtype=">u8")
        for table in (mine, theirs)
    )
    one, other = (column[:: mine.width // 8] & np.uint64(L1_OFFSET) for column in columns)
    found: list[int] = np.flatnonzero((one != 0) & (other != 0) & (one != other)).tolist()
    return found


def _replace(scene: Scene, rng: random.Random, mine: int, other: int) -> str:
    before, flag = scene.get(mine), rng.choice((0, COPIED))
    scene.put(mine, scene.get(other) & ~COPIED | flag)
    return f"entry at {mine}: {before:#x} -> {scene.get(mine):#x}, as a snapshot has it"
