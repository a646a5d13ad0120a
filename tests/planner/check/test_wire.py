"""The wire structs, bit for bit: offsets, byte order, flags, and what a report becomes."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.check.check import check_image
from planner.check.report import CheckCounters, RepairCounters, Report
from planner.check.wire import CheckConfig, CheckResult, ConfigFlag, ResultFlag
from planner.errors import ImageError
from planner.source import Bytes
from tests.images.corpus import RULES
from tests.images.corpus.rule import plain, with_snapshot

u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)

RESULT_FIELDS = [
    ("format", 4, 4),
    ("total_errors", 8, 4),
    ("corruptions", 12, 4),
    ("leaks", 16, 4),
    ("refcount_errors", 20, 4),
    ("chain_errors", 24, 4),
    ("subcluster_errors", 28, 4),
    ("image_end_offset", 32, 8),
    ("clusters_checked", 40, 8),
    ("clusters_allocated", 48, 8),
    ("fragmentation", 56, 4),
    ("flags", 60, 4),
    ("repaired_leaks", 64, 4),
    ("repaired_refcounts", 68, 4),
    ("repaired_corruptions", 72, 4),
]


def with_field(name: str, value: int) -> CheckResult:
    changes: dict[str, Any] = {name: ResultFlag(value) if name == "flags" else value}
    return replace(CheckResult(), **changes)


# CheckConfig


def test_config_is_8_bytes_of_magic_and_flags() -> None:
    raw = CheckConfig(ConfigFlag.REPAIR | ConfigFlag.VERBOSE).to_bytes()
    assert raw == b"CEHC" + b"\x01\x00\x00\x80"
    assert int.from_bytes(raw[:4], "little") == 0x43484543


@pytest.mark.parametrize(
    ("flag", "bit"),
    [
        (ConfigFlag.REPAIR, 0),
        (ConfigFlag.QUIET, 1),
        (ConfigFlag.UNSAFE_QUIRKS, 2),
        (ConfigFlag.CHAIN, 3),
        (ConfigFlag.REPAIR_ALL, 4),
        (ConfigFlag.VERBOSE, 31),
    ],
)
def test_config_flag_has_its_bit(flag, bit) -> None:
    assert flag == 1 << bit
    assert CheckConfig(flag).to_bytes()[4:] == (1 << bit).to_bytes(4, "little")


def test_config_has_no_other_flags() -> None:
    assert sum(ConfigFlag) == 0x8000_001F


@pytest.mark.parametrize(
    ("flags", "repair", "repair_all"),
    [
        (ConfigFlag(0), False, False),
        (ConfigFlag.REPAIR, True, False),
        (ConfigFlag.REPAIR_ALL, False, False),
        (ConfigFlag.REPAIR | ConfigFlag.REPAIR_ALL, True, True),
        (ConfigFlag.QUIET | ConfigFlag.CHAIN | ConfigFlag.VERBOSE, False, False),
        (ConfigFlag.QUIET | ConfigFlag.REPAIR, True, False),
    ],
)
def test_config_asks_for_a_repair(flags, repair, repair_all) -> None:
    config = CheckConfig(flags)
    assert (config.should_repair, config.should_repair_all) == (repair, repair_all)


@given(flags=u32)
def test_config_comes_back_the_same(flags) -> None:
    config = CheckConfig(ConfigFlag(flags))
    assert CheckConfig.from_bytes(config.to_bytes()) == config
    assert config.to_bytes()[4:] == flags.to_bytes(4, "little")


@pytest.mark.parametrize("raw", [b"", b"CEHC", b"CEHC\0\0\0", b"CEHC" + bytes(5), bytes(8)])
def test_config_of_another_length_or_magic_is_refused(raw) -> None:
    with pytest.raises(ImageError, match="CheckConfig"):
        CheckConfig.from_bytes(raw)


# CheckResult


def test_result_is_80_bytes_with_its_magic_and_padding() -> None:
    raw = CheckResult(format=0).to_bytes()
    assert len(raw) == 80
    assert int.from_bytes(raw[:4], "little") == 0x43485253
    assert raw[4:] == bytes(76)


def test_fields_of_a_result_fill_it_without_gaps() -> None:
    end = 4
    for _, offset, size in RESULT_FIELDS:
        assert offset == end
        end += size
    assert end == 76


@pytest.mark.parametrize(("name", "offset", "size"), RESULT_FIELDS)
def test_field_of_a_result_is_little_endian_at_its_offset(name, offset, size) -> None:
    value = int.from_bytes(bytes(range(0x11, 0x11 + size)), "little")
    raw = bytearray(with_field(name, value).to_bytes())
    assert raw[offset : offset + size] == value.to_bytes(size, "little")
    plain_raw = CheckResult().to_bytes()
    raw[offset : offset + size] = plain_raw[offset : offset + size]
    assert raw == plain_raw


@given(
    values=st.fixed_dictionaries(
        {name: u64 if size == 8 else u32 for name, _, size in RESULT_FIELDS}
    )
)
def test_result_comes_back_the_same(values) -> None:
    result = CheckResult(**values | {"flags": ResultFlag(values["flags"])})
    assert CheckResult.from_bytes(result.to_bytes()) == result


@pytest.mark.parametrize("length", [0, 79, 81])
def test_result_of_another_length_is_refused(length) -> None:
    with pytest.raises(ImageError, match="CheckResult length"):
        CheckResult.from_bytes(CheckResult().to_bytes().ljust(81, b"\0")[:length])


def test_result_of_another_magic_is_refused() -> None:
    with pytest.raises(ImageError, match="CheckResult magic"):
        CheckResult.from_bytes(bytes(80))


@pytest.mark.parametrize(
    ("flag", "bit"),
    [
        (ResultFlag.VALID, 0),
        (ResultFlag.HAS_LEAKS, 1),
        (ResultFlag.HAS_CORRUPTIONS, 2),
        (ResultFlag.DIRTY, 3),
        (ResultFlag.CORRUPT_BIT, 4),
        (ResultFlag.INCOMPLETE, 5),
        (ResultFlag.NOT_SUPPORTED, 6),
        (ResultFlag.CHAIN_ERRORS, 7),
        (ResultFlag.REPAIR_INCOMPLETE, 8),
    ],
)
def test_result_flag_has_its_bit_and_is_asked_for(flag, bit) -> None:
    assert flag == 1 << bit
    result = CheckResult(flags=flag)
    assert [other for other in ResultFlag if result.has(other)] == [flag]


def test_result_has_no_other_flags() -> None:
    assert sum(ResultFlag) == 0x1FF


def test_counter_that_does_not_fit_is_held_at_the_maximum() -> None:
    raw = CheckResult(leaks=1 << 32, corruptions=1 << 40, clusters_checked=1 << 32).to_bytes()
    result = CheckResult.from_bytes(raw)
    assert (result.leaks, result.corruptions) == (0xFFFF_FFFF, 0xFFFF_FFFF)
    assert result.clusters_checked == 1 << 32


# Of a report


def of_rule(name: str) -> CheckResult:
    return CheckResult.of(check_image(RULES[name]().image.source))


def test_result_of_a_clean_image() -> None:
    image = with_snapshot()
    counters = check_image(image.source).counters
    assert CheckResult.of(check_image(image.source)) == CheckResult(
        image_end_offset=len(image.data),
        clusters_checked=counters.total_clusters,
        clusters_allocated=counters.allocated_clusters,
        fragmentation=100 * counters.fragmented_clusters // counters.allocated_clusters,
        flags=ResultFlag.VALID,
    )


FLAGS = {
    "leaked_cluster": ResultFlag.HAS_LEAKS,
    "l2_reserved_bits": ResultFlag.HAS_CORRUPTIONS,
    "two_entries_on_one_cluster": ResultFlag.HAS_LEAKS | ResultFlag.HAS_CORRUPTIONS,
    "two_entries_on_one_cluster_counted_right": ResultFlag.HAS_CORRUPTIONS,
    "dirty_bit": ResultFlag.DIRTY,
    "corrupt_bit": ResultFlag.CORRUPT_BIT,
    "bitmap_entry_invalid": (
        ResultFlag.INCOMPLETE | ResultFlag.HAS_CORRUPTIONS | ResultFlag.HAS_LEAKS
    ),
}


@pytest.mark.parametrize(("name", "flags"), FLAGS.items(), ids=FLAGS)
def test_flags_of_a_damaged_image(name, flags) -> None:
    assert of_rule(name).flags == flags | ResultFlag.VALID


@pytest.mark.parametrize(
    ("name", "refcounts", "subclusters"),
    [
        ("leaks_in_runs", 6, 0),
        ("refcount_low", 1, 0),
        ("refcount_missing", 1, 0),
        ("subcluster_conflict", 0, 1),
        ("subclusters_of_an_unallocated_cluster", 0, 1),
        ("compressed_subclusters", 1, 1),
        ("l2_copied_missing", 0, 0),
    ],
)
def test_errors_are_counted_by_what_they_are_about(name, refcounts, subclusters) -> None:
    result = of_rule(name)
    assert (result.refcount_errors, result.subcluster_errors) == (refcounts, subclusters)
    assert result.total_errors == result.corruptions + result.leaks


def test_torn_report_is_not_valid() -> None:
    report = replace(check_image(plain().source), in_use=True)
    assert not CheckResult.of(report).has(ResultFlag.VALID)


@pytest.mark.parametrize(
    ("data", "flags"),
    [
        (b"no image", ResultFlag.INCOMPLETE | ResultFlag.NOT_SUPPORTED),
        (b"QFI\xfb\0\0\0\x04" + bytes(200), ResultFlag.INCOMPLETE),
    ],
)
def test_image_that_cannot_be_read(data, flags) -> None:
    assert CheckResult.of(check_image(Bytes(data))).flags == flags


def test_empty_disk_is_not_fragmented() -> None:
    report = Report(layout=None, counters=CheckCounters(total_clusters=5))
    assert CheckResult.of(report).fragmentation == 0


def test_what_a_repair_has_mended() -> None:
    report = check_image(plain().source)
    mended = RepairCounters(leaks=5, refcounts=1 << 40, corruptions=3, incomplete=True)
    result = CheckResult.from_bytes(CheckResult.of(report, mended).to_bytes())
    assert result.repaired_leaks == 5
    assert result.repaired_refcounts == (1 << 32) - 1
    assert result.repaired_corruptions == 3
    assert result.flags == ResultFlag.VALID | ResultFlag.REPAIR_INCOMPLETE
    complete = CheckResult.of(report, replace(mended, incomplete=False))
    assert complete.flags == ResultFlag.VALID
