"""planner.metadata.work_limits: what lies apart is followed, and of what lies in one place only so
much.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.check.check import check_image
from planner.findings.kinds import FindingKind
from planner.metadata.work_limits import (
    MAX_SHARED_BYTES,
    MAX_TABLE_BYTES,
    followed,
    followed_tables,
)
from planner.source import Bytes
from tests.images.bombs import BOMBS

MIB = 1 << 20
UNIT = MAX_SHARED_BYTES // 8


def chosen(*ranges: tuple[int, int]) -> list[bool]:
    start, end = np.array(ranges, dtype=np.int64).reshape(-1, 2).T
    return [bool(is_kept) for is_kept in followed(start, end)]


def test_no_tables_are_followed() -> None:
    assert chosen() == []


def test_tables_that_touch_are_all_followed() -> None:
    assert all(chosen(*((n * MIB, (n + 1) * MIB) for n in range(1000))))


def test_a_little_in_common_is_followed() -> None:
    assert all(chosen((0, MIB), (0, MIB)))


def test_one_table_over_another_is_followed_however_large_they_are() -> None:
    """An L2 table may have 2 MiB, and a single one that is misaligned hides nothing."""
    size = 2 * MAX_SHARED_BYTES
    assert all(chosen((0, size), (size // 4, size // 4 + size)))


@pytest.mark.parametrize("bits", [9, 16, 21])
@pytest.mark.parametrize("eighths", range(8))
def test_one_table_that_is_misaligned_hides_no_other(bits: int, eighths: int) -> None:
    size = 1 << bits
    assert all(chosen((0, size), (eighths * size // 8, size), (size, size), (2 * size, size)))


def test_of_very_many_in_one_place_a_few_are_followed() -> None:
    assert sum(chosen(*[(0, MIB)] * 1000)) == 1 + MAX_SHARED_BYTES // MIB


def test_what_shares_nothing_is_followed_beside_what_does() -> None:
    assert chosen((5 * MIB, 6 * MIB), *[(0, MIB)] * 10, (7 * MIB, 8 * MIB))[0::11] == [True, True]


def test_what_lies_in_holes_is_followed_up_to_a_limit() -> None:
    step = MAX_TABLE_BYTES // 4
    offset, entries = np.arange(6) * step, np.full(6, step // 8)
    assert followed_tables(offset, entries, 1 << 60).tolist() == [True] * 4 + [False] * 2


def test_the_l2_tables_of_a_large_disk_are_all_followed() -> None:
    """16 TiB in clusters of 64 KiB have 2 GiB of them."""
    offset = np.arange(1 << 15, dtype=np.int64) << 29
    assert followed(offset, offset + (1 << 16)).all()


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=12))
def test_what_is_followed_shares_no_more_than_allowed(pairs) -> None:
    ranges = [(start * UNIT, (start + length) * UNIT) for start, length in pairs]
    answers = chosen(*ranges)
    kept = [range(*pair) for pair, is_kept in zip(pairs_of(pairs), answers, strict=True) if is_kept]
    units = [unit for each in kept for unit in each]
    longest = max((len(each) for each in kept), default=0)
    assert (len(units) - len(set(units)) - longest) * UNIT <= MAX_SHARED_BYTES


def pairs_of(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(start, start + length) for start, length in pairs]


@pytest.mark.parametrize(
    "name", ["snapshots-with-one-l1-table", "bitmaps-with-one-table", "misaligned-l2-tables"]
)
def test_a_check_that_did_not_follow_everything_says_so(name) -> None:
    report = check_image(Bytes(bytes(BOMBS[name]().data)))
    assert report.verdict == "incomplete"
    assert not report.complete
    assert any("lie over others" in str(error) for error in report.stopped)
    assert FindingKind.CHECK_STOPPED in report.hidden
