"""Who uses a contested cluster: every owner is listed, and whether it is guest or metadata."""

from collections.abc import Callable

import pytest

from planner.check.check import check_image
from planner.findings.kinds import ACTIVE, NONE, NOWHERE, FindingKind, Owner, Structure
from planner.metadata.work_limits import Limits
from planner.qcow2.entries import COPIED
from planner.qcow2.layout import Layout
from tests.images.builder import Image, ImageBuilder
from tests.images.corpus import RULES
from tests.images.corpus.rule import SIZE, builder, fill, plain, with_snapshot
from tests.images.luks_headers import luks_bytes


def owners_of(image: Image, offset: int) -> list[Owner]:
    return check_image(image.source).owners.of(offset // SIZE)


def guest(cluster: int, snapshot: int = ACTIVE, structure: Structure = Structure.DATA) -> Owner:
    return Owner(structure, snapshot, 0, cluster, NONE)


def rich() -> Image:
    """An image with one of every structure."""
    made = fill(builder(crypt_method=2, luks_header=luks_bytes()))
    made.write_compressed(20, b"c")
    made.add_bitmap("bits", {1})
    made.take_snapshot("before")
    made.write(1, b"new")
    return made.build()


def luks_offset(image: Image) -> int:
    crypto = Layout.read(image.source).extensions.crypto
    assert crypto is not None
    return crypto.offset


def directory_offset(image: Image) -> int:
    pointer = Layout.read(image.source).extensions.bitmaps
    assert pointer is not None
    return pointer.bitmap_directory_offset


def compressed_offset(image: Image) -> int:
    return image.word(image.l2_at(20)) & ((1 << image.geometry.compressed_shift) - 1)


METADATA: dict[str, tuple[Callable[[Image], int], list[Owner]]] = {
    "L1 table": (
        lambda image: image.header.l1_table_offset,
        [Owner(Structure.L1_TABLE, ACTIVE, NONE, NONE, NONE)],
    ),
    "L1 table of a snapshot": (
        lambda image: image.snapshots[0].l1_table_offset,
        [Owner(Structure.L1_TABLE, 0, NONE, NONE, 0)],
    ),
    "L2 table": (
        lambda image: image.l2_table(0),
        [Owner(Structure.L2_TABLE, ACTIVE, 0, NONE, NONE)],
    ),
    "L2 table that a snapshot shares": (
        lambda image: image.l2_table(1),
        [
            Owner(Structure.L2_TABLE, ACTIVE, 1, NONE, NONE),
            Owner(Structure.L2_TABLE, 0, 1, NONE, NONE),
        ],
    ),
    "L2 table of a snapshot": (
        lambda image: image.l2_table(0, snapshot=0),
        [Owner(Structure.L2_TABLE, 0, 0, NONE, NONE)],
    ),
    "snapshot table": (
        lambda image: image.header.snapshots_offset,
        [Owner(Structure.SNAPSHOT_TABLE, NOWHERE, NONE, NONE, NONE)],
    ),
    "refcount table": (
        lambda image: image.header.refcount_table_offset,
        [Owner(Structure.REFTABLE, NOWHERE, NONE, NONE, NONE)],
    ),
    "refcount block": (
        lambda image: image.refblock(0),
        [Owner(Structure.REFBLOCK, NOWHERE, NONE, NONE, 0)],
    ),
    "LUKS header": (luks_offset, [Owner(Structure.LUKS, NOWHERE, NONE, NONE, NONE)]),
    "bitmap directory": (
        directory_offset,
        [Owner(Structure.BITMAP_DIRECTORY, NOWHERE, NONE, NONE, NONE)],
    ),
    "bitmap table": (
        lambda image: image.bitmaps[0].bitmap_table_offset,
        [Owner(Structure.BITMAP_TABLE, NOWHERE, NONE, NONE, 0)],
    ),
    "bitmap data": (
        lambda image: image.word(image.bitmaps[0].bitmap_table_offset),
        [Owner(Structure.BITMAP_DATA, NOWHERE, NONE, NONE, 0)],
    ),
}


@pytest.mark.parametrize(("offset_of", "owners"), METADATA.values(), ids=METADATA)
def test_guest_cluster_on_metadata_lists_both(offset_of, owners) -> None:
    image = rich()
    offset = offset_of(image)
    image.set_word(image.l2_at(1), offset | COPIED)
    report = check_image(image.source)
    found = report.owners.of(offset // SIZE)
    assert sorted(found, key=lambda owner: owner.structure.is_guest) == [*owners, guest(1)]
    assert [owner.structure.is_guest for owner in found].count(True) == 1
    contested = list(report.rows(FindingKind.MULTIPLE_OWNERS))
    assert [row.host_offset for row in contested] == [offset]
    assert (contested[0].guest_offset, contested[0].guest_length) == (SIZE, SIZE)
    assert contested[0].found == 2


def test_guest_cluster_on_the_header_lists_both() -> None:
    image = rich()
    image.set_word(image.l2_at(1), 1 << 62 | 100)
    assert owners_of(image, 0) == [
        Owner(Structure.HEADER, NOWHERE, NONE, NONE, NONE),
        guest(1, structure=Structure.COMPRESSED),
    ]


def test_guest_cluster_on_compressed_data_lists_both() -> None:
    image = rich()
    offset = compressed_offset(image) // SIZE * SIZE
    image.set_word(image.l2_at(1), offset | COPIED)
    assert owners_of(image, offset) == [
        guest(1),
        guest(20, structure=Structure.COMPRESSED),
        guest(20, snapshot=0, structure=Structure.COMPRESSED),
    ]


def test_two_guest_clusters_on_one_host_cluster_are_listed() -> None:
    image = RULES["two_entries_on_one_cluster"]().image
    assert owners_of(image, image.host_offset(1)) == [guest(1), guest(5)]


def test_cluster_that_the_disk_and_a_snapshot_map_differently_lists_both() -> None:
    image = RULES["snapshot_and_active_disk_contest_a_cluster"]().image
    assert owners_of(image, image.host_offset(5)) == [guest(5), guest(2, snapshot=0)]


def test_l2_table_at_two_places_lists_both() -> None:
    image = RULES["l1_two_entries_on_one_table"]().image
    assert owners_of(image, image.l2_table(0)) == [
        Owner(Structure.L2_TABLE, ACTIVE, 0, NONE, NONE),
        Owner(Structure.L2_TABLE, ACTIVE, 1, NONE, NONE),
    ]


def test_cluster_with_too_low_a_refcount_lists_its_owners() -> None:
    image = RULES["refcount_low"]().image
    assert owners_of(image, image.host_offset(1)) == [guest(1), guest(1, snapshot=0)]


def test_owners_of_a_run_of_clusters() -> None:
    image = RULES["l1_two_entries_on_one_table"]().image
    owners = check_image(image.source).owners
    assert len(owners.of(1, 5)) == 10
    assert owners.of(1, 5, limit=3) == owners.of(1, 5)[:3]
    assert not owners.truncated


@pytest.mark.parametrize("limit", range(1, 11))
def test_no_more_owners_are_kept_than_a_report_can_hold(limit) -> None:
    source = RULES["l1_two_entries_on_one_table"]().image.source
    everyone = check_image(source).owners.of(1, 5)
    owners = check_image(source, limits=Limits(owners=limit)).owners
    assert len(owners.cluster) == limit
    assert owners.truncated is (limit < len(everyone))
    assert set(owners.of(1, 5)) <= set(everyone)


@pytest.mark.parametrize("make", [plain, with_snapshot, rich], ids=lambda make: make.__name__)
def test_what_snapshots_share_is_not_contested(make) -> None:
    report = check_image(make().source)
    assert list(report.rows()) == []
    assert len(report.owners.cluster) == 0


def test_many_snapshots_of_one_disk_are_not_contested() -> None:
    made = fill(builder())
    for number in range(6):
        made.take_snapshot(str(number))
        made.write(number % 3, bytes([number]))
    assert list(check_image(made.build().source).rows()) == []


def test_an_entry_in_two_tables_that_lie_over_each_other_is_of_both() -> None:
    made = ImageBuilder(cluster_bits=18, size=2 << 33)
    made.write(0, b"shared")
    image = made.build()
    table, word = image.l2_table(0), image.word(image.l2_at(0))
    image.set_word(image.header.l1_table_offset + 8, (table + 8192) | COPIED)
    image.set_word(table + (80 << 10), word)
    owners = check_image(image.source).owners.of(image.host_offset(0) >> 18)
    assert [(owner.l1_index, owner.l2_index) for owner in owners] == [
        *((0, 0), (0, (80 << 10) // 8)),
        (1, (72 << 10) // 8),
    ]
