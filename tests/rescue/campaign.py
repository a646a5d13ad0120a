"""Cases of a campaign: an aged disk, a loss, and what a rescue makes of it, held to the truth."""

from __future__ import annotations

import random
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from instarfs.image.file import Image
from instarfs.repair.rescue import write_copy
from planner.errors import PlannerError
from planner.rescue.rescue import Rescue, rescue
from tests.rescue.disks import MIB, Made
from tests.rescue.losses import Truth, lose

FILE_SYSTEMS = ("ext4", "xfs", "ntfs")
TABLES = ("gpt", "mbr", "none")
SHAPES = ((14, 2048 * MIB), (16, 12 * 1024 * MIB))


def made(seed: int, number: int) -> Made:
    """How the disk of that number is made."""
    rng = random.Random(f"made {seed} {number}")
    bits, size = SHAPES[number // 3 % 2]
    return Made(
        filesystem=FILE_SYSTEMS[number % 3],
        table=rng.choice(TABLES),
        cluster_bits=bits,
        size=size,
        files=rng.randrange(100, 300),
        snapshot=rng.random() < 0.5,
    )


@dataclass(slots=True)
class Case:
    """What came of one: numbers of tables by sort, and what is wrong, in words."""

    name: str
    tables: Counter[str] = field(default_factory=Counter)
    placed: Counter[str] = field(default_factory=Counter)
    by_order: int = 0
    wrong: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)


def run_case(image: Path, how: Made, truth: Truth, loss: str, seed: str) -> Case:
    """One loss of *image*, which is left as it is."""
    case = Case(f"{how}, {loss}")
    damaged, out = image.with_suffix(".damaged"), image.with_suffix(".out")
    lose(image, damaged, loss, truth, seed)
    before = damaged.read_bytes() if damaged.stat().st_size < 64 * MIB else None
    try:
        with Image.open(str(damaged)) as opened:
            found = rescue(opened.source())
            _judge(case, truth, found)
            out.unlink(missing_ok=True)
            write_copy(opened, opened.generation(), found.plan, str(out))
        _judge_outcome(case, image, out, found)
        if before is not None and damaged.read_bytes() != before:
            case.wrong.append("the source was changed")
    except PlannerError as error:
        case.wrong.append(f"{type(error).__name__}: {error}")
    finally:
        damaged.unlink(missing_ok=True)
        out.unlink(missing_ok=True)
    return case


def _judge(case: Case, truth: Truth, found: Rescue) -> None:
    lost = {each.offset: each for each in found.placements}
    for offset, index in truth.tables.items():
        if offset in lost and offset in truth.with_data:
            sort = "metadata" if index in truth.of_metadata else "data"
            case.tables[sort] += 1
            case.placed[sort] += lost[offset].placed
            if not lost[offset].placed:
                case.missed.append(f"{sort} {index}: {lost[offset]}")
    for each in found.placements:
        if each.placed and truth.tables.get(each.offset) != each.l1_index:
            case.wrong.append(f"{each} belongs to {truth.tables.get(each.offset)}")
    kept = {index for offset, index in truth.tables.items() if offset not in lost}
    vacant = [n for n in range(truth.header.geometry.l1_entries_needed) if n not in kept]
    order = zip(sorted(lost), vacant, strict=False)
    case.by_order = sum(truth.tables.get(offset) == index for offset, index in order)


def _judge_outcome(case: Case, image: Path, out: Path, found: Rescue) -> None:
    if not found.placements or found.placed < len(found.placements):
        return
    same = subprocess.run(
        ["qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", image, out],
        check=False,
        capture_output=True,
        text=True,
    )
    if same.returncode:
        case.wrong.append(f"the disk reads otherwise: {same.stdout}{same.stderr}")
    clean = subprocess.run(
        ["qemu-img", "check", "-f", "qcow2", out], check=False, capture_output=True, text=True
    )
    # What leaks is no harm: tables of nothing but zeros.
    if clean.returncode not in (0, 3):
        case.wrong.append(f"qemu-img check: {clean.stdout[-300:]}{clean.stderr[-300:]}")
