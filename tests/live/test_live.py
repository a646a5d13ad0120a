"""Beside a real program that writes: a healthy image is never called corrupt, damage is found."""

from __future__ import annotations

import pytest

from tests.live.campaign import SHAPES, faults, missed, session, starts, starts_beside_a_mount
from tests.live.writer import CALM

CHECKS = 2


@pytest.mark.parametrize("name", ["64k", "4k-little"])
def test_a_healthy_image_is_never_called_corrupt(name: str, seed: int, cases: int) -> None:
    found = session(name, seed, max(CHECKS, cases // 100))
    assert not found.skipped
    assert not faults(found)
    assert found.done["allocate"] > 0
    assert found.after is not None
    assert found.after.code in (0, 3)
    assert all(answer.verdict != "torn" for answer in found.ours)


@pytest.mark.parametrize("damage", ["l2-reserved-bit", "snapshot-l1-past-end"])
def test_damage_where_nobody_writes_is_found(damage: str, seed: int) -> None:
    found = session("4k-little", seed, 1, CALM, damage)
    assert not found.skipped
    assert found.stayed
    assert not faults(found) + missed(found)
    assert all(answer.confirmed for answer in found.ours)


def test_damage_where_somebody_writes_is_not_called_clean(seed: int) -> None:
    found = session("4k-little", seed, 2, damage="l2-reserved-bit", quiet=False)
    assert not found.skipped
    assert not faults(found)


def test_no_check_keeps_a_machine_from_starting() -> None:
    started, failed = starts("4k-little", 2)
    assert started
    assert not failed


def test_a_mount_keeps_no_machine_from_starting_for_longer_than_its_check() -> None:
    beside = starts_beside_a_mount("4k-little", 3)
    assert not beside.failed
    assert beside.verdicts == ["clean"] * 3


def test_shapes_are_of_every_cluster_size_and_width() -> None:
    shapes = SHAPES.values()
    assert {shape.cluster_size for shape in shapes} >= {512, 4096, 65536, 2 << 20}
    assert {shape.refcount_bits for shape in shapes} >= {1, 16, 64}
    assert any(shape.extended_l2 for shape in shapes)
    assert any(shape.lazy_refcounts for shape in shapes)
