"""Tables that something else was written over: what is said of them, and never done to them."""

import random
from typing import Any

import numpy as np
import pytest

from planner.check.check import check_image
from planner.check.classify import Looker, content_name
from planner.check.overwritten import find_overwritten
from planner.check.report import Report
from planner.findings.grouped import FindingsBuilder
from planner.findings.kinds import NONE, Finding, FindingKind
from planner.progress import Meter, tell_nobody
from planner.qcow2.layout import Layout
from planner.repair.overlay import Overlay
from planner.repair.plan import RepairTier
from planner.repair.tiers import propose
from planner.source import Bytes, read_bytes
from planner.triage.impact import Harm, guest_impact
from tests.images.builder import Image, ImageBuilder
from tests.planner.sources import Sparse

LOG = b'{"log":"request ok","t":1234567}\n'
SHAPES = [
    {"cluster_bits": 9},
    {"cluster_bits": 12},
    {"cluster_bits": 16},
    {"cluster_bits": 16, "extended_l2": True},
    {"cluster_bits": 12, "version": 2},
]


def disk(clusters: int = 40, **options: Any) -> Image:
    """Two L2 tables in use of three, *clusters* in each."""
    builder = ImageBuilder(**{"size": 1, **options})
    coverage = builder.geometry.l2_coverage
    builder = ImageBuilder(**{**options, "size": 3 * coverage})
    content = random.Random(3).randbytes(clusters * builder.geometry.cluster_size)
    builder.write(0, content)
    builder.write(builder.geometry.l2_entries, content)
    return builder.build()


def overwrite(image: Image, start: int, content: bytes) -> None:
    image.data[start : start + len(content)] = content


def found_in(image: Image) -> tuple[Report, list[Finding]]:
    report = check_image(image.source)
    return report, list(report.rows(FindingKind.TABLE_OVERWRITTEN))


def text(length: int) -> bytes:
    return (LOG * (length // len(LOG) + 1))[:length]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_table_under_text_is_named_and_its_window_is_lost(shape: dict[str, Any]) -> None:
    image = disk(**shape)
    size, coverage = image.cluster_size, image.geometry.l2_coverage
    overwrite(image, image.l2_table(1), text(size))
    report, rows = found_in(image)
    assert [(row.l1_index, row.l2_index, row.guest_offset, row.guest_length) for row in rows] == [
        (1, NONE, coverage, coverage)
    ]
    assert content_name(rows[0].found) == "text"
    impact = guest_impact(report)
    assert list(impact.ranges[Harm.LOST].first(2)) == [(coverage, coverage)]
    assert impact.safe <= 2 * coverage


@pytest.mark.parametrize("length", [11, 13, 2000, 32768])
def test_a_refcount_block_over_a_table_vouches_for_nothing_behind_its_end(length: int) -> None:
    image = disk(cluster_bits=16)
    refcounts = np.ones(length, dtype=">u2").tobytes().ljust(image.cluster_size, b"\0")
    overwrite(image, image.l2_table(0), refcounts)
    report, rows = found_in(image)
    assert [content_name(row.found) for row in rows] == (["a refcount block"] if rows else [])
    assert bool(rows) == (length > 11)
    if rows:
        lost = list(guest_impact(report).ranges[Harm.LOST].first(1))
        assert lost == [(0, image.geometry.l2_coverage)]


@pytest.mark.parametrize("extended_l2", [False, True])
@pytest.mark.parametrize("is_whole", [False, True])
def test_of_a_large_table_that_is_a_hole_only_what_is_there_is_read(
    extended_l2: bool, is_whole: bool
) -> None:
    """And a part that was overwritten goes on from one piece of it to the next."""
    image = disk(clusters=2, cluster_bits=18, extended_l2=extended_l2)
    for index in (0, 1):
        first = image.l2_table(index)
        sound = bytes(image.data[first : first + image.geometry.l2_entry_size])
        overwrite(image, first, sound * ((1 if is_whole else 16) * 512 // len(sound)))
        overwrite(image, first + 3 * 4096 - 512, text(1024))
        overwrite(image, first + 9 * 4096, text(4096))
    source = Sparse.of(bytes(image.data), len(image.data), block=4096)
    there, (report, rows) = check_image(source), found_in(image)
    assert list(there.rows(FindingKind.TABLE_OVERWRITTEN)) == rows
    assert len(rows) == (2 if is_whole else 4)
    if not is_whole:
        assert {content_name(row.found) for row in rows} == {"text"}
    layout, signs, findings = Layout.read(source), report.entries, FindingsBuilder()
    assert signs is not None
    meter, source.bytes_read = Meter(tell_nobody, "census", 1), 0
    find_overwritten(source, layout, Looker(layout, 0), signs, findings, meter=meter)
    assert findings.build().counts() == {FindingKind.TABLE_OVERWRITTEN: len(rows)}
    assert source.bytes_read <= 2 * 5 * 4096


def test_a_sector_under_text_costs_what_it_mapped() -> None:
    image = disk(clusters=200, cluster_bits=16)
    overwrite(image, image.l2_table(0) + 512, text(512))
    report, rows = found_in(image)
    per_sector, size = 64, image.cluster_size
    assert [(row.l2_index, row.guest_offset, row.guest_length) for row in rows] == [
        (per_sector, per_sector * size, per_sector * size)
    ]
    lost = guest_impact(report).ranges[Harm.LOST]
    assert list(lost.first(2)) == [(per_sector * size, per_sector * size)]


@pytest.mark.parametrize("bit", [1, 8, 20, 40, 56, 61])
def test_a_flipped_bit_is_a_damaged_entry_and_no_lost_table(bit: int) -> None:
    image = disk(cluster_bits=12)
    at = image.l2_at(3)
    image.set_word(at, image.word(at) ^ 1 << bit)
    assert found_in(image)[1] == []


@pytest.mark.parametrize("kept", [1, 4, 7])
def test_a_file_that_is_cut_off_has_tables_that_are_tables(kept: int) -> None:
    image = disk(cluster_bits=16)
    tables = max(image.l2_table(0), image.l2_table(1)) + image.cluster_size
    order = sorted(image.host_offset(n) for n in range(40) if image.host_offset(n))
    end = order[len(order) * kept // 8]
    source = Bytes(bytes(image.data[: max(end, 0)]))
    report = check_image(source)
    assert report.error is None
    assert tables
    assert list(report.rows(FindingKind.TABLE_OVERWRITTEN)) == []


@pytest.mark.parametrize("tier", RepairTier)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_repair_edits_what_lies_over_a_table(shape: dict[str, object], tier: RepairTier) -> None:
    image = disk(clusters=60, **shape)
    start = image.l2_table(0)
    overwrite(image, start, text(image.cluster_size))
    report, rows = found_in(image)
    assert rows
    plan = propose(image.source, report, tier).plan
    after = read_bytes(Overlay(image.source, plan), start, image.cluster_size)
    assert after == text(image.cluster_size)


def test_what_is_left_in_it_is_left_for_that_reason() -> None:
    image = disk(clusters=60)
    overwrite(image, image.l2_table(0), text(image.cluster_size))
    report, _ = found_in(image)
    reasons = {
        each.kind: each.reason for each in propose(image.source, report, RepairTier.ALL).left
    }
    assert "was overwritten" in reasons[FindingKind.L2_ENTRY_RESERVED]
    assert not any("two owners" in reason for reason in reasons.values())
