"""A campaign of repairs: the images of `tests.oracle.campaign`, each repaired under both tiers.

Case *number* of seed *seed* is the same image as there. Nothing here says what a repair must do.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.images.matrix import BASE_NAME, Row, describe
from tests.oracle.campaign import images_of_group, row_of
from tests.oracle.reach import Reach, reaches
from tests.oracle.repair_judge import Judgement, judge_repairs

COMMAND_EVERY = 61
"""One case in so many is also repaired with the real command, which takes Python starts. A prime:
so that it is not always the same case of a group."""


AGAIN = "python -m tests.oracle --repair"


@dataclass(frozen=True, slots=True)
class RepairCase:
    """One image, repaired under both tiers. ``reaches``: what QEMU mends of it, where measured."""

    seed: int
    number: int
    row: Row
    damages: tuple[str, ...]
    judgements: tuple[Judgement, ...]
    reaches: tuple[Reach, ...] = ()

    @property
    def passed(self) -> bool:
        return not any(judged.faults for judged in self.judgements)

    def __str__(self) -> str:
        lines = [
            f"seed {self.seed}, case {self.number}, row {self.row.name} ({describe(self.row)})",
            *(f"  damage: {damage}" for damage in self.damages),
            *map(str, self.judgements),
            *map(str, self.reaches),
            f"  again: {AGAIN} --seed {self.seed} --only {self.number} --keep DIR",
        ]
        return "\n".join(lines)


def run_repair_group(
    seed: int,
    group: int,
    wanted: Container[int],
    keep: Path | None = None,
    *,
    measure: bool = False,
) -> Iterator[RepairCase]:
    """Judge the wanted cases of *group*. *keep*: leave the images in this directory.

    *measure*: beside the repairs that QEMU makes without loss, too.
    """
    row = row_of(seed, group)
    for number, damages, image in images_of_group(seed, group, wanted, keep):
        judged = judge_repairs(row, image, command=number % COMMAND_EVERY == 0)
        reached = reaches(row, image.with_name(BASE_NAME), image) if measure else ()
        yield RepairCase(seed, number, row, tuple(damages), tuple(judged), tuple(reached))
