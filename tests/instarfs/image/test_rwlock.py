"""instarfs.image.rwlock: readers keep strangers away together, and a writer comes after them."""

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from instarfs.image import locks
from instarfs.image.file import Image
from instarfs.image.locks import Access, Permission
from instarfs.image.rwlock import Sharing
from planner.errors import Cancelled
from planner.progress import tell_nobody, unless

DEADLINE = 10
WRITER = Access((Permission.CONSISTENT_READ, Permission.WRITE), ())
READ_LOCKS = {100, 201, 203}


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Image]:
    path = tmp_path / "image"
    path.write_bytes(b"x" * 1000)
    with Image.open(str(path)) as it:
        yield it


@pytest.fixture
def stranger(image: Image) -> Iterator[int]:
    """Somebody else's open file description of the image."""
    fd = os.open(image.path, os.O_RDONLY)
    yield fd
    os.close(fd)


def seen_by(stranger: int) -> set[int]:
    return {byte for byte in range(90, 260) if locks._is_held(stranger, byte)}


def test_the_last_reader_lets_the_locks_go(image: Image, stranger: int) -> None:
    sharing = Sharing()
    first, second = ExitStack(), ExitStack()
    assert first.enter_context(sharing.reading(image))
    assert second.enter_context(sharing.reading(image))
    first.close()
    assert seen_by(stranger) == READ_LOCKS
    second.close()
    assert seen_by(stranger) == set()


def test_reading_goes_on_beside_a_strange_writer_and_says_so(image: Image, stranger: int) -> None:
    sharing = Sharing()
    with locks.held(stranger, image.path, WRITER), sharing.reading(image) as is_kept:
        assert not is_kept
        # The writer may come and go: what was not kept from the start is not kept.
        assert seen_by(stranger) == set()
    with sharing.reading(image) as is_kept:
        assert is_kept


def test_a_writer_waits_for_readers_and_takes_no_lock_from_them(
    image: Image, stranger: int
) -> None:
    sharing = Sharing()
    is_writing, may_end = threading.Event(), threading.Event()

    def write() -> None:
        with sharing.writing(tell_nobody):
            is_writing.set()
            assert may_end.wait(DEADLINE)

    with sharing.reading(image):
        writer = threading.Thread(target=write)
        writer.start()
        while True:
            # Whoever comes now does not hold the writer up.
            with sharing.reading(image) as is_kept:
                if not is_kept:
                    break
        assert not is_writing.is_set()
        assert seen_by(stranger) == READ_LOCKS
    assert is_writing.wait(DEADLINE)
    with sharing.reading(image) as is_kept:
        assert not is_kept
        assert seen_by(stranger) == set()
    may_end.set()
    writer.join(DEADLINE)
    with sharing.reading(image) as is_kept:
        assert is_kept


def test_waiting_can_be_cancelled(image: Image) -> None:
    sharing = Sharing()
    asked = iter([False, False, True])
    with sharing.reading(image):
        with pytest.raises(Cancelled), sharing.writing(unless(lambda: next(asked))):
            pytest.fail("it did not wait")
        with sharing.reading(image) as is_kept:
            assert is_kept


def test_a_failed_writer_is_gone(image: Image) -> None:
    sharing = Sharing()
    with pytest.raises(ZeroDivisionError), sharing.writing(tell_nobody):
        raise ZeroDivisionError
    with sharing.reading(image) as is_kept:
        assert is_kept
