"""What findings mean for the guest's bytes."""

import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.arrays import I64
from planner.check.check import check_image
from planner.findings.kinds import ACTIVE
from planner.qcow2 import entries
from planner.triage.impact import Harm, Impact, _merged, guest_impact
from tests.images.builder import MIB, Image, ImageBuilder
from tests.images.damage import DAMAGES
from tests.images.sample import sample

SIZE = 8 * MIB
CLUSTER = 1 << 12


def build() -> Image:
    """Four L2 tables with five clusters each; a snapshot; then the first cluster anew."""
    builder = ImageBuilder(size=SIZE, cluster_bits=12)
    rng = random.Random(1)
    for l1_index in range(4):
        first = l1_index * builder.geometry.l2_entries
        builder.write(first, rng.randbytes(5 * CLUSTER))
    builder.take_snapshot("one")
    builder.write(0, rng.randbytes(CLUSTER))
    return builder.build()


def impact(image: Image, snapshot: int = ACTIVE) -> Impact:
    return guest_impact(check_image(image.source), snapshot)


def ranges(found: Impact) -> dict[Harm, list[tuple[int, int]]]:
    return {harm: list(some.first(9)) for harm, some in found.ranges.items() if len(some)}


@pytest.mark.parametrize("size", [1 << 63, (1 << 64) - 1])
def test_the_disk_of_a_snapshot_that_is_larger_than_any_is_no_less_lost(size: int) -> None:
    builder = ImageBuilder(size=SIZE, cluster_bits=12)
    builder.write(0, b"data")
    builder.take_snapshot("one", extra_data=bytes(8) + size.to_bytes(8, "big"))
    image = builder.build()
    DAMAGES["snapshot-l1-misaligned"](image, random.Random(1))
    found = impact(image, 0)
    assert found.size == (1 << 63) - 1
    assert ranges(found)[Harm.LOST] == [(0, found.size)]


def test_a_clean_image_is_safe() -> None:
    found = impact(build())
    assert ranges(found) == {}
    assert (found.size, found.safe, found.is_whole) == (SIZE, SIZE, True)


def test_what_lies_past_the_end_is_lost() -> None:
    image = build()
    for cluster in (1, 2, 4):
        past = (image.host_clusters + 9) * CLUSTER
        image.set_word(image.l2_at(cluster), past | entries.COPIED)
    found = impact(image)
    assert ranges(found)[Harm.LOST] == [(CLUSTER, 2 * CLUSTER), (4 * CLUSTER, CLUSTER)]
    assert found.safe == SIZE - 3 * CLUSTER


def test_zeros_that_qemu_does_not_read_are_lost() -> None:
    image = build()
    image.set_bits(image.l2_at(1), 512 | entries.ZERO)
    assert ranges(impact(image))[Harm.LOST] == [(CLUSTER, CLUSTER)]


def test_an_l2_table_that_cannot_be_read_loses_all_that_it_maps() -> None:
    image = build()
    image.set_bits(image.l1_at(1), 512)
    coverage = image.geometry.l2_coverage
    found = impact(image)
    assert ranges(found)[Harm.LOST] == [(coverage, coverage)]
    assert not found.is_whole


def test_an_l1_table_that_is_cut_off_loses_what_its_lost_entries_mapped() -> None:
    image = build()
    at = image.header.l1_table_offset
    image.change_header(l1_table_offset=(image.host_clusters + 5) * CLUSTER)
    assert ranges(impact(image))[Harm.LOST] == [(0, SIZE)]
    image.change_header(l1_table_offset=at, l1_size=image.cluster_size)
    del image.data[at + 2 * 8 :]
    coverage = image.geometry.l2_coverage
    assert ranges(impact(image))[Harm.LOST] == [(2 * coverage, SIZE - 2 * coverage)]


def test_a_snapshot_whose_l1_table_is_nowhere_is_lost_and_the_disk_is_not() -> None:
    image = build()
    image.set_bits(image.snapshots[0].offset, 8)
    assert ranges(impact(image, 0))[Harm.LOST] == [(0, SIZE)]
    assert Harm.LOST not in ranges(impact(image))


def test_a_guest_cluster_on_the_l1_table_makes_all_of_the_disk_suspect() -> None:
    image = build()
    image.set_word(image.l2_at(0), image.header.l1_table_offset | entries.COPIED)
    assert ranges(impact(image))[Harm.SUSPECT] == [(0, SIZE)]
    assert Harm.SUSPECT not in ranges(impact(image, 0))


def test_both_guest_clusters_of_a_shared_one_are_suspect() -> None:
    image = build()
    image.set_word(image.l2_at(0), image.word(image.l2_at(3)))
    suspect = ranges(impact(image))[Harm.SUSPECT]
    assert suspect == [(0, CLUSTER), (3 * CLUSTER, CLUSTER)]


def test_a_guest_cluster_on_an_l2_table_makes_all_that_it_maps_suspect() -> None:
    image = build()
    image.set_word(image.l2_at(0), image.l2_table(2) | entries.COPIED)
    coverage = image.geometry.l2_coverage
    assert ranges(impact(image))[Harm.SUSPECT] == [(0, CLUSTER), (2 * coverage, coverage)]


def test_what_is_counted_too_low_is_at_risk_in_every_disk_that_has_it() -> None:
    image = build()
    image.set_refcount(image.host_offset(3) // CLUSTER, 1)
    assert ranges(impact(image))[Harm.AT_RISK] == [(3 * CLUSTER, CLUSTER)]
    assert ranges(impact(image, 0))[Harm.AT_RISK] == [(3 * CLUSTER, CLUSTER)]


@pytest.mark.parametrize(("flag", "harmed"), [(True, [(3 * CLUSTER, CLUSTER)]), (False, None)])
def test_a_copied_flag_too_many_is_a_risk_and_one_too_few_is_none(
    flag: bool, harmed: list[tuple[int, int]] | None
) -> None:
    image = build()
    if flag:
        image.set_bits(image.l2_at(3), entries.COPIED)
    else:
        image.clear_bits(image.l2_at(0), entries.COPIED)
    assert ranges(impact(image)).get(Harm.AT_RISK) == harmed


def test_the_worst_that_befalls_a_byte_counts() -> None:
    image = build()
    image.set_word(image.l2_at(0), image.word(image.l2_at(3)) | 1 << 61)
    found = impact(image)
    assert Harm.AT_RISK not in ranges(found)
    assert sum(some.size for some in found.ranges.values()) + found.safe == SIZE


@pytest.mark.parametrize("name", DAMAGES)
def test_no_damage_harms_more_than_there_is(name: str) -> None:
    image = sample().build()
    DAMAGES[name](image, random.Random(1))
    found = impact(image)
    assert found.safe + sum(some.size for some in found.ranges.values()) == found.size
    assert 0 <= found.safe <= found.size


BOUNDS = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 20)), max_size=9)


def bytes_of(bounds: I64, size: int) -> set[int]:
    return {at for low, high in bounds.T.tolist() for at in range(low, min(high, size))}


def bounds_of(rows: list[tuple[int, int]]) -> I64:
    start = np.array([row[0] for row in rows], dtype=np.int64)
    return np.stack((start, start + np.array([row[1] for row in rows], dtype=np.int64)))


@given(BOUNDS, BOUNDS, st.integers(1, 120))
def test_ranges_are_the_bytes_that_they_were(one, other, size) -> None:
    part = _merged(bounds_of(one), size)
    whole = _merged(np.concatenate((bounds_of(one), bounds_of(other)), axis=1), size)
    rest = whole.without(part)
    for some, expected in (
        (part, bytes_of(bounds_of(one), size)),
        (rest, bytes_of(bounds_of(other), size) - bytes_of(bounds_of(one), size)),
    ):
        assert bytes_of(np.stack((some.start, some.end)), size) == expected
        assert some.size == len(expected)
        assert (some.start[1:] > some.end[:-1]).all()


def test_a_million_ranges_are_merged_where_they_are() -> None:
    start = np.arange(1 << 20, dtype=np.int64) * 2 * CLUSTER
    bounds = np.stack((start, start + CLUSTER))
    tracemalloc.start()
    try:
        merged = _merged(bounds, int(bounds[1, -1]))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(merged) == 1 << 20
    assert peak < 4 * MIB
