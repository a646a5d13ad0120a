"""Tables among leaked clusters, read through: what they map, and what of it cannot be read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from instarfs.errors import GuestDamaged, GuestElsewhere
from instarfs.guest.follow import Follow
from instarfs.guest.guest import Guest
from instarfs.guest.place import Part, Place
from instarfs.image.file import Image
from instarfs.inspect.leaked_tables import LostTables
from planner.check.check import check_image
from planner.check.report import Report
from planner.triage.triage import Triage, triage_leaks
from tests.images.builder import Image as Made
from tests.images.builder import ImageBuilder

SIZE = 4096


@dataclass(frozen=True)
class Looked:
    report: Report
    triage: Triage


def made(backing_file: bytes = b"") -> ImageBuilder:
    builder = ImageBuilder(cluster_bits=12, size=4 << 20, backing_file=backing_file)
    for cluster in (0, 1, 5, 600):
        builder.write(cluster, bytes([cluster % 251 + 1]) * SIZE)
    builder.write_compressed(7, b"packed" * 600 + bytes(SIZE - 3600))
    return builder


def looked_into(image: Made) -> Looked:
    report = check_image(image.source)
    return Looked(report, triage_leaks(image.source, report))


def tables_of(image: Made) -> LostTables:
    found = looked_into(image)
    return LostTables(lambda: found)


def without_table(image: Made, l1_index: int = 0) -> int:
    """The host offset of the L2 table that nothing leads to now."""
    table = image.l2_table(l1_index)
    image.set_word(image.l1_at(l1_index), 0)
    return table


def guest_of(image: Made, folder: Path) -> Guest:
    path = folder / "image.qcow2"
    path.write_bytes(image.data)
    return Guest(Image.open(str(path)), Follow())


def test_until_somebody_has_looked_there_is_nothing() -> None:
    tables = LostTables(lambda: None)
    assert tables.l2_tables(9) == tables.snapshots(9) == []
    assert tables.l2_table(0) is tables.snapshot(0) is None


def test_of_a_sound_image_no_table_is_lost() -> None:
    image = made().build()
    assert tables_of(image).l2_tables(9) == []
    assert tables_of(image).l2_table(image.l2_table(0)) is None


def test_a_lost_table_is_as_long_as_what_it_maps(tmp_path: Path) -> None:
    image = made().build()
    guest = guest_of(image, tmp_path)
    before = guest.find(Place(Part.DISK)).read(0, 2 << 20)
    offset = without_table(image)
    tables = tables_of(image)
    assert tables.l2_tables(9) == [offset]
    assert tables.l2_tables(0) == []
    place = tables.l2_table(offset)
    assert place == Place(Part.LOST_TABLE, offset, size=2 << 20)
    assert guest_of(image, tmp_path).find(place).read(0, 4 << 20) == before
    for other in (-1, 0, offset + 1, offset + SIZE, 1 << 62, 1 << 70):
        assert tables.l2_table(other) is None


def test_what_of_it_cannot_be_read_is_an_error_there(tmp_path: Path) -> None:
    image = made().build()
    image.set_word(image.l2_at(1), 1 << 40)
    place = Place(Part.LOST_TABLE, without_table(image), size=2 << 20)
    disk = guest_of(image, tmp_path).find(place)
    assert disk.read(0, SIZE) == b"\x01" * SIZE
    with pytest.raises(GuestDamaged):
        disk.read(SIZE, SIZE)
    assert disk.read(5 * SIZE, SIZE) == b"\x06" * SIZE


def test_what_may_be_in_the_backing_file_is_not_called_zeros(tmp_path: Path) -> None:
    image = made(b"beneath").build()
    offset = without_table(image)
    place = tables_of(image).l2_table(offset)
    assert place is not None
    disk = guest_of(image, tmp_path).find(place)
    assert disk.read(0, SIZE) == b"\x01" * SIZE
    with pytest.raises(GuestElsewhere, match="not known"):
        disk.read(2 * SIZE, SIZE)


@pytest.mark.parametrize("keeps_entry", [True, False])
def test_a_lost_l1_table_is_a_disk(tmp_path: Path, keeps_entry: bool) -> None:
    builder = made()
    builder.take_snapshot("one")
    builder.write(0, b"new" * 1000)
    image = builder.build()
    l1 = image.snapshots[0].l1_table_offset
    guest = guest_of(image, tmp_path)
    before = guest.find(Place(Part.SNAPSHOT, 0)).read(0, 4 << 20)
    table = image.header.snapshots_offset
    image.change_header(nb_snapshots=0, snapshots_offset=table if keeps_entry else 0)
    if not keeps_entry:
        image.data[table : table + SIZE] = bytes(SIZE)
    tables = tables_of(image)
    assert tables.snapshots(9) == [l1]
    place = tables.snapshot(l1)
    assert place is not None
    assert place.size == 4 << 20
    assert guest_of(image, tmp_path).find(place).read(0, 4 << 20) == before
    assert tables.snapshot(l1 + SIZE) is None


def test_an_l1_table_of_several_clusters_is_one(tmp_path: Path) -> None:
    builder = ImageBuilder(cluster_bits=9, size=8 << 20)
    for cluster in range(0, 16_384, 8):
        builder.write(cluster, bytes([cluster // 64 % 250 + 1]) * 512)
    builder.take_snapshot("one")
    for cluster in range(0, 16_384, 8):
        builder.write(cluster, b"new" * 100)
    image = builder.build()
    l1, size = image.snapshots[0].l1_table_offset, image.snapshots[0].l1_size * 8
    assert size > 2 * 512
    guest = guest_of(image, tmp_path)
    before = guest.find(Place(Part.SNAPSHOT, 0)).read(0, 8 << 20)
    table = image.header.snapshots_offset
    image.change_header(nb_snapshots=0, snapshots_offset=0)
    image.data[table : table + 512] = bytes(512)
    place = tables_of(image).snapshot(l1)
    assert place == Place(Part.LOST_SNAPSHOT, l1, size // 8, 8 << 20)
    assert guest_of(image, tmp_path).find(place).read(0, 8 << 20) == before
