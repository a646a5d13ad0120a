"""Guest bytes by offset: what is read once however often it is asked for."""

from pathlib import Path

from instarfs.guest.disk import Qcow2Layer
from instarfs.guest.files import DiskSource
from instarfs.guest.follow import Follow
from instarfs.guest.guest import Guest
from instarfs.guest.place import Part, Place
from instarfs.image.file import Image
from planner.guestfs.work import Work
from planner.source import SECTOR, read_around
from tests.images.builder import ImageBuilder

CLUSTER = 1 << 16


def test_what_does_not_unpack_is_read_and_tried_once_in_however_many_parts_it_is_read(
    tmp_path: Path,
) -> None:
    builder = ImageBuilder(cluster_bits=16, size=1 << 29)
    builder.write_compressed(0, b"x")
    made = builder.build()
    word, shift = made.word(made.l2_at(0)), builder.geometry.compressed_shift
    made.data[word & ((1 << shift) - 1)] = 0x07  # a block of a type that there is not
    made.set_word(made.l2_at(0), word | (CLUSTER // SECTOR - 1) << shift)  # as long as can be
    made.data += bytes(CLUSTER)
    path = tmp_path / "a.qcow2"
    path.write_bytes(made.data)
    read: list[int] = []
    with Image.open(str(path)) as image:
        image.meter = read.append
        disk = Guest(image, Follow(())).find(Place(Part.DISK))
        assert isinstance(disk.layer, Qcow2Layer)
        unread = read_around(DiskSource(disk, Work()), 0, memoryview(bytearray(CLUSTER)))
        assert unread == [(start, start + SECTOR) for start in range(0, CLUSTER, SECTOR)]
        assert disk.layer.unpacked_bytes == CLUSTER
        # What it is stored in, and the tables that lead there.
        assert CLUSTER < sum(read) <= 3 * CLUSTER
