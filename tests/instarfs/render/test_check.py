"""The lists of ``check/``: made from columns in parts, they say what each finding says."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from instarfs.render import check as render
from instarfs.render import findings as render_findings
from instarfs.render.findings import findings_jsonl, findings_jsonl_length
from instarfs.render.report import report_txt
from instarfs.text import json_text
from planner.check import refcount_comparison as mismatch_module
from planner.check.check import check_image
from planner.check.refcount_comparison import Mismatches
from planner.check.report import EXIT_CODES, Report
from planner.findings import kinds as findings_module
from planner.findings.grouped import FindingsBuilder
from planner.findings.kinds import (
    ACTIVE,
    KINDS,
    NONE,
    NOWHERE,
    Finding,
    FindingKind,
    Owners,
    Severity,
    Structure,
)
from planner.metadata.cluster_counters import ClusterIndex, NearOne
from planner.qcow2.geometry import Geometry
from planner.qcow2.layout import Layout
from planner.qcow2.snapshots import Snapshot, Snapshots, encode_snapshot
from tests.cached import check_bytes
from tests.images.corpus import RULES
from tests.images.corpus.rule import plain

CORRUPT = (Severity.CORRUPTION, Severity.CHECK_ERROR)


def rows_of(content: Iterable[bytes]) -> list[list[str]]:
    header, *rows = b"".join(content).decode().splitlines()
    assert header.startswith("#")
    width = header.count("\t") + 1
    split = [row.split("\t") for row in rows]
    assert all(len(row) == width for row in split)
    return split


def dash(value: int) -> str:
    return "-" if value == NONE else str(value)


def corruption(finding: Finding) -> list[str]:
    """A line of ``check/corruptions``, cell by cell."""
    info, snapshot = finding.info, finding.snapshot

    def number(column: str, value: int) -> str:
        return f"{value:#018x}" if column in render.HEX_COLUMNS else str(value)

    return [
        str(finding.host_offset),
        str(finding.length),
        finding.kind.label,
        str(finding.count),
        finding.structure.label,
        {NOWHERE: "-", ACTIVE: "active"}.get(snapshot, str(snapshot)),
        dash(finding.l1_index),
        dash(finding.l2_index),
        dash(finding.guest_offset),
        "-" if finding.guest_offset == NONE else str(finding.guest_length),
        number(info.found, finding.found),
        number(info.expected, finding.expected) if info.expected else "-",
    ]


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of few rows, and patterns for every one of them."""
    monkeypatch.setattr(findings_module, "BATCH_ROWS", 3)
    monkeypatch.setattr(render_findings, "FEW", 1)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("name", RULES)
def test_every_list_has_a_line_for_each_of_its_findings(name: str) -> None:
    report = check_bytes(bytes(RULES[name]().image.data))
    found = list(report.rows())
    of_clusters = [f for f in found if f.kind in render.REFCOUNT_KINDS]
    numbers = [[str(n) for n in (f.host_offset, f.length, f.found, f.expected)] for f in found]
    leaks = [row for row, f in zip(numbers, found, strict=True) if f.kind is FindingKind.LEAK]
    assert rows_of(render.leaks_tsv(report)) == leaks
    assert sorted(rows_of(render.refcounts_tsv(report))) == sorted(
        [*map(str, (f.host_offset, f.length, f.found, f.expected)), f.kind.label]
        for f in of_clusters
    )
    assert rows_of(render.corruptions_tsv(report)) == [
        corruption(f) for f in found if KINDS[f.kind].severity in CORRUPT
    ]
    assert_listed(report)
    assert_measured(report)


def test_an_unreadable_header_gives_empty_lists() -> None:
    report = check_image(plain().source.__class__(b"QFI\xfb" + bytes(200)))
    assert report.error is not None
    assert_measured(report)
    assert rows_of(render.leaks_tsv(report)) == rows_of(render.corruptions_tsv(report)) == []
    assert list(findings_jsonl(report)) == []


def test_findings_of_rare_shapes_stand_in_their_order() -> None:
    report = check_bytes(bytes(RULES["leaks_in_runs"]().image.data))
    builder, rng = FindingsBuilder(), np.random.default_rng(1)
    for kind, rows in (
        (FindingKind.LEAK, 120),
        (FindingKind.L2_COPIED, 78),
        (FindingKind.PAST_END, 2),
    ):
        builder.add(
            kind,
            structure=Structure.L2_TABLE,
            snapshot=rng.choice([ACTIVE, 0, 7], rows),
            host_offset=rng.integers(0, 1 << 40, rows),
            count=rng.integers(1, 3, rows),
            l1_index=rng.choice([NONE, 3], rows),
            found=rng.integers(0, 1 << 62, rows),
        )
    assert_listed(replace(report, findings=builder.build(), totals={}))


@pytest.mark.parametrize("most", [1, 3, 80])
def test_every_finding_has_its_owners_whoever_they_are(most: int) -> None:
    report = check_bytes(bytes(RULES["leaks_in_runs"]().image.data))
    names = [b'"quoted\\"', b"", "Grüße \U0001f600".encode(), b"\xff\x1b[31m", b"n" * 300]
    raw = [encode_snapshot(Snapshot(0, 0, 0, 0, 0, 0, 0, bytes(16), b"1", n)) for n in names]
    start = np.cumsum([0, *map(len, raw)])[:-1]
    snapshots = Snapshots(b"".join(raw), start, start)
    builder, rng, rows = FindingsBuilder(), np.random.default_rng(most), 400
    bits = report.geometry.cluster_bits
    kinds = (FindingKind.MULTIPLE_OWNERS, FindingKind.REFCOUNT_LOW, FindingKind.PAST_END)
    for kind, structure in itertools.product(kinds, (Structure.CLUSTER, Structure.DATA)):
        builder.add(
            kind,
            structure=structure,
            host_offset=rng.permutation(rows) << bits,
            length=rng.integers(1, 3, rows) << bits,
            count=rng.integers(1, 3, rows),
            snapshot=rng.choice([NOWHERE, ACTIVE, 0, 2, 9], rows),
            found=rng.integers(2, 1 << 62, rows),
            expected=rng.integers(1, 3, rows),
        )
    clusters = np.repeat(np.arange(rows), rng.integers(0, most + 1, rows))
    count = len(clusters)
    of_owners = rng.integers(0, len(Structure), count).astype(np.uint8)
    is_guest = np.isin(of_owners, [Structure.DATA, Structure.COMPRESSED])
    l1 = np.where(is_guest, rng.integers(0, 1 << 20, count), rng.choice([NONE, 5], count))
    l2 = np.where(is_guest, rng.integers(0, 1 << 12, count), rng.choice([NONE, 7], count))
    owners = Owners(
        cluster=clusters,
        structure=of_owners,
        snapshot=rng.choice([NOWHERE, ACTIVE, *range(7)], count).astype(np.int32),
        l1_index=l1,
        l2_index=np.where(l1 == NONE, NONE, l2).astype(np.int32),
        index=rng.choice([NONE, 0, 123_456], count).astype(np.int32),
    )
    assert_listed(
        replace(report, findings=builder.build(), totals={}, owners=owners, snapshots=snapshots)
    )


MEASURED: list[tuple[Callable[[Report], Iterator[bytes]], Callable[[Report], int]]] = [
    (render.leaks_tsv, render.leaks_tsv_length),
    (render.refcounts_tsv, render.refcounts_tsv_length),
    (render.corruptions_tsv, render.corruptions_tsv_length),
]


def assert_measured(report: Report) -> None:
    """The tables are as long as they are said to be."""
    for make, measure in MEASURED:
        assert measure(report) == sum(map(len, make(report)))


def assert_listed(report: Report) -> None:
    """Each finding has its line, as it has alone; and they are as long as they are said to be."""
    written = b"".join(findings_jsonl(report))
    lines = [json_text(render.finding_value(report, f)) for f in report.rows()]
    assert written.decode().splitlines() == lines
    assert findings_jsonl_length(report) == len(written)


# ---- millions ----


def scattered(clusters: int) -> Report:
    """The report of an image in which every other one of so many clusters is leaked."""
    geometry = Geometry(3, 16, 4, 1 << 40)
    stored = np.zeros(clusters, dtype=np.uint8)
    stored[::2] = 1
    counted = np.zeros(clusters, dtype=np.uint8)
    index = ClusterIndex(clusters)
    mismatches = Mismatches(geometry, index, NearOne.of(stored), counted, ((0, clusters),))
    layout = Layout.read(plain().source)
    totals = mismatches.totals()
    return Report(layout=layout, mismatches=mismatches, totals=totals)


LISTS: list[Callable[[Report], Iterator[bytes]]] = [
    render.leaks_tsv,
    render.refcounts_tsv,
    findings_jsonl,
]


@pytest.mark.parametrize("make", LISTS, ids=lambda make: make.__name__)
def test_half_a_million_scattered_leaks_are_told_in_bounded_memory(
    make: Callable[[Report], Iterator[bytes]],
) -> None:
    report = scattered(1_000_000)
    tracemalloc.start()
    try:
        lines = sum(part.count(b"\n") for part in make(report))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert lines - lines % 500_000 == 500_000
    assert peak < 32 << 20


def test_runs_do_not_end_where_a_part_does(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = Geometry(3, 16, 4, 1 << 30)
    rng = np.random.default_rng(1)
    stored = np.repeat(rng.integers(0, 3, 200, dtype=np.uint8), rng.integers(1, 9, 200))
    counted = np.repeat(rng.integers(0, 3, 200, dtype=np.uint8), 5)[: len(stored)]
    stored = stored[: len(counted)]
    span = ((0, 100), (130, len(counted)))
    whole = Mismatches(geometry, ClusterIndex(len(counted)), NearOne.of(stored), counted, span)

    def told() -> list[Finding]:
        parts = whole.runs(*render.REFCOUNT_KINDS)
        return [finding for part in parts for finding in part.rows()]

    expected = told()
    offsets = [(f.host_offset, f.host_offset + f.length) for f in expected]
    assert offsets == sorted(offsets)
    assert sum(f.count for f in expected) == sum(whole.totals().values())
    for chunk in (1, 2, 7):
        monkeypatch.setattr(mismatch_module, "CHUNK", chunk)
        assert told() == expected


def test_each_verdict_says_what_to_believe_also_where_no_counter_does() -> None:
    assert render.VERDICTS.keys() == EXIT_CODES.keys()
    report = check_bytes(bytes(RULES["corrupt_bit"]().image.data))
    assert report.verdict == "marked-corrupt"
    assert render.check_human(report).startswith(render.VERDICTS["marked-corrupt"])
    assert f"\n\n{render.VERDICTS['marked-corrupt']}\n" in report_txt(report, "x.qcow2").decode()


def test_where_a_file_ends_that_is_cut_off_and_what_it_needs() -> None:
    image = RULES["data_cut_by_the_end"]().image
    report, size = check_image(image.source), len(image.data)
    value = json.loads(render.result_json(report, "x.qcow2"))
    assert value["cut-off"] == {"ends-at": size, "needs": size + 100}
    line = f"NOTE The file is cut off: it ends at {size} and needs {size + 100}."
    assert next(render.check_messages(report)) == line
    whole = check_image(plain().source)
    assert json.loads(render.result_json(whole, "x.qcow2"))["cut-off"] is None
    assert not list(render.check_messages(whole))


def test_a_luks_header_that_opens_no_disk_says_what_is_wrong_with_it() -> None:
    image = RULES["luks_header_that_is_gone"]().image
    report = check_image(image.source)
    wrong = "LUKS magic is 0x000000000000: must be 0x4c554b53babe"
    value = json.loads(render.result_json(report, "x.qcow2"))
    assert value["luks-error"]["message"] == wrong
    (row,) = map(json.loads, b"".join(findings_jsonl(report)).splitlines())
    assert f": {wrong}: with this LUKS header no password opens the disk" in row["message"]
    assert f": {wrong}" in report_txt(report, "x.qcow2").decode()
    assert "luks-error" not in json.loads(render.result_json(check_image(plain().source), "x"))
