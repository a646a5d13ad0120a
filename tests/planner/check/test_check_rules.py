"""Every rule of the check, on an image built with exactly that damage.

The corpus holds the images and what they must give; here they are checked, in every way that the
check can count, and the corpus itself is measured: no kind of finding goes without an image.
"""

from collections.abc import Callable
from functools import partial

import pytest

from planner.check.check import check_image
from planner.check.report import CheckCounters, Report
from planner.findings.kinds import KINDS, Finding, FindingKind, Severity
from planner.metadata.work_limits import Limits
from planner.source import Bytes, Source
from tests.images.builder import ImageBuilder, feature_name_table
from tests.images.corpus import RULES, Rule
from tests.images.corpus.rule import Expected
from tests.images.luks_headers import luks_bytes
from tests.planner.check import naive

WAYS: dict[str, Callable[[Source], Report]] = {
    "fast": check_image,
    "versions": partial(check_image, limits=Limits(version_entries=1, version_share=1)),
    "naive": naive.check_naively,
}
"""All ways of counting must find the same."""


@pytest.fixture(params=WAYS)
def check(request) -> Callable[[Source], Report]:
    return WAYS[request.param]


def fits(row: Finding, expected: Expected) -> bool:
    return row.kind is expected.kind and all(
        getattr(row, name) == value for name, value in expected.columns.items()
    )


def unmatched(
    rows: list[Finding], expected: list[Expected]
) -> tuple[list[Finding], list[Expected]]:
    """Findings that nothing expects, and expectations that nothing meets."""
    rest, missed = list(rows), []
    for wanted in expected:
        row = next((row for row in rest if fits(row, wanted)), None)
        if row is None:
            missed.append(wanted)
        else:
            rest.remove(row)
    return rest, missed


def exit_code(rule: Rule) -> int:
    """That of QEMU's counters, or worse: 0 only where nothing but a notice was found."""
    if rule.check_errors:
        return 1
    kinds = {expected.kind for expected in rule.findings}
    damaged = any(KINDS[kind].severity is Severity.CORRUPTION for kind in kinds)
    if damaged or FindingKind.CORRUPT_BIT in kinds:
        return 2
    leaks = any(KINDS[kind].severity is Severity.LEAK for kind in kinds)
    return 3 if leaks or FindingKind.DIRTY_BIT in kinds else 0


@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_rule(make: Callable[[], Rule], check: Callable[[Source], Report]) -> None:
    rule = make()
    report = check(rule.image.source)
    assert report.error is None
    unexpected, missed = unmatched(list(report.rows()), rule.findings)
    assert not missed
    assert not unexpected
    counters = report.counters
    assert (counters.check_errors, counters.corruptions, counters.leaks) == (
        rule.check_errors, rule.corruptions, rule.leaks,
    )  # fmt: skip
    assert {name: getattr(counters, name) for name in rule.counters} == rule.counters
    assert report.exit_code == exit_code(rule)
    assert report.needs_rebuild is rule.needs_rebuild
    assert report.complete is rule.complete


@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_findings_add_up_to_the_counters(make: Callable[[], Rule]) -> None:
    report = check_image(make().image.source)
    sums = dict.fromkeys(Severity, 0)
    for row in report.rows():
        sums[row.info.severity] += row.count if row.info.counted else 0
    counters = report.counters
    assert sums[Severity.CHECK_ERROR] == counters.check_errors
    assert sums[Severity.CORRUPTION] == counters.corruptions
    assert sums[Severity.LEAK] == counters.leaks


@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_rows_agree_with_the_counts_by_kind(make: Callable[[], Rule]) -> None:
    report = check_image(make().image.source)
    counts = dict.fromkeys(report.counts(), 0)
    for row in report.rows():
        counts[row.kind] += row.count
    assert counts == report.counts()


# What is found by unpacking, which no check of the metadata does, is in test_packed.py.
@pytest.mark.parametrize(
    "kind",
    [kind for kind in FindingKind if kind is not FindingKind.COMPRESSED_UNREADABLE],
    ids=lambda kind: kind.label,
)
def test_kind_has_an_image_that_gives_it(kind: FindingKind) -> None:
    assert any(expected.kind is kind for make in RULES.values() for expected in make().findings)


@pytest.mark.parametrize("kind", FindingKind, ids=lambda kind: kind.label)
def test_kind_says_what_it_means_and_what_can_be_done(kind: FindingKind) -> None:
    info = KINDS[kind]
    assert info.meaning
    assert info.found
    assert (info.tier in ("leaks", "all")) != bool(info.left)


def write_everything(builder: ImageBuilder, *, snapshots: bool) -> None:
    """What the image's features allow: data, zeros, compression, snapshots, bitmaps."""
    size, external = builder.geometry.cluster_size, builder.geometry.external_data
    builder.write(0, b"data" * (size // 4) * 3)
    last = builder.geometry.guest_clusters - 1
    builder.write(min(builder.geometry.l2_entries, last) - 1, b"two tables, maybe".ljust(2 * size))
    if builder.geometry.version > 2:
        builder.write_zeros(5)
        builder.write_zeros(6, allocated=True)
    if builder.geometry.refcount_order > 2 and not external:
        for cluster in range(8, 13):
            builder.write_compressed(cluster, bytes([cluster]) * size)
    if builder.geometry.extended_l2:
        builder.write_subclusters(14, b"s" * size, 0x0F0F, 0xF0F0)
    if snapshots:
        builder.take_snapshot("first")
        builder.write(1, b"new")
        builder.take_snapshot("second")
        builder.skip(2)
        builder.write(1, b"newer")
    if builder.geometry.version > 2 and not external:
        builder.add_bitmap("bits", {0, 7}, granularity_bits=20)
        builder.add_bitmap("none", set(), granularity_bits=24)


SOUND: dict[str, dict[str, object]] = {
    **{
        f"version {version}, 2^{bits}": {"version": version, "cluster_bits": bits}
        for version in (2, 3)
        for bits in range(9, 22)
    },
    **{f"refcount order {order}": {"refcount_order": order} for order in range(7)},
    **{
        f"extended L2, 2^{bits}": {"extended_l2": True, "cluster_bits": bits}
        for bits in range(14, 22)
    },
    "zstd": {"zstd": True},
    "lazy refcounts": {"lazy_refcounts": True},
    "data file": {"data_file": b"data.raw"},
    "raw data file": {"data_file": b"data.raw", "data_file_raw": True},
    "data file, extended L2": {"data_file": b"d", "extended_l2": True, "cluster_bits": 14},
    "backing file": {"backing_file": b"base.qcow2", "backing_format": b"qcow2"},
    "AES": {"crypt_method": 1},
    "LUKS": {"crypt_method": 2, "luks_header": luks_bytes()},
    "feature names": {"more_extensions": (feature_name_table(),)},
    "unknown extension": {"more_extensions": ((0x1234, b"vendor"),)},
}


@pytest.mark.parametrize("options", SOUND.values(), ids=SOUND)
def test_undamaged_image_gives_no_finding(options, check) -> None:
    builder = ImageBuilder(**{"cluster_bits": 12, "size": 48 << 20, **options})
    external, order = builder.geometry.external_data, builder.geometry.refcount_order
    write_everything(builder, snapshots=order > 1 and not external)
    report = check(builder.build().source)
    assert list(report.rows()) == []
    assert (report.verdict, report.exit_code) == ("clean", 0)
    assert report.complete
    assert not report.needs_rebuild


@pytest.mark.parametrize("options", [{}, {"version": 2}, {"extended_l2": True, "cluster_bits": 14}])
def test_empty_image_gives_no_finding(options) -> None:
    report = check_image(ImageBuilder(**{"cluster_bits": 12, **options}).build().source)
    assert list(report.rows()) == []
    assert report.verdict == "clean"


def counters_of(builder: ImageBuilder) -> CheckCounters:
    report = check_image(builder.build().source)
    assert report.verdict == "clean"
    return report.counters


def test_counters_of_an_empty_disk() -> None:
    counters = counters_of(ImageBuilder(cluster_bits=12, size=1 << 20))
    # Header, L1 table, refcount table, refcount block.
    assert counters == CheckCounters(image_end_offset=4 * 4096, total_clusters=256)


def test_counters_of_allocated_and_compressed_clusters() -> None:
    builder = ImageBuilder(cluster_bits=12, size=(1 << 20) + 513)
    builder.write(0, b"a" * 3 * 4096)  # The L2 table is placed behind the first of them.
    builder.write_zeros(8)
    builder.write_zeros(9, allocated=True)
    builder.write_compressed(20, b"c")
    builder.write_compressed(21, b"d")
    counters = counters_of(builder)
    assert counters.total_clusters == 257
    assert counters.allocated_clusters == 3 + 1 + 2
    assert counters.compressed_clusters == 2
    # Compressed clusters always count as fragmented; guest cluster 1 is not behind guest cluster 0.
    assert counters.fragmented_clusters == 2 + 1


def test_fragmentation_begins_anew_in_each_l2_table() -> None:
    builder = ImageBuilder(cluster_bits=9, size=1 << 17)
    for cluster in (130, 70, 71, 3, 4):
        builder.write(cluster, b"x")
    assert counters_of(builder).fragmented_clusters == 2


def test_counters_are_those_of_the_active_disk() -> None:
    builder = ImageBuilder(cluster_bits=12, size=1 << 22)
    builder.write(0, b"a" * 4 * 4096)
    builder.take_snapshot("four clusters")
    builder.active = {}
    builder.write(1, b"b")
    counters = counters_of(builder)
    assert (counters.allocated_clusters, counters.fragmented_clusters) == (1, 0)


def test_image_ends_behind_the_last_cluster_in_use() -> None:
    builder = ImageBuilder(cluster_bits=12, size=1 << 22)
    image = builder.build()
    used = len(image.data)
    image.data += bytes(40 * 4096)
    assert check_image(image.source).counters.image_end_offset == used
    image.set_refcount(20, 1)
    assert check_image(image.source).counters.image_end_offset == 21 * 4096


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("leaked_cluster", "leaks"),
        ("refcount_low", "corrupt"),
        ("two_entries_on_one_cluster_counted_right", "corrupt"),
        ("corrupt_bit", "marked-corrupt"),
        ("dirty_bit", "dirty"),
        ("refblock_misaligned", "incomplete"),
        ("bitmap_entry_invalid", "incomplete"),
        ("l2_zero_bit_with_extended_entries", "clean"),
    ],
)
def test_verdict(name: str, verdict: str) -> None:
    report: Report = check_image(RULES[name]().image.source)
    assert report.verdict == verdict


def test_header_that_cannot_be_read_is_the_answer() -> None:
    report = check_image(Bytes(b"no image"))
    assert report.error is not None
    assert (report.verdict, report.exit_code) == ("unreadable", 63)
    assert list(report.rows()) == []
