"""Findings about L2 entries: as many as there are, in few bytes, and told as all others."""

import subprocess
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from instarfs.image.file import Image
from instarfs.render.check import corruptions_tsv
from instarfs.render.findings import findings_jsonl
from planner.check.check import check_image
from planner.check.entry_findings import EntryFindings, EntryFindingsBuilder
from planner.check.report import Report
from planner.findings.kinds import FindingKind, Structure
from planner.metadata.mapping_tables import TableParts
from planner.repair.plan import RepairTier
from planner.repair.tiers import propose
from planner.source import read_bytes
from tests.images.builder import ImageBuilder
from tests.images.corpus import RULES

EVERY = slice(None)
CLUSTERS = 1 << 20
MIB = 1 << 20

FOUND_SOMETHING = [
    name
    for name, make in RULES.items()
    if any(each.kind.name.startswith("L2") for each in make().findings)
]


def entries_of(report: Report) -> EntryFindings:
    assert report.entries is not None
    return report.entries


@pytest.fixture(scope="module")
def scattered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 GiB, every second of a million entries without its COPIED flag."""
    path = tmp_path_factory.mktemp("scattered") / "image.qcow2"
    options = ["-f", "qcow2", "-o", "preallocation=metadata"]
    subprocess.run(["qemu-img", "create", "-q", *options, path, "64G"], check=True)
    with Image.open(str(path)) as image, path.open("r+b") as file:
        tables = check_image(image.source()).regions
        for offset in tables.offset[tables.structure == Structure.L2_TABLE].tolist():
            table = np.frombuffer(read_bytes(image.source(), offset, 1 << 16), ">u8").copy()
            table[::2] &= np.uint64((1 << 63) - 1)
            file.seek(offset)
            file.write(table.tobytes())
    return path


def test_half_a_million_scattered_flags_are_held_in_bounded_memory(scattered: Path) -> None:
    with Image.open(str(scattered)) as image:
        tracemalloc.start()
        try:
            report = check_image(image.source())
            held, peak = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            lines = sum(part.count(b"\n") for part in corruptions_tsv(report))
            objects = sum(part.count(b"\n") for part in findings_jsonl(report))
            _, told = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert report.counters.corruptions == CLUSTERS // 2 == objects == lines - 1
    assert held < 4 * MIB + 2 * CLUSTERS + 16 * objects
    assert peak < 24 * MIB + 4 * CLUSTERS + 24 * objects
    assert told - held < 24 * MIB


def test_half_a_million_scattered_flags_are_mended_in_one_plan(scattered: Path) -> None:
    with Image.open(str(scattered)) as image:
        tracemalloc.start()
        try:
            proposal = propose(image.source(), check_image(image.source()), RepairTier.ALL)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    tables = 8 * CLUSTERS
    assert proposal.planned == CLUSTERS // 2 == proposal.plan.edit_count
    assert not proposal.left_count
    assert peak < 64 * MIB + 4 * tables


@pytest.mark.parametrize("name", FOUND_SOMETHING)
def test_each_way_to_ask_gives_the_same_findings(name: str) -> None:
    report = check_image(RULES[name]().image.source)
    entries, size = entries_of(report), report.geometry.l2_entry_size
    for kind in FindingKind:
        rows = [row for batch in entries.batches(kind) for row in batch.rows()]
        assert sum(row.count for row in rows) == entries.counts().get(kind, 0)
        words = {
            at for row in rows for at in range(row.host_offset, row.host_offset + row.length, size)
        }
        parts = entries.parts_with(kind)
        assert np.array_equal(parts.offsets, entries.tables_with(kind))
        part, inside = np.nonzero(entries.marks(kind, parts, EVERY))
        place = parts.offsets[parts.table] + parts.inside
        assert set((place[part] + inside * size).tolist()) == words
        for word in words:
            assert kind in {row.kind for row in entries.at(word).rows()}
    elsewhere = np.array([0, report.geometry.cluster_size * 1000])
    parts = TableParts(elsewhere, np.arange(2), np.zeros(2, dtype=np.int64), 512)
    assert not entries.marks(FindingKind.L2_COPIED, parts, EVERY).any()
    assert not len(entries.at(1))


@pytest.mark.parametrize("extended_l2", [False, True])
def test_of_a_large_table_the_parts_are_told_that_a_run_goes_through(extended_l2: bool) -> None:
    builder = ImageBuilder(cluster_bits=16, size=1 << 32, extended_l2=extended_l2)
    width, each = builder.geometry.l2_entries, builder.geometry.l2_entry_size
    builder.write(0, b"content")
    builder.write(width, b"content")
    entries = entries_of(check_image(builder.build().source))
    wrong = [range(7, 9), range(500, 1025), range(1100, 1101), range(width - 1, width + 1)]
    found = EntryFindingsBuilder(builder.geometry, entries.tables, 0)
    for run in wrong:
        found.add(FindingKind.L2_COPIED, np.array(run), np.ones(len(run), dtype=np.bool_))
    held, position = found.build(), [at for run in wrong for at in run]
    parts = held.parts_with(FindingKind.L2_COPIED)
    marked = np.flatnonzero(held.marks(FindingKind.L2_COPIED, parts, EVERY))
    assert parts.positions(EVERY, marked, builder.geometry).tolist() == position
    assert parts.size == 4096
    assert len(parts.table) == len({at * each // 4096 for at in position})
    last = slice(len(parts.table) - 2, len(parts.table))
    marked = np.flatnonzero(held.marks(FindingKind.L2_COPIED, parts, last))
    assert parts.positions(last, marked, builder.geometry).tolist() == list(wrong[-1])


def test_tables_that_come_in_another_order_are_put_in_theirs_in_little_memory(monkeypatch) -> None:
    """Batch by batch, not entry by entry."""
    report = check_image(RULES["l2_reserved_bits"]().image.source)
    entries = entries_of(report)
    builder = EntryFindingsBuilder(entries.geometry, entries.tables, 0)
    width = entries.geometry.l2_entries
    table = len(entries.tables) - 1
    number = width // 4
    parts = [np.arange(start, start + number) for start in range(0, width, number)]
    for part in parts[::-1]:
        builder.add(FindingKind.L2_ENTRY_RESERVED, table * width + part, part.astype(np.uint64))
    monkeypatch.setattr(np, "argsort", lambda *_, **__: pytest.fail("each entry is sorted"))
    found = builder.build().of(FindingKind.L2_ENTRY_RESERVED)
    assert found.l2_index.tolist() == list(range(width))
    assert found.found.tolist() == list(range(width))
