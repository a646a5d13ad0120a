"""L1 entries that lead nowhere."""

import numpy as np

from planner.check.check import check_image
from planner.findings.kinds import ACTIVE
from planner.triage.l1_holes import Gaps, Place, PlaceKind, read_gaps
from tests.images.builder import MIB, Image, ImageBuilder

NONE_ASTRAY = np.zeros(0, dtype=np.int64)


def build(*l1_indices: int) -> Image:
    """A disk of eight L2 tables, of which these are there; then a snapshot."""
    builder = ImageBuilder(size=16 * MIB, cluster_bits=12)
    for l1_index in l1_indices:
        builder.write(l1_index * builder.geometry.l2_entries, b"data")
    builder.take_snapshot("one")
    return builder.build()


def gaps(image: Image) -> Gaps:
    return read_gaps(image.source, check_image(image.source), NONE_ASTRAY)


def rows(found: tuple[Place, ...]) -> list[tuple[str, int, int, int]]:
    return [(str(place.kind), place.snapshot, place.l1_index, place.count) for place in found]


def test_empty_entries_in_runs_the_active_disk_first() -> None:
    found = gaps(build(0, 3, 4))
    assert rows(found.first(9, only_active=True)) == [
        ("empty", ACTIVE, 1, 2),
        ("empty", ACTIVE, 5, 3),
    ]
    assert rows(found.first(9, only_active=False))[2:] == [("empty", 0, 1, 2), ("empty", 0, 5, 3)]
    assert (found.entries(only_active=True), found.entries(only_active=False)) == (5, 10)


def test_a_disk_without_gaps() -> None:
    found = gaps(build(*range(8)))
    assert found.first(9, only_active=False) == ()
    assert found.entries(only_active=False) == 0


def test_which_indices_lead_nowhere_in_one_of_the_disks() -> None:
    image = build(0, 3, 4)
    (snapshot,) = check_image(image.source).snapshots
    image.set_word(snapshot.l1_table_offset + 8 * 3, 0)
    covered = gaps(image).cover(np.arange(9))
    assert covered.tolist() == [False, True, True, True, False, True, True, True, False]
    assert not gaps(build(*range(8))).cover(np.arange(9)).any()


def test_entries_that_cannot_be_right_are_damaged() -> None:
    image = build(*range(8))
    image.set_bits(image.l1_at(1), 512)
    image.set_word(image.l1_at(2), image.host_clusters * image.cluster_size)
    image.set_word(image.l1_at(3), image.l2_table(4))
    found = gaps(image)
    assert rows(found.first(9, only_active=True)) == [
        ("damaged", ACTIVE, 1, 1),
        ("damaged", ACTIVE, 2, 1),
        ("damaged", ACTIVE, 3, 1),
        ("damaged", ACTIVE, 4, 1),
    ]


def test_damaged_entries_are_named_first() -> None:
    image = build(0, 7)
    image.set_word(image.l1_at(5), 512)
    assert rows(gaps(image).first(2, only_active=True)) == [
        ("damaged", ACTIVE, 5, 1),
        ("empty", ACTIVE, 1, 4),
    ]


def test_a_place_says_which_guest_bytes_it_maps() -> None:
    place = Place(PlaceKind.EMPTY, 2, 3, 1, 1 << 21)
    assert place.guest_offset == 3 << 21
    assert place.phrase == (
        "it could have mapped 2097152 bytes at guest offset 6291456"
        " (L1 entry 3 of snapshot 2 is empty)"
    )
