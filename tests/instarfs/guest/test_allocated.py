"""How many bytes of a disk are told to be more than zeros: never fewer than there are."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Hashable
from pathlib import Path

import pytest
import trio

from instarfs.errors import ImageMissing
from instarfs.guest.allocated import AllocatedBytes
from instarfs.guest.follow import Follow
from instarfs.guest.guest import Guest
from instarfs.guest.place import Part, Place
from instarfs.image.file import Image
from tests.images.builder import MIB, ImageBuilder

CLUSTER = 1 << 16
COVERAGE = 512 * MIB
DISK = Place(Part.DISK)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A count that is waited for ends, however busy the machine is."""
    monkeypatch.setattr("instarfs.guest.allocated.PATIENCE", 60)


@pytest.fixture
def allocated(tmp_path: Path) -> Callable[..., AllocatedBytes]:
    """Of what is built, on a disk that is in memory."""
    numbers = itertools.count()

    def write(builder: ImageBuilder) -> AllocatedBytes:
        path = tmp_path / f"image{next(numbers)}"
        path.write_bytes(builder.build().data)
        image = Image.open(str(path))
        return AllocatedBytes(lambda: (image, image.generation()))

    return write


def scattered(tables: int, **options: object) -> ImageBuilder:
    """A cluster of data in each of so many L2 tables of a disk that has 100."""
    builder = ImageBuilder(size=100 * COVERAGE, **options)  # type: ignore[arg-type]
    for table in range(tables):
        builder.write(table * COVERAGE // CLUSTER, b"data")
    return builder


def learn(it: AllocatedBytes, place: Place = DISK) -> int | None:
    trio.run(it.learn, place)
    return it.known(place)


def test_a_small_disk_is_counted_in_passing(allocated: Callable[..., AllocatedBytes]) -> None:
    builder = ImageBuilder(size=1 << 38)
    builder.write(0, b"x" * 4 * MIB)
    builder.write_zeros(100)
    builder.write_compressed(200, b"y" * CLUSTER)
    it = allocated(builder)
    assert it.known(DISK) == 4 * MIB + CLUSTER
    assert allocated(ImageBuilder(size=1 << 38)).known(DISK) == 0


def test_a_large_disk_has_a_bound_until_it_is_opened(
    allocated: Callable[..., AllocatedBytes],
) -> None:
    it = allocated(scattered(60))
    assert it.known(DISK) == 60 * COVERAGE
    assert learn(it) == 60 * CLUSTER


def test_what_is_in_a_backing_file_counts(allocated: Callable[..., AllocatedBytes]) -> None:
    builder = ImageBuilder(size=4 * MIB, backing_file=b"base", backing_format=b"raw")
    builder.write_zeros(3)
    assert allocated(builder).known(DISK) == 4 * MIB - CLUSTER
    large = allocated(scattered(60, backing_file=b"base", backing_format=b"raw"))
    assert large.known(DISK) == 100 * COVERAGE == learn(large)


def test_snapshots_once_they_were_opened(allocated: Callable[..., AllocatedBytes]) -> None:
    builder = scattered(3)
    builder.take_snapshot("one")
    builder.write(7, b"more")
    it = allocated(builder)
    one = Place(Part.SNAPSHOT, 0)
    assert it.known(one) is None
    assert learn(it, one) == 3 * CLUSTER
    assert learn(it) == 4 * CLUSTER
    assert learn(it, Place(Part.SNAPSHOT, 1)) is None
    assert it.known(Place(Part.VMSTATE, 0)) is None
    assert learn(it, Place(Part.VMSTATE, 0)) == 0


def test_the_table_of_very_many_snapshots_is_read_once(tmp_path: Path) -> None:
    builder = scattered(1)
    for number in range(200):
        builder.take_snapshot("x" * 1000 + str(number))
    path = tmp_path / "image"
    path.write_bytes(builder.build().data)
    image = Image.open(str(path))
    state, read, places = image.generation(), [0], [Place(Part.SNAPSHOT, at) for at in range(50)]

    def meter(size: int) -> None:
        read[0] += size

    image.meter = meter
    guest = Guest(image, Follow())
    for place in places:
        guest.find(place)
    it = AllocatedBytes(lambda: (image, state))
    for place in places:
        assert learn(it, place) == CLUSTER
    table = 200 * 1000
    assert table < read[0] < 2 * table + len(places) * 8 * CLUSTER // 2


def test_an_image_that_changes_is_not_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "image"
    path.write_bytes(scattered(0).build().data)
    image, states = Image.open(str(path)), itertools.count()
    it = AllocatedBytes(lambda: (image, next(states)))
    assert it.known(DISK) == 0
    path.write_bytes(scattered(1).build().data)
    assert it.known(DISK) is None  # so soon nothing is known
    monkeypatch.setattr("instarfs.guest.allocated.REST", 0)
    assert it.known(DISK) == CLUSTER


def test_the_image_is_looked_at_in_the_event_loop_alone(tmp_path: Path) -> None:
    """Two threads that both see that it was replaced would open it twice."""
    path = tmp_path / "image"
    path.write_bytes(scattered(60).build().data)
    image, looking = Image.open(str(path)), set[int]()

    def look() -> tuple[Image, Hashable]:
        looking.add(threading.get_ident())
        return image, "state"

    assert learn(AllocatedBytes(look)) == 60 * CLUSTER
    assert looking == {threading.get_ident()}


def test_of_what_makes_no_sense_nothing_is_known(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"no image")
    image = Image.open(str(path))
    it = AllocatedBytes(lambda: (image, 1))
    assert it.known(DISK) is None
    assert learn(it) is None

    def gone() -> tuple[Image, int]:
        raise ImageMissing("image")

    assert AllocatedBytes(gone).known(DISK) is None
    assert learn(AllocatedBytes(gone)) is None
