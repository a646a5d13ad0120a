"""instarfs.inspect.subject: which file a path names now, and what is known of it."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from instarfs.errors import ImageNotFollowed, ImageReplaced, ImageSilent
from instarfs.image.file import Image
from instarfs.image.locks import Access, Permission, held
from instarfs.inspect import asking
from instarfs.inspect.subject import Subject
from tests.images.sample import sample

OLD = 10**18
WRITER = Access((Permission.CONSISTENT_READ, Permission.WRITE), ())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    put(path, b"x" * 1000)
    return path


@pytest.fixture
def subject(path: Path) -> Subject:
    return Subject(Image.open(str(path)))


def put(path: Path, content: bytes) -> None:
    """As another file, written long ago."""
    other = path.with_name("other")
    other.write_bytes(content)
    os.utime(other, ns=(OLD, OLD))
    other.replace(path)


def test_the_file_that_took_the_path_is_another_image(subject: Subject, path: Path) -> None:
    told: list[int] = []
    subject.when_replaced(lambda: told.append(subject.image.generation().size))
    first, state, moment = subject.image, subject.state(), subject.moment()
    assert (subject.state(), subject.moment()) == (state, moment)
    assert subject.to_repair() is first
    put(path, b"x" * 999)
    assert subject.state() != state
    assert subject.moment() != moment
    assert subject.image is not first
    assert told == [999]
    with pytest.raises(ImageReplaced):
        subject.to_repair()
    subject.reviewed(subject.image)
    assert subject.to_repair() is subject.image


def test_a_file_that_was_swapped_while_it_was_looked_at_is_known_when_it_comes_back(
    subject: Subject, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, whole = path.with_name("first"), path.with_name("second"), Image.is_replaced
    for other, size in ((first, 999), (second, 998)):
        put(other, b"x" * size)

    def is_replaced(image: Image) -> bool:
        if second.exists():
            os.link(path, first)
            second.replace(path)
        return whole(image)

    assert subject.generation().size == 1000
    monkeypatch.setattr(Image, "is_replaced", is_replaced)
    first.replace(path)
    assert subject.generation().size == 998
    first.replace(path)
    assert subject.generation().size == 999
    assert subject.image.generation().size == 999


def test_where_there_is_no_image_the_last_one_is_told_of(subject: Subject, path: Path) -> None:
    state, generation = subject.state(), subject.generation()
    path.rename(path.with_name("away"))
    os.mkfifo(path)
    assert subject.generation() == generation
    assert subject.state() not in (state, subject.state())
    for look in (subject.look, subject.checked_state, subject.to_repair):
        with pytest.raises(ImageNotFollowed):
            look()


def test_what_takes_the_place_of_the_image_is_told_once_while_it_stays(
    subject: Subject, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    away = path.rename(path.with_name("away"))
    replacements: tuple[tuple[str, Callable[[], object], Callable[[], object]], ...] = (
        ("a symbolic link", lambda: path.symlink_to(away), path.unlink),
        ("a directory", path.mkdir, path.rmdir),
    )
    for kind, make, remove in replacements:
        for _ in range(2):
            make()
            for _ in range(3):
                with pytest.raises(ImageNotFollowed):
                    subject.look()
            (record,) = caplog.records
            assert f"what is there now is {kind}" in record.getMessage()
            caplog.clear()
            remove()
            away.rename(path)
            subject.look()
            path.rename(away)
    assert not caplog.records


def test_a_writer_makes_another_moment_of_the_same_bytes(subject: Subject, path: Path) -> None:
    state, moment, checked = subject.state(), subject.moment(), subject.checked_state()
    with path.open("rb") as stranger, held(stranger.fileno(), "", WRITER):
        assert subject.state() == state
        assert subject.moment() != moment
        assert subject.checked_state() != checked
    assert (subject.moment(), subject.checked_state()) == (moment, checked)


async def test_the_size_of_the_disk_is_not_waited_for_in_the_event_loop(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here no byte of the image is in memory."""
    path.write_bytes(sample(size=64 << 20, cluster_bits=12).build().data)
    subject, whole = Subject(Image.open(str(path))), os.preadv
    monkeypatch.setattr(Image, "is_in_memory", False)

    def preadv(fd: int, views: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        assert threading.current_thread() is not threading.main_thread()
        return whole(fd, views, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    assert subject.disk_size() == 0
    await subject.learn_disk_size()
    assert subject.disk_size() == 64 << 20
    other = path.with_name("other")
    other.write_bytes(sample(size=32 << 20, cluster_bits=12).build().data)
    other.replace(path)
    assert subject.disk_size() == 64 << 20
    await subject.learn_disk_size()
    assert subject.disk_size() == 32 << 20


def test_of_an_image_that_does_not_answer_the_event_loop_waits_for_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is asked; what was known before is told where that will do."""
    monkeypatch.setattr(asking, "PATIENCE", 0.05)
    monkeypatch.setattr(Image, "answers_at_once", False)
    subject, event = Subject(Image.open(str(path))), threading.Event()
    generation, state = subject.generation(), subject.state()
    whole, main = os.fstat, threading.main_thread()

    def fstat(fd: int) -> os.stat_result:
        if threading.current_thread() is main:
            assert fd != subject.image.fileno()
        else:
            event.wait(10)
        return whole(fd)

    monkeypatch.setattr(os, "fstat", fstat)
    try:
        questions = (subject.look, subject.checked_state, subject.to_repair, subject.source)
        for ask in (*questions, subject.gone, subject.is_written, subject.pending):
            with pytest.raises(ImageSilent):
                ask()
        assert subject.generation() == generation
        assert subject.disk_size() == 0
        assert subject.state() not in (state, subject.state())
        assert subject.moment() != subject.moment()
    finally:
        event.set()
