"""A plan as a value: what a draft says, its stages, its inverse, its identity, and the overlay."""

import itertools
import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from planner.findings.kinds import FindingKind, Structure
from planner.repair.draft import Draft
from planner.repair.overlay import Overlay
from planner.repair.plan import MAX_EDITS, Edit, Plan, RepairTier, StageKind
from planner.source import SECTOR, Bytes, read_bytes

SIZE = 5000
DATA = bytes(np.random.default_rng(1).integers(0, 256, SIZE, dtype=np.uint8))

kinds = st.sampled_from(StageKind)
any_bytes = st.tuples(kinds, st.integers(0, 2 * SIZE), st.binary(min_size=1, max_size=1200))
whole_sectors = st.tuples(
    kinds,
    st.integers(0, 12).map(lambda sector: sector * SECTOR),
    st.sampled_from([DATA[: 2 * SECTOR], bytes(SECTOR), b"\xff" * 3 * SECTOR]),
)
writes = st.lists(any_bytes, max_size=6) | st.lists(whole_sectors | any_bytes, max_size=6)
sizes = st.sampled_from([SIZE, 3 * SIZE, SIZE // 2])


def draft_one(draft: Draft, kind: StageKind, offset: int, data: bytes) -> None:
    """As a table, where it is one."""
    if offset % SECTOR or len(data) % SECTOR:
        draft.write(kind, offset, data)
    else:
        rows = np.frombuffer(data, dtype=np.uint8).reshape(1, -1)
        draft.write_tables(kind, np.array([offset]), rows)


def drafted(steps: list[tuple[StageKind, int, bytes]], size: int = SIZE) -> Plan:
    draft = Draft(Bytes(DATA))
    for step in steps:
        draft_one(draft, *step)
    draft.size = size
    return draft.plan(RepairTier.ALL)


def drafted_in_steps(steps: list[tuple[StageKind, int, bytes]], size: int) -> Plan:
    """The same plan, looked at after each step, with stages that are withdrawn and drafted anew."""
    draft = Draft(Bytes(DATA))
    for kind, offset, data in steps:
        draft_one(draft, kind, offset, data[::-1])
        draft.overlay()
    for kind in StageKind:
        draft.withdraw(kind)
    assert draft.is_empty
    for step in steps:
        draft_one(draft, *step)
        draft.overlay()
    draft.size = size
    return draft.plan(RepairTier.ALL)


def by_hand(steps: list[tuple[StageKind, int, bytes]], size: int) -> bytes:
    """The file after all writes, stage by stage."""
    content = bytearray(DATA.ljust(4 * SIZE, b"\0"))
    for _, offset, data in sorted(steps, key=lambda step: step[0]):
        content[offset : offset + len(data)] = data
    return bytes(content[:size])


@given(steps=writes, size=sizes)
def test_the_overlay_is_the_file_after_all_writes(steps, size) -> None:
    overlay = Overlay(Bytes(DATA), drafted(steps, size))
    assert overlay.size == size
    assert read_bytes(overlay, 0, size) == by_hand(steps, size)


@given(steps=writes, size=sizes)
def test_a_draft_that_is_looked_at_meanwhile_becomes_the_same_plan(steps, size) -> None:
    assert drafted_in_steps(steps, size) == drafted(steps, size)


def test_a_draft_has_another_revision_after_every_change() -> None:
    draft = Draft(Bytes(DATA))
    seen = [draft.revision]
    for change in (
        lambda: draft.write(StageKind.GUARD, 0, b"a"),
        lambda: draft.withdraw(StageKind.GUARD),
        lambda: draft.write(StageKind.GUARD, 0, b"b"),
    ):
        change()
        seen.append(draft.revision)
    assert len(set(seen)) == len(seen)


def test_a_stage_that_builds_on_nothing_new_is_not_made_again() -> None:
    draft = Draft(Bytes(DATA))
    draft_one(draft, StageKind.CORRECT, SECTOR, bytes(SECTOR))
    (before,) = draft.plan(RepairTier.ALL).stages
    draft_one(draft, StageKind.GUARD, 72, b"x")
    _, after = draft.plan(RepairTier.ALL).stages
    assert after is before
    draft_one(draft, StageKind.PREPARE, SECTOR, b"y")
    assert draft.plan(RepairTier.ALL).stages[-1].before[0, 0] == ord("y")


def test_what_is_drafted_is_held_once() -> None:
    size, batch = 32 << 20, 2 << 20
    draft = Draft(Bytes(bytes(size)))
    tracemalloc.start()
    try:
        for at in range(0, size, batch):
            rows = np.ones((32, batch // 32), dtype=np.uint8)
            draft.write_tables(StageKind.CORRECT, at + np.arange(32) * rows.shape[1], rows)
        plan = draft.plan(RepairTier.ALL)
        assert plan.stages[0].changed_bytes() == size
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 2.1 * size
    assert peak < 2.5 * size


@given(steps=writes, size=sizes, start=st.integers(0, SIZE), length=st.integers(1, 3000))
def test_the_overlay_reads_alike_at_any_offset(steps, size, start, length) -> None:
    overlay = Overlay(Bytes(DATA), drafted(steps, size))
    expected = by_hand(steps, size)[start : start + length].ljust(length, b"\0")
    assert read_bytes(overlay, start, length) == expected


@given(steps=writes, size=sizes)
def test_all_that_is_not_zero_lies_in_an_extent(steps, size) -> None:
    overlay = Overlay(Bytes(DATA), drafted(steps, size))
    outside = bytearray(read_bytes(overlay, 0, size))
    end = -1
    for start, stop in overlay.data_extents(0, 4 * SIZE):
        assert end < start < stop <= size
        end = stop
        outside[start:stop] = bytes(stop - start)
    assert not any(outside)


@given(steps=writes)
def test_the_inverse_takes_every_byte_back(steps) -> None:
    plan = drafted(steps, 4 * SIZE)
    assert plan.inverse().inverse() == plan
    after = Bytes(by_hand(steps, 4 * SIZE))
    back = Overlay(after, plan.inverse())
    assert back.size == SIZE
    assert read_bytes(back, 0, SIZE) == DATA


@given(steps=writes)
def test_patches_change_every_byte_and_never_overlap(steps) -> None:
    for stage in drafted(steps, 4 * SIZE).stages:
        end = 0
        for patch in stage.patches():
            assert patch.offset >= end
            end = patch.offset + len(patch.after)
            assert all(a != b for a, b in zip(patch.before, patch.after, strict=True))
        assert stage.changed_bytes() == sum(len(patch.after) for patch in stage.patches())


@given(steps=writes)
def test_stages_stand_in_their_order_and_none_is_empty(steps) -> None:
    stages = drafted(steps, 4 * SIZE).stages
    assert [stage.kind for stage in stages] == sorted({stage.kind for stage in stages})
    assert all(len(stage.sectors) for stage in stages)


def test_what_changes_nothing_is_no_stage() -> None:
    plan = drafted([(StageKind.CORRECT, 700, DATA[700:900])])
    assert plan.changes_nothing


def test_the_id_is_that_of_what_is_done() -> None:
    one = drafted([(StageKind.CORRECT, 10, b"a")])
    assert one.id == drafted([(StageKind.CORRECT, 10, b"a")]).id
    assert one.id != drafted([(StageKind.CORRECT, 10, b"b")]).id
    assert one.id != drafted([(StageKind.RELEASE, 10, b"a")]).id
    assert one.id != drafted([(StageKind.CORRECT, 10, b"a")], SIZE + 1).id


def test_an_id_is_quoted_by_itself_or_its_first_six_digits() -> None:
    plan = drafted([(StageKind.CORRECT, 10, b"a")])
    assert plan.is_quoted_by(plan.id)
    assert plan.is_quoted_by(plan.id[:6])
    assert plan.is_quoted_by(plan.id.upper())
    assert not plan.is_quoted_by(plan.id[:5])
    assert not plan.is_quoted_by(plan.id + "0")
    assert not plan.is_quoted_by("")


def test_a_stage_knows_the_bytes_before_and_after() -> None:
    (stage,) = drafted([(StageKind.CORRECT, SECTOR - 1, b"xy")]).stages
    before, after = stage.bytes_at(SECTOR - 2, 4)
    assert before == DATA[SECTOR - 2 : SECTOR + 2]
    assert after == before[:1] + b"xy" + before[3:]
    assert stage.bytes_at(3 * SECTOR, 4) == (b"", b"")


def test_edits_past_the_limit_are_counted_and_not_kept() -> None:
    draft = Draft(Bytes(DATA))
    edit = Edit(StageKind.CORRECT, Structure.REFBLOCK, FindingKind.LEAK, 0, 2, 1)
    draft.explain(lambda: itertools.repeat(edit), MAX_EDITS + 5)
    plan = draft.plan(RepairTier.LEAKS)
    assert len(plan.edits) == MAX_EDITS
    assert plan.edit_count == MAX_EDITS + 5
