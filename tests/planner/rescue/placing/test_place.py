"""planner.rescue.placing: tables that nothing leads to, put where the guest's blocks say they lie.

The truth is the image before its L1 table was overwritten. `python -m tests.rescue` is the same of
aged disks, many of them.
"""

from __future__ import annotations

import functools
import random
import subprocess
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from planner.check.check import check_image
from planner.errors import AmbiguousCorruption
from planner.findings.kinds import NONE
from planner.guestfs.work import FOR_A_BYTE, WorkSpent
from planner.qcow2 import entries
from planner.qcow2.geometry import Geometry
from planner.qcow2.header import Header, read_header
from planner.repair.overlay import Overlay
from planner.repair.plan import RepairTier, StageKind
from planner.repair.tiers import propose
from planner.rescue import rescue as rescue_module
from planner.rescue.placing import place as place_module
from planner.rescue.placing.board import Board
from planner.rescue.placing.claims import Collector
from planner.rescue.placing.grid import ZEROS, Grid, read_grid
from planner.rescue.placing.place import Placed, with_candidates
from planner.rescue.placing.placements import LISTED_CANDIDATES, Placements
from planner.rescue.placing.solve import Solver
from planner.rescue.placing.tables import A_SNAPSHOTS, NO_WINDOW, L1Table, Tables
from planner.rescue.rescue import Rescue, rescue
from planner.source import Bytes, nonzero_words, read_bytes
from tests.images.builder import ImageBuilder
from tests.images.guest_files import make_disk, make_ext, make_tree
from tests.images.guest_filled import make_fat, make_xfs, plain_tree

MIB = 1 << 20


@functools.cache
def image(kind: str, table: str, cluster_size: int = 4096) -> bytes:
    """A qcow2 file with a file system on its disk; with clusters of 4 KiB a table maps 2 MiB."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        part, tree = folder / "part", folder / "tree"
        if kind == "vfat":
            plain_tree(tree, 1)
            make_fat(part, tree, "FAT32")
        else:
            make_tree(tree, 1, files=60)
        if kind == "xfs":
            make_xfs(part, tree, [])
        elif kind != "vfat":
            make_ext(part, tree, ["-t", kind, "-b", "1024"], 40 * MIB)
        disk = part
        if table != "none":
            disk, size = folder / "disk", part.stat().st_size
            script = f"label: {'dos' if table == 'mbr' else 'gpt'}\nstart=2048, size={size >> 9}\n"
            make_disk(disk, script, {}, size + 2 * MIB)
            command = ["dd", f"if={part}", f"of={disk}", "bs=1M", "seek=1", "conv=notrunc,sparse"]
            subprocess.run(command, check=True, capture_output=True)
        out = folder / "out"
        convert = ["qemu-img", "convert", "-O", "qcow2", "-o", f"cluster_size={cluster_size}"]
        subprocess.run([*convert, disk, out], check=True)
        return out.read_bytes()


def header_of(data: bytes) -> Header:
    return read_header(Bytes(data))


def truth(data: bytes) -> dict[int, int]:
    """Of each L2 table, by its offset, the L1 index that leads there."""
    header = header_of(data)
    index, words = nonzero_words(Bytes(data), header.l1_table_offset, header.l1_size)
    return dict(zip(entries.l1_offsets(words).tolist(), index.tolist(), strict=True))


def without_l1(data: bytes, garbage: bytes = b"\0") -> bytes:
    header = header_of(data)
    start, length = header.l1_table_offset, header.l1_size * 8
    filled = (garbage * length)[:length]
    return data[:start] + filled + data[start + length :]


def without(data: bytes, *losses: str) -> bytes:
    """*data* with zeros instead of its header, L1 table or refcounts."""
    header, damaged = header_of(data), bytearray(data)
    size = header.geometry.cluster_size
    places = {
        "header": [(0, size)],
        "l1": [(header.l1_table_offset, header.l1_size * 8)],
        "refcounts": [(header.refcount_table_offset, header.refcount_table_clusters * size)],
    }
    for loss in losses:
        for start, length in places[loss]:
            damaged[start : start + length] = bytes(length)
    return bytes(damaged)


def compared(tmp_path: Path, damaged: bytes, found: Rescue, data: bytes) -> str:
    """What QEMU says of the outcome, and whether it reads the same of it as of *data*."""
    source, after = Bytes(damaged), bytearray(found.plan.size_after)
    Overlay(source, found.plan).read_into(0, memoryview(after))
    before, out = tmp_path / "before", tmp_path / "out"
    before.write_bytes(data)
    out.write_bytes(after)
    commands: tuple[list[str | Path], ...] = (
        ["qemu-img", "check", "-q", "-f", "qcow2", out],
        ["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2", before, out],
    )
    done = (subprocess.run(each, check=False, capture_output=True, text=True) for each in commands)
    return "".join(each.stdout + each.stderr for each in done)


def wrong(found: Rescue, data: bytes) -> list[int]:
    """Tables that were put where they do not belong."""
    right = truth(data)
    return [
        each.offset
        for each in found.placements
        if each.placed and right.get(each.offset) != each.l1_index
    ]


@pytest.mark.parametrize(
    ("kind", "table"),
    [
        ("ext4", "none"),
        ("ext4", "mbr"),
        ("ext4", "gpt"),
        ("ext2", "mbr"),
        ("xfs", "gpt"),
        ("vfat", "mbr"),
    ],
)
def test_tables_are_put_where_the_file_system_says_that_they_lie(kind: str, table: str) -> None:
    data = image(kind, table)
    found = rescue(Bytes(without_l1(data)))
    assert not wrong(found, data)
    assert found.placed * 2 > len(found.placements)


@pytest.mark.parametrize("garbage", [b"\xff", random.Random(1).randbytes(4096)])
def test_it_does_not_matter_what_lies_in_the_l1_table_instead(garbage: bytes) -> None:
    data = image("ext4", "gpt")
    found, same = (rescue(Bytes(without_l1(data, each))) for each in (garbage, b"\0"))
    assert list(found.placements) == list(same.placements)


def test_where_all_is_placed_the_outcome_is_what_it_was(tmp_path: Path) -> None:
    data = image("ext4", "gpt")
    lost = [word for word in sorted(truth(data).values()) if word < 2]
    header, damaged = header_of(data), bytearray(data)
    for index in lost:
        start = header.l1_table_offset + index * 8
        damaged[start : start + 8] = bytes(8)
    source = Bytes(bytes(damaged))
    found = rescue(source)
    assert found.placed == len(found.placements) == len(lost)
    assert found.after.verdict == "clean"
    after = bytearray(len(data))
    Overlay(source, found.plan).read_into(0, memoryview(after))
    assert bytes(after) == data


@pytest.mark.parametrize(
    "losses", [("l1",), ("header", "l1"), ("l1", "refcounts"), ("header", "l1", "refcounts")]
)
def test_whatever_is_gone_with_the_l1_table_comes_back(
    losses: tuple[str, ...], tmp_path: Path
) -> None:
    data = image("xfs", "gpt", 16384)
    damaged = without(data, *losses)
    found = rescue(Bytes(damaged))
    assert not wrong(found, data)
    assert found.placed == len(found.placements) == len(truth(data))
    assert found.after.verdict == "clean"
    assert compared(tmp_path, damaged, found, data) == ""


def test_the_plan_taken_back_is_the_image_as_it_was() -> None:
    source = Bytes(without_l1(image("xfs", "gpt")))
    found = rescue(source)
    undone = Overlay(Overlay(source, found.plan), found.plan.inverse())
    back = bytearray(source.size)
    undone.read_into(0, memoryview(back))
    assert bytes(back) == source.data


def test_with_tables_that_are_placed_the_autoclear_bits_go_that_are_not_known() -> None:
    data = without_l1(image("xfs", "gpt"))
    with_bit = data[:88] + b"\x80" + data[89:]
    found = rescue(Bytes(with_bit))
    assert found.placed
    assert found.plan.stages[0].kind is StageKind.GUARD
    assert all(stage.bytes_at(88, 1)[1] in (b"", b"\0") for stage in found.plan.stages)
    ends = [Overlay(Bytes(each), rescue(Bytes(each)).plan) for each in (data, with_bit)]
    assert read_bytes(ends[0], 0, ends[0].size) == read_bytes(ends[1], 0, ends[1].size)


def test_what_is_not_proven_cannot_be_read() -> None:
    data = image("xfs", "gpt")
    found = rescue(Bytes(without_l1(data)))
    assert found.placed < len(found.placements)
    placed = {each.l1_index for each in found.placements if each.placed}
    assert set(truth(data).values()) <= placed | set(found.holes)


def test_what_is_not_proven_is_named_with_its_candidates() -> None:
    data = image("xfs", "gpt")
    found = rescue(Bytes(without_l1(data)))
    placed = {each.l1_index for each in found.placements if each.placed}
    listed: set[int] = set()
    for each in found.placements:
        assert (each.candidate_count == 0) == each.placed
        assert len(each.candidates) == min(each.candidate_count, LISTED_CANDIDATES)
        listed |= set(each.candidates)
        if not each.placed and each.candidate_count <= LISTED_CANDIDATES:
            assert truth(data)[each.offset] in each.candidates
    assert listed <= set(found.holes)
    assert not placed & set(found.holes)


def test_what_a_table_maps_lies_within_the_disk_and_of_zeros_nothing_is_lost() -> None:
    geometry = Geometry(3, 12, 4, 3 * (512 << 12) + 4096)
    clusters = np.zeros((3, 512), dtype=np.int32)
    clusters[0, 1] = 7  # more than the last window has
    clusters[1, 0] = 8
    clusters[2, :] = ZEROS
    offset = np.array([4096, 8192, 12288])
    nowhere = np.full(3, NO_WINDOW)
    rows = np.arange(3)
    tables = Tables(geometry, offset, Grid(512, rows, rows, clusters, clusters > 0), nowhere, 4)
    l1 = L1Table(0, np.zeros(4, dtype=np.uint64), np.zeros(4, dtype=np.bool_))
    no = np.zeros(3, dtype=np.int64)
    nowhere_yet = np.full(3, NONE), no.astype(np.uint8), (no, no), no > 0
    waiting = Placements.of(offset, *nowhere_yet)

    def candidates(*, has_backing: bool) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
        board = Board(Bytes(b""), tables, geometry.virtual_size, has_backing=has_backing)
        mismatches = check_image(Bytes(image("ext4", "none"))).mismatches
        assert mismatches is not None
        found, are_any = with_candidates(Placed(l1, board, waiting, mismatches, no[:0]))
        holes = tuple(np.flatnonzero(are_any).tolist())
        return [each.candidates for each in found.placements], holes

    assert candidates(has_backing=False) == ([(0, 1, 2), (0, 1, 2, 3), ()], (0, 1, 2, 3))
    # Over a backing file zeros are something.
    assert candidates(has_backing=True)[0][2] == (0, 1, 2)


def taken(work: Callable[[], object]) -> int:
    """Bytes of memory that *work* takes at most."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_of_very_many_tables_columns_are_kept_and_no_objects() -> None:
    count = 1 << 16
    geometry = Geometry(3, 9, 4, count * 64 << 9)
    offset, windows = (1 + np.arange(count)) << 9, np.arange(count)[::-1]
    grid = read_grid(Bytes(b""), offset, geometry)
    snapshots = np.full(count, A_SNAPSHOTS)
    late = np.stack((np.arange(count), windows))
    tables = Tables(geometry, offset, grid, snapshots, count, late=late)
    board = Board(Bytes(b""), tables, geometry.virtual_size)
    solver = Solver(board, Collector((), 9).claims(grid, np.zeros(0, dtype=np.int64)))
    assert taken(solver.solve) < 300 * count
    assert (board.window == windows).all()


def test_of_an_l1_table_of_millions_of_entries_that_lead_nowhere_no_list_is_made() -> None:
    entries_of_it = 1 << 22
    geometry = Geometry(3, 9, 4, entries_of_it * 64 << 9)
    clusters, row = np.ones((1, 64), dtype=np.int32), np.zeros(1, dtype=np.int64)
    grid = Grid(64, row, row, clusters, clusters > 0)
    tables = Tables(geometry, row + 512, grid, row + NO_WINDOW, entries_of_it)
    board = Board(Bytes(b""), tables, geometry.virtual_size)
    words, leads = np.zeros((2, entries_of_it), dtype=np.uint8)
    l1 = L1Table(0, words.astype(np.uint64), leads.astype(np.bool_))
    mismatches = check_image(Bytes(image("ext4", "none"))).mismatches
    assert mismatches is not None
    waiting = Placements.of(row + 512, row + NONE, row.astype(np.uint8), (row, row), row > 0)
    found = Placed(l1, board, waiting, mismatches, row[:0])
    assert taken(lambda: with_candidates(found)) < 2 * entries_of_it
    placed, are_any = with_candidates(found)
    (only,) = placed.placements
    assert (only.candidates, only.candidate_count) == (tuple(range(16)), entries_of_it)
    assert are_any.all()


def test_tables_of_the_disk_alone_and_those_in_common_with_a_snapshot_come_back_together() -> None:
    builder, rng = ImageBuilder(cluster_bits=9, size=4000 << 9), random.Random(10)
    for cluster in rng.sample(range(4000), 60):
        builder.write(cluster, b"before")
    builder.take_snapshot("one")
    for cluster in rng.sample(range(4000), 30):
        builder.write(cluster, b"after")
    built = builder.build()
    header, damaged = built.header, bytearray(built.data)
    words = nonzero_words(Bytes(bytes(damaged)), header.refcount_table_offset, 64)[1]
    block, l1 = int(words[0]), header.l1_table_offset
    damaged[block + 100 : block + 512] = bytes(412)
    damaged[l1 : l1 + 8 * header.l1_size] = bytes(8 * header.l1_size)
    source = Bytes(bytes(damaged))
    found = rescue(source)
    own = [each for each in found.placements if each.placed]
    index, after = nonzero_words(Overlay(source, found.plan), l1, header.l1_size)
    leads = dict(zip(index.tolist(), entries.l1_offsets(after).tolist(), strict=True))
    assert {each.l1_index: each.offset for each in own}.items() <= leads.items()
    copied = (after & np.uint64(entries.COPIED)) != 0
    assert copied.any()
    assert not copied.all()


def test_of_an_l1_table_that_is_a_hole_no_more_entries_are_written_to_than_there_may_be(
    monkeypatch,
) -> None:
    data = without_l1(image("xfs", "gpt"))
    holes = len(rescue(Bytes(data)).holes)
    monkeypatch.setattr(rescue_module, "BYTES_A_HOLE", len(data))
    monkeypatch.setattr(rescue_module, "MAX_HOLES", holes - 1)
    assert len(rescue(Bytes(data)).holes) == holes
    monkeypatch.setattr(rescue_module, "MAX_HOLES", holes - 2)
    with pytest.raises(AmbiguousCorruption, match=f"may belong to {holes} L1 entries"):
        rescue(Bytes(data))


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
def test_where_there_is_no_more_work_to_do_what_is_placed_is_right_and_the_rest_is_told(
    monkeypatch, share
) -> None:
    data = image("ext4", "gpt")
    lost = Bytes(without(data, "l1"))
    whole = rescue(lost)
    assert not whole.note
    monkeypatch.setattr(place_module, "FOR_ANY", share * 100_000 - FOR_A_BYTE * len(data))
    found = rescue(lost)
    assert found.note == str(WorkSpent())
    assert found.placed <= whole.placed
    for each in found.placements:
        assert not each.placed or truth(data)[each.offset] == each.l1_index


def test_an_image_that_lost_nothing_is_left_alone() -> None:
    found = rescue(Bytes(image("ext4", "none")))
    assert not found.placements
    assert found.plan.changes_nothing


def test_two_tables_that_say_the_same_are_both_left_alone() -> None:
    data = image("ext4", "gpt")
    found = rescue(Bytes(without(data, "l1")))
    left, *placed = (each.offset for each in found.placements if each.placed)
    size = header_of(data).geometry.cluster_size
    for offset in placed[:2]:
        damaged = bytearray(without(data, "l1"))
        damaged[left : left + size] = damaged[offset : offset + size]
        again = rescue(Bytes(bytes(damaged)))
        assert not any(each.placed for each in again.placements if each.offset in (offset, left))


@pytest.mark.parametrize("seed", range(3))
def test_a_guest_whose_blocks_are_damaged_puts_nothing_in_a_wrong_place(seed: int) -> None:
    data, rng = image("ext4", "gpt"), random.Random(seed)
    damaged = bytearray(without(data, "l1"))
    header, tables = header_of(data), set(truth(data))
    size = header.geometry.cluster_size
    for _ in range(len(damaged) // size // 20):
        start = rng.randrange(16, len(damaged) // size) * size
        other = rng.randrange(16, len(damaged) // size) * size
        if start not in tables:
            # Garbage, or what belongs elsewhere.
            damaged[start : start + size] = rng.choice(
                (rng.randbytes(size), damaged[other : other + size])
            )
    assert not wrong(rescue(Bytes(bytes(damaged))), data)


def test_in_free_clusters_tables_are_looked_for_on_request() -> None:
    """As `qemu-img check -r all` leaves them: what was lost is counted as free."""
    data = image("ext4", "gpt")
    header, damaged = header_of(data), bytearray(data)
    lost = [table for table, index in truth(data).items() if index < 2]
    damaged[header.l1_table_offset : header.l1_table_offset + 16] = bytes(16)
    found = rescue(Bytes(bytes(damaged)))
    freed = propose(Bytes(bytes(damaged)), found.before, RepairTier.LEAKS).plan
    image_now = Overlay(Bytes(bytes(damaged)), freed)
    assert check_image(image_now).verdict == "clean"
    assert not rescue(image_now).count
    found = rescue(image_now, free=True)
    assert found.placed == len(lost)
    assert found.after.verdict == "clean"
    after = bytearray(len(data))
    Overlay(image_now, found.plan).read_into(0, memoryview(after))
    assert bytes(after) == data
