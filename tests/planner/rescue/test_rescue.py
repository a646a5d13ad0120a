"""planner.rescue.rescue: what a rescue found as a plan, in stages no crash of which is worse."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest

from planner.check.check import check_image
from planner.errors import HeaderUnknown
from planner.findings.kinds import FindingKind
from planner.qcow2.header import Incompatible, decode_header, read_header
from planner.repair.draft import Draft
from planner.repair.overlay import Overlay
from planner.repair.plan import RescueTier, StageKind
from planner.rescue.hypotheses import Hypothesis
from planner.rescue.order import draft_header
from planner.rescue.placing.board import Board
from planner.rescue.placing.place import Placed, find_placements
from planner.rescue.rescue import Rescue, rescue
from planner.source import SECTOR, Bytes, present_bytes, read_bytes
from tests.images.builder import Image, ImageBuilder
from tests.instarfs.repair.test_run import healthy
from tests.planner.rescue.test_headers import without_header
from tests.planner.rescue.test_snapshots import lost, without_both, without_count

UNKNOWN = 1 << 63 | 1 << 5


def rescue_of(data: bytes) -> Rescue:
    return rescue(Bytes(data))


def test_a_sound_image_has_nothing_to_bring_back() -> None:
    found = rescue_of(healthy())
    assert found.plan.changes_nothing
    assert found.count == 0
    assert found.after is found.before


def test_a_header_that_is_gone_comes_back_as_a_plan_of_its_cluster() -> None:
    data = without_header(healthy())
    found = rescue_of(data)
    assert found.plan.tier is RescueTier.RESCUE
    assert found.count == 1
    assert all((stage.sectors * SECTOR < 4096).all() for stage in found.plan.stages)
    rescued = Overlay(Bytes(data), found.plan)
    assert check_image(rescued).counters == found.after.counters
    again = rescue(rescued)
    assert again.plan.changes_nothing


def test_without_a_header_the_file_is_scanned_once() -> None:
    data = without_header(healthy())
    scanned = 0

    def tell(stage: str, done: int, total: int) -> None:
        nonlocal scanned
        if stage == "scan" and done == total == present_bytes(Bytes(data)):
            scanned += 1

    assert rescue(Bytes(data), progress=tell).changes_header
    assert scanned == 1


def test_the_disk_that_tables_were_placed_on_is_let_go_of_before_what_follows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    builder = ImageBuilder(size=1 << 20)
    builder.write(0, b"lost")
    image = builder.build()
    header = read_header(image.source)
    image.data[header.l1_table_offset : header.l1_table_offset + 8] = bytes(8)
    boards: list[weakref.ref[Board]] = []
    kept: list[bool] = []

    def placing(*arguments: object, **means: object) -> Placed | None:
        found = find_placements(*arguments, **means)  # type: ignore[arg-type]
        assert found is not None
        boards.append(weakref.ref(found.board))
        return found

    def leaving(*_arguments: object, **_means: object) -> None:
        gc.collect()
        kept.extend(board() is not None for board in boards)

    monkeypatch.setattr("planner.rescue.rescue.find_placements", placing)
    monkeypatch.setattr("planner.rescue.rescue.leave_out", leaving)
    assert len(rescue(image.source).placements) == 1
    assert kept == [False]


def test_of_garbage_nothing_is_planned() -> None:
    with pytest.raises(HeaderUnknown, match="no header was found"):
        rescue_of(b"no image " * 1000)


def test_what_can_be_read_is_marked_corrupt_while_it_has_parts_of_both() -> None:
    data = healthy()
    before = check_image(Bytes(data))
    header = decode_header(data[:104])
    other = Hypothesis(header, data[:600] + bytes(4096 - 600), before.counters, ("size",))
    draft = Draft(Bytes(data[:600] + b"\xff" * 2000 + data[2600:]))
    draft_header(draft, other, before)
    stages = draft.plan(RescueTier.RESCUE).stages
    assert [stage.kind for stage in stages] == list(StageKind)[:3]
    marked = decode_header(stages[0].after[0].tobytes()[:104])
    assert marked.incompatible_features & Incompatible.CORRUPT
    assert stages[-1].sectors.tolist() == [0]
    assert read_bytes(draft.overlay(), 0, 4096) == other.content


@pytest.mark.parametrize("to", ["refcounts", "l2-table", "data", "behind-the-end", "snapshot"])
@pytest.mark.parametrize(("bits", "size"), [(9, 1 << 17), (16, 1 << 31)])
def test_a_table_that_the_header_leads_past_is_its_again_where_all_agrees_then(
    bits: int, size: int, to: str
) -> None:
    made = ImageBuilder(cluster_bits=bits, size=size)
    made.write(3, b"d" * (2 << bits))
    for quarter in (1, 2, 3):
        made.write((size >> bits + 2) * quarter, b"e")
    made.take_snapshot("one")
    made.write(4, b"f")
    image = made.build()
    true, header = bytes(image.data), image.header
    places = {
        "refcounts": header.refcount_table_offset,
        "l2-table": image.l2_table(0),
        "data": image.host_offset(4),
        "behind-the-end": len(true) + (8 << bits),
        "snapshot": image.snapshots[0].l1_table_offset,
    }
    image.change_header(l1_table_offset=places[to])
    source = image.source
    found = rescue(source)
    assert found.headers.best is not None
    assert found.headers.best.changed == ("l1_table_offset",)
    assert read_bytes(Overlay(source, found.plan), 0, len(true)) == true


def with_autoclear(data: bytes, bits: int = UNKNOWN) -> bytes:
    image = Image(bytearray(data))
    image.change_header(autoclear_features=image.header.autoclear_features | bits)
    return bytes(image.data)


def moved_l1() -> bytes:
    image = Image(bytearray(healthy()))
    image.change_header(l1_table_offset=len(image.data) + (8 << 12))
    return bytes(image.data)


def broken_bitmap() -> bytes:
    image = Image(bytearray(healthy()))
    image.set_bits(image.bitmaps[0].bitmap_table_offset, 1 << 60)
    return bytes(image.data)


LOSSES: dict[str, Callable[[], bytes]] = {
    "l1-table-moved": moved_l1,
    "bitmap": broken_bitmap,
    "snapshot-count": lambda: lost(without_count),
    "snapshot-table": lambda: lost(without_both),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_autoclear_bits_that_are_not_known_go_before_anything_else_is_written(loss: str) -> None:
    data = LOSSES[loss]()
    true, damaged = rescue_of(data), with_autoclear(data)
    known = decode_header(data[:104]).autoclear_features
    found = rescue_of(damaged)
    assert found.count == true.count > 0
    first, *_ = stages = found.plan.stages
    assert first.kind is StageKind.GUARD
    assert first.sectors.tolist() == [0]
    assert first.bytes_at(88, 8) == (
        (known | UNKNOWN).to_bytes(8, "big"),
        known.to_bytes(8, "big"),
    )
    kinds = [stage.kind for stage in stages]
    assert kinds == sorted(set(kinds))
    assert not any(int.from_bytes(each.bytes_at(88, 8)[1], "big") & UNKNOWN for each in stages)
    rescued = Overlay(Bytes(damaged), found.plan)
    as_known = Overlay(Bytes(data), true.plan)
    end = read_bytes(rescued, 0, rescued.size)
    assert end == read_bytes(as_known, 0, as_known.size)
    assert check_image(Bytes(end)).counts() == found.after.counts()
    assert FindingKind.UNKNOWN_AUTOCLEAR in found.before.counts()
    assert FindingKind.UNKNOWN_AUTOCLEAR in {edit.kind for edit in found.plan.edits}
    undone = Overlay(Bytes(end), found.plan.inverse())
    assert read_bytes(undone, 0, len(damaged)) == damaged


def test_they_do_not_come_back_with_a_header_that_made_no_sense() -> None:
    image = Image(bytearray(with_autoclear(healthy())))
    image.data[20:24] = bytes(4)  # cluster_bits
    found = rescue(image.source)
    assert found.changes_header
    header = read_header(Overlay(image.source, found.plan))
    assert header.cluster_bits == 12
    assert not header.unknown_autoclear


def test_where_nothing_is_brought_back_they_stay() -> None:
    found = rescue_of(with_autoclear(healthy()))
    assert found.plan.changes_nothing
    assert found.count == 0
    assert found.after is found.before
    assert FindingKind.UNKNOWN_AUTOCLEAR in found.after.counts()
