"""instarfs.repair.planning: a plan is of one moment, or there is none."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from instarfs.errors import RepairPending
from instarfs.image.directory import SUFFIX
from instarfs.image.file import Image
from instarfs.repair import planning
from planner.errors import AmbiguousCorruption, RepairError
from planner.repair.plan import RepairTier
from planner.repair.tiers import Proposal
from tests.images import builder
from tests.images.damage import DAMAGES
from tests.instarfs.repair.test_run import healthy

CHANGED = "the image changed while it was {}; stop its writer first"


def damage(path: Path, *names: str) -> None:
    made = builder.Image(bytearray(healthy()))
    for name in names:
        DAMAGES[name](made, random.Random(1))
    path.write_bytes(bytes(made.data))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "image.qcow2"
    damage(path, "wrong-copied")
    os.utime(path, (0, 0))  # so that a write shows in its times, whatever the clock's tick
    return path


def plan(path: Path, tier: RepairTier = RepairTier.ALL) -> Proposal:
    with Image.open(str(path)) as image:
        return planning.run_plan(image, tier)


def around(
    name: str, monkeypatch: pytest.MonkeyPatch, step: Callable[[], object], *, first: bool
) -> None:
    """Do *step* just before, or just after, the function *name* of the module does its work."""
    work = getattr(planning, name)

    def worked(*arguments: Any, **options: Any) -> Any:
        if first:
            step()
        try:
            return work(*arguments, **options)
        finally:
            if not first:
                step()

    monkeypatch.setattr(planning, name, worked)


def test_a_plan_of_an_image_that_nobody_touches(path: Path) -> None:
    assert plan(path).planned == 1


@pytest.mark.parametrize(("name", "when"), [("check_image", "checked"), ("propose", "planned")])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_an_image_that_is_written_to_meanwhile_has_no_plan(
    name: str,
    when: str,
    first: bool,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    around(name, monkeypatch, partial(damage, path, "leaked-clusters"), first=first)
    with pytest.raises(AmbiguousCorruption) as refused:
        plan(path)
    assert str(refused.value) == CHANGED.format(when)


def test_a_refusal_that_may_come_of_a_write_says_so(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(path, "shared-cluster", "lost-refblock", "leaked-clusters")
    os.utime(path, (0, 0))
    with pytest.raises(RepairError) as before:
        plan(path, RepairTier.LEAKS)
    around("propose", monkeypatch, partial(damage, path, "leaked-clusters"), first=False)
    with pytest.raises(RepairError) as refused:
        plan(path, RepairTier.LEAKS)
    assert str(refused.value) == CHANGED.format("planned") != str(before.value)


def test_nothing_is_planned_on_an_interrupted_repair(path: Path) -> None:
    path.with_name(path.name + SUFFIX).write_bytes(b"not an undo file")
    with pytest.raises(RepairPending) as refused:
        plan(path)
    assert str(refused.value).startswith(f"{path}: ")
