"""A campaign: groups of cases, each group one base image, each case a damaged copy of it.

Case *number* of seed *seed* is always the same row, image content and damage, whoever runs it: a
pytest run, the process pool of `python -m tests.oracle`, or one case alone.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.images.matrix import MATRIX, Row, build, copy, describe, random_row
from tests.images.random_damage import inflict_some
from tests.oracle.judge import Judgement, judge
from tests.oracle.scene import Scene, dissect

Damages = TypeVar("Damages", list[str], tuple[str, ...])

GROUP_CASES = 5
COMMAND_EVERY = 61
"""One case in so many also runs the real command, which takes a Python start. A prime: so that it
is not always the same case of a group."""


@dataclass(frozen=True, slots=True)
class Case:
    """One image that both checks were asked about."""

    seed: int
    number: int
    row: Row
    damages: tuple[str, ...]
    judgement: Judgement

    def __str__(self) -> str:
        judged = self.judgement
        lines = [
            f"seed {self.seed}, case {self.number}, row {self.row.name} ({describe(self.row)})",
            *(f"  damage: {damage}" for damage in self.damages),
            f"  qemu:   {judged.qemu}",
            f"  ours:   {judged.ours}",
            *(f"  differs: {difference}" for difference in judged.differences),
            *(f"  fault:   {fault}" for fault in judged.faults),
            f"  again:  python -m tests.oracle --seed {self.seed} --only {self.number} --keep DIR",
        ]
        return "\n".join(lines)


def groups(cases: int) -> range:
    """The groups that hold the first *cases* cases."""
    return range(-(-cases // GROUP_CASES))


def row_of(seed: int, group: int) -> Row:
    """The matrix first, a row a group; then combinations."""
    if group < len(MATRIX):
        return MATRIX[group]
    return random_row(random.Random(f"row {seed} {group}"))


def run_group(
    seed: int, group: int, cases: int, only: int | None = None, keep: Path | None = None
) -> Iterator[Case]:
    """Build the base of *group* and judge its cases, those below *cases*.

    *only*: this case alone. *keep*: leave the images in this directory.
    """
    row = row_of(seed, group)
    wanted = range(cases) if only is None else (only,)
    for number, damages, image in images_of_group(seed, group, wanted, keep):
        judged = judge(row, image, command=number % COMMAND_EVERY == 0)
        yield Case(seed, number, row, tuple(damages), judged)


def images_of_group(
    seed: int, group: int, wanted: Container[int], keep: Path | None = None
) -> Iterator[tuple[int, list[str], Path]]:
    """Number, damages and image of each wanted case of *group*; the next replaces the last.

    The first of a group is undamaged.
    """

    def damage(scene: Scene, number: int) -> list[str]:
        if number % GROUP_CASES == 0:
            return []
        return inflict_some(scene, random.Random(f"damage {seed} {number}"))

    return damaged_images(row_of(seed, group), seed, group, damage, wanted=wanted, keep=keep)


def damaged_images(
    row: Row,
    seed: int,
    group: int,
    damage: Callable[[Scene, int], Damages],
    *,
    wanted: Container[int],
    keep: Path | None = None,
) -> Iterator[tuple[int, Damages, Path]]:
    """Number, damages and image of each wanted case of *group*, all copies of one base of *row*.

    *damage*: inflicts what the case of that number has, and tells it. *keep*: the last stays here.
    """
    with tempfile.TemporaryDirectory(prefix="instarfs-oracle-") as name:
        directory = keep or Path(name)
        directory.mkdir(exist_ok=True)
        base = build(row, directory, f"image {seed} {group}")
        anatomy = dissect(base)
        image = base.with_name("case.qcow2")
        for number in range(group * GROUP_CASES, (group + 1) * GROUP_CASES):
            if number not in wanted:
                continue
            copy(base, image)
            with Scene(image, anatomy) as scene:
                damages = damage(scene, number)
            yield number, damages, image
