"""The simulated program is one that QEMU could be; and no check is misled by it."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.check.check import check_image
from planner.check.report import Report
from planner.findings.kinds import FindingKind
from planner.source import Bytes
from tests.images.builder import Image
from tests.live.interleave import (
    KINDS,
    WRITTEN,
    Kind,
    Schedule,
    Stretch,
    build,
    damaged,
    judge,
    quiet_parts,
    run,
    run_case,
)
from tests.live.model import ACTIONS, WORD, Program, Step, Truncate, act, apply

COPIED = {FindingKind.L1_COPIED, FindingKind.L2_COPIED}
"""What QEMU leaves wrong while it takes or deletes a snapshot, and mends at the end."""

OF_REFCOUNTS = {*COPIED, FindingKind.REFCOUNT_LOW, FindingKind.REFCOUNT_MISSING}
HARMLESS = {FindingKind.LEAK, FindingKind.LEAK_PAST_END, FindingKind.DIRTY_BIT}

Watch = Callable[[str, Step, bytearray], None]


def live(kind: Kind, seed: int, acts: int, watch: Watch | None = None) -> Program:
    """A program that does so much, each write as it comes."""
    rng = random.Random(seed)
    program = Program(bytes(build(kind).data), rng, limit=rng.choice((1, 2, 8)), lazy=kind.lazy)
    for _ in range(acts):
        name = act(program, rng, range(WRITTEN), tuple(ACTIONS))
        while program.pending:
            step = program.pending.popleft()
            apply(program.file, step)
            if watch is not None:
                watch(name, step, program.file)
    return program


def look(file: bytearray) -> Report:
    return check_image(Bytes(bytes(file)))


@pytest.mark.parametrize("kind", KINDS)
def test_between_two_writes_there_is_never_a_corruption(kind: Kind) -> None:
    cut: list[bool] = [False]

    def watch(name: str, step: Step, file: bytearray) -> None:
        cut[0] = isinstance(step, Truncate) or (cut[0] and name == "shrink")
        found = set(look(file).counts()) - HARMLESS
        if name in ("snapshot", "delete_snapshot"):
            found -= COPIED
        if kind.lazy:
            found -= OF_REFCOUNTS
        if cut[0]:  # the file, before the entries that lead past its end are written
            found -= {FindingKind.PAST_END}
        assert not found, (name, step)

    live(kind, 1, 40, watch)


@pytest.mark.parametrize("kind", KINDS)
def test_qemu_img_finds_nothing_once_the_program_has_ended(kind: Kind, tmp_path: Path) -> None:
    program = live(kind, 2, 150)
    program.close()
    program.run_to_end()
    image = tmp_path / "image.qcow2"
    image.write_bytes(program.file)
    done = subprocess.run(
        ["qemu-img", "check", "-f", "qcow2", image], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_action_is_done_and_writes() -> None:
    seen = set()
    for seed in range(4):
        live(Kind(), seed, 150, lambda name, step, file: seen.add(name))
    assert seen == set(ACTIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_quiet_does_not_change(kind: Kind) -> None:
    """Snapshots apart, which count every cluster once more."""
    rng = random.Random(3)
    image = build(kind)
    program = Program(bytes(image.data), rng, lazy=kind.lazy)
    names = tuple(
        name
        for name in ACTIONS
        if "snapshot" not in name and name not in ("grow", "shrink", "move_reftable")
    )
    for _ in range(150):
        act(program, rng, range(WRITTEN), names)
    program.close()
    program.run_to_end()
    words, clusters = quiet_parts(image)
    for at in words:
        assert program.file[at : at + WORD] == image.data[at : at + WORD]
    before, after = image.refcounts(), Image(program.file).refcounts()
    assert clusters
    assert all(before[cluster] == after[cluster] for cluster in clusters)


def test_no_check_is_misled(seed: int, cases: int) -> None:
    """Whatever the schedule: no false alarm, and nothing missed that was there before."""
    for number in range(cases // 15):
        case = run_case(seed, number)
        assert not case.wrong, case


class Drawn(Stretch):
    """The stretches that hypothesis has chosen, over and over."""

    def __init__(self, stretches: list[tuple[int, int]]) -> None:
        self._stretches, self._at = stretches, 0

    def reading(self) -> int:
        self._at += 1
        return self._stretches[self._at % len(self._stretches)][0]

    def writing(self) -> int:
        return self._stretches[self._at % len(self._stretches)][1]


STRETCH = st.tuples(st.integers(1, 200), st.integers(1, 200))


@settings(max_examples=25)
@given(
    kind=st.sampled_from(KINDS),
    stretches=st.lists(STRETCH, min_size=1, max_size=12),
    actions=st.lists(st.sampled_from(sorted(ACTIONS)), min_size=1, max_size=6),
    acts=st.integers(1, 60),
    guests=st.integers(1, 4),
    number=st.integers(0, 1 << 16),
    is_damaged=st.booleans(),
)
def test_no_schedule_is_found_that_misleads_a_check(
    *,
    kind: Kind,
    stretches: list[tuple[int, int]],
    actions: list[str],
    acts: int,
    guests: int,
    number: int,
    is_damaged: bool,
) -> None:
    rng = random.Random(number)
    image = build(kind)
    damage = damaged(image, rng) if is_damaged and not kind.lazy else None
    if damage is not None:
        actions = [name for name in actions if "snapshot" not in name] or ["write"]
    plan = Schedule(1, 1, acts, guests, tuple(actions), settle=0.05)
    report, _ = run(kind, image, plan, rng, Drawn(stretches))
    assert not judge(report, damage), damage
