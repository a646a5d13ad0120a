"""A campaign of choices: images in which only a person can know what is right, judged by QEMU.

Each has one or two kinds of damage by which clusters have two owners, bitmaps are broken, or the
snapshot table is. Case *number* of seed *seed* is the same image whoever runs it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.images.matrix import Row, describe
from tests.images.random_damage import KINDS
from tests.oracle.campaign import GROUP_CASES, damaged_images, row_of
from tests.oracle.repair_judge import Judgement, judge_choices
from tests.oracle.scene import Scene

_OF_TWO_OWNERS = ("-twin", "-elsewhere", "-compressed", "-zero-allocated")
_OF_HEADER = ("header-nb_snapshots", "header-snapshots_offset", "header-l1_table_offset")
_OF_TABLES = ("snapshot-l1-offset", "snapshot-l1-size", "snapshot-id-size", "snapshot-name-size")

DAMAGES = tuple(
    name
    for name in KINDS
    if name.endswith(_OF_TWO_OWNERS)
    or name.startswith("bitmap")
    or name in (*_OF_HEADER, *_OF_TABLES, "snapshot-extra-data-size")
)
"""Kinds of damage after which something has to be chosen, or may have to be."""


@dataclass(frozen=True, slots=True)
class ChoiceCase:
    """One image, and what came of each tier that may have something to do."""

    seed: int
    number: int
    row: Row
    damages: tuple[str, ...]
    judgements: tuple[Judgement, ...]

    @property
    def passed(self) -> bool:
        return not any(judged.faults for judged in self.judgements)

    def __str__(self) -> str:
        again = f"python -m tests.oracle --choices --seed {self.seed} --only {self.number}"
        lines = [
            f"seed {self.seed}, case {self.number}, row {self.row.name} ({describe(self.row)})",
            *(f"  damage: {damage}" for damage in self.damages),
            *map(str, self.judgements),
            f"  again: {again} --keep DIR",
        ]
        return "\n".join(lines)


def run_choice_group(
    seed: int, group: int, only: int | None = None, keep: Path | None = None
) -> Iterator[ChoiceCase]:
    """Judge the cases of *group*. *only*: this case alone. *keep*: its image stays here."""
    row = row_of(seed, group)

    def damage(scene: Scene, number: int) -> tuple[str, ...]:
        return _inflict(scene, random.Random(f"choice {seed} {number}"))

    first = group * GROUP_CASES
    wanted = range(first, first + GROUP_CASES) if only is None else (only,)
    images = damaged_images(row, seed, group, damage, wanted=wanted, keep=keep)
    for number, damages, image in images:
        yield ChoiceCase(seed, number, row, damages, tuple(judge_choices(row, image)))


def _inflict(scene: Scene, rng: random.Random) -> tuple[str, ...]:
    """One or two kinds of damage, of those that there is something for; a line each."""
    done: list[str] = []
    for _ in range(rng.choice((1, 1, 2))):
        for name in rng.sample(DAMAGES, len(DAMAGES)):
            what = KINDS[name].inflict(scene, rng)
            if what is not None:
                done.append(f"{name}: {what}")
                break
    return tuple(done)
