"""Reads while the image changes, and who waits for a disk: the event loop never does."""

import errno
import gc
import os
import threading
from collections.abc import Callable, Hashable
from pathlib import Path

import pytest
import trio

from instarfs.errors import GuestDamaged, ImageMissing
from instarfs.guest.follow import Follow
from instarfs.guest.place import Part, Place
from instarfs.guest.reader import GuestReader
from instarfs.image.file import Image, mount_id
from planner.errors import ImageError
from planner.guest.mapping import FLAW_SENTENCES, Flaw
from tests.images.builder import ImageBuilder

CLUSTER = 1 << 16
DISK = Place(Part.DISK)


def image_of(path: Path, content: bytes) -> Path:
    builder = ImageBuilder(size=1 << 20)
    builder.write(0, content)
    path.write_bytes(builder.build().data)
    return path


def overlay_of(folder: Path) -> Path:
    """An image that reads from its backing file, which is raw."""
    (folder / "beneath").write_bytes(b"first".ljust(1 << 20, b"\0"))
    settle(folder / "beneath")
    builder = ImageBuilder(size=1 << 20, backing_file=b"beneath", backing_format=b"raw")
    (folder / "overlay").write_bytes(builder.build().data)
    return folder / "overlay"


def settle(path: Path) -> None:
    """Let its last write be long ago."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - 10**9))


def reader_of(image: Path, follow: Follow | None = None) -> GuestReader:
    opened = Image.open(str(image))

    def look() -> tuple[Image, Hashable]:
        return opened, opened.generation()

    return GuestReader(look, follow or Follow())


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return image_of(tmp_path / "image", b"first")


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The threads that read from files, one an element a read."""
    whole, seen = os.preadv, []

    def preadv(fd: int, views: list[memoryview], offset: int, flags: int = 0) -> int:
        seen.append(threading.get_ident())
        return whole(fd, views, offset, flags)

    monkeypatch.setattr(os, "preadv", preadv)
    return seen


async def test_what_is_in_memory_needs_no_thread(image: Path, threads: list[int]) -> None:
    reader = reader_of(image)
    assert reader.ready(DISK, 0, 5) is None
    assert await reader.read(DISK, 0, 5) == b"first"
    threads.clear()
    assert reader.ready(DISK, 0, 5) == b"first"
    assert reader.ready(DISK, 2, 3) == b"rst"
    assert set(threads) == {threading.get_ident()}


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EOPNOTSUPP])
async def test_what_is_not_is_read_in_a_thread(
    code: int, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "is_in_memory", False)
    whole: Callable[..., int] = os.preadv

    def preadv(fd: int, views: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags:
            raise OSError(code, os.strerror(code))
        assert threading.current_thread() is not threading.main_thread()
        return whole(fd, views, offset)

    reader = reader_of(image)
    monkeypatch.setattr(os, "preadv", preadv)
    for _ in range(3):
        assert await reader.read(DISK, 0, 5) == b"first"
        assert reader.ready(DISK, 0, 5) is None


async def test_what_has_to_be_waited_for_is_tried_once(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the event loop, where it would hold up everybody else."""
    monkeypatch.setattr(Image, "is_in_memory", False)
    whole: Callable[..., int] = os.preadv
    tried: list[int] = []

    def preadv(fd: int, views: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags:
            tried.append(offset)
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return whole(fd, views, offset)

    reader = reader_of(image)
    assert await reader.read(DISK, 0, 5) == b"first"
    monkeypatch.setattr("instarfs.guest.reader.FRESH_SECONDS", 60)
    monkeypatch.setattr(os, "preadv", preadv)
    assert reader.ready(DISK, 0, 5) is None
    assert len(tried) == 1
    assert await reader.read(DISK, 0, 5) == b"first"
    assert len(tried) == 1


async def test_each_read_shows_the_image_as_it_is(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("instarfs.guest.reader.FRESH_SECONDS", 0)
    reader = reader_of(image)
    for content in (b"first", b"other", b"third"):
        image_of(image, content)
        assert await reader.read(DISK, 0, 5) == content
        state = reader.state()
        assert await reader.read(DISK, 0, 5) == content
        assert reader.state() == state


async def test_an_image_that_makes_no_sense_any_more(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("instarfs.guest.reader.FRESH_SECONDS", 0)
    reader = reader_of(image)
    assert await reader.read(DISK, 0, 5) == b"first"
    image.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(ImageError):
            await reader.read(DISK, 0, 5)
    image_of(image, b"again")
    assert await reader.read(DISK, 0, 5) == b"again"


async def test_an_error_is_one_of_the_part_that_was_asked_for(tmp_path: Path) -> None:
    builder = ImageBuilder(size=1 << 20)
    builder.write(0, b"good".ljust(2 * CLUSTER))
    made = builder.build()
    made.set_bits(made.l2_at(1), 512)
    (tmp_path / "image").write_bytes(made.data)
    reader = reader_of(tmp_path / "image")
    for _ in range(2):
        assert await reader.read(DISK, 0, 4) == b"good"
        with pytest.raises(GuestDamaged, match=FLAW_SENTENCES[Flaw.CLUSTER_MISALIGNED]) as caught:
            await reader.read(DISK, CLUSTER - 1, 2)
        assert (caught.value.offset, caught.value.errno) == (CLUSTER, errno.EIO)
    assert len(await reader.read(DISK, (1 << 20) - 10, 4096)) == 10
    assert len(await reader.read(DISK, 1 << 20, 4096)) == 0


def test_a_state_that_cannot_be_known_equals_no_other() -> None:
    def look() -> tuple[Image, Hashable]:
        raise ImageMissing("image")

    reader = GuestReader(look, Follow())
    assert reader.state() != reader.state()


def test_a_file_system_in_memory_is_known_by_its_type(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with image.open() as file:
        number = mount_id(file.fileno())
    table = tmp_path / "mountinfo"
    monkeypatch.setattr("instarfs.image.file.MOUNT_TABLE", table)
    for kind, expected in (("tmpfs", True), ("ext4", False)):
        other = "99999 0 0:1 / /x rw - ramfs x rw"
        table.write_text(f"{other}\n{number} 0 0:2 / / rw - {kind} x rw\n")
        assert Image.open(str(image)).is_in_memory is expected
        assert Image.open(str(image)).answers_at_once
    for kind in ("nfs4", "cifs", "fuse.sshfs", "9p", "overlay"):
        table.write_text(f"{number} 0 0:2 / / rw - {kind} x rw\n")
        assert not Image.open(str(image)).answers_at_once
    table.unlink()
    assert Image.open(str(image)).is_in_memory is False
    assert not Image.open(str(image)).answers_at_once


# ---- files that are followed ----


class Asked:
    """Which threads ask for anything of a file, whoever serves it."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.threads: list[threading.Thread] = []
        self.may_answer = threading.Event()
        self.may_answer.set()
        inode = path.stat().st_ino
        whole = os.fstat

        def fstat(fd: int) -> os.stat_result:
            status = whole(fd)
            if status.st_ino == inode:
                self.threads.append(threading.current_thread())
                self.may_answer.wait()
            return status

        monkeypatch.setattr(os, "fstat", fstat)


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    return overlay_of(tmp_path)


async def test_nothing_is_asked_of_what_is_followed_in_the_event_loop(
    overlay: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("instarfs.guest.reader.FRESH_SECONDS", 0)
    beneath = overlay.with_name("beneath")
    reader = reader_of(overlay, Follow([str(overlay.parent)]))
    asked = Asked(beneath, monkeypatch)
    for content in (b"first", b"other", b"third"):
        beneath.write_bytes(content.ljust(1 << 20, b"\0"))
        settle(beneath)
        assert await reader.read(DISK, 0, 5) == content
        assert reader.ready(DISK, 0, 5) is None
        state = reader.state()
        await reader.refresh()
        assert reader.state() == state
        assert await reader.read(DISK, 0, 5) == content
    assert asked.threads
    assert threading.main_thread() not in asked.threads


async def test_who_waits_for_what_is_followed_holds_nobody_up_and_can_leave(
    overlay: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("instarfs.guest.reader.FRESH_SECONDS", 0)
    reader = reader_of(overlay, Follow([str(overlay.parent)]))
    asked = Asked(overlay.with_name("beneath"), monkeypatch)
    try:
        for is_opened in (False, True):
            asked.may_answer.clear()
            for _ in range(20):  # more than there are threads
                with trio.move_on_after(0.01) as scope:
                    await reader.read(DISK, 0, 5)
                assert scope.cancelled_caught
                reader.state()
            asked.may_answer.set()
            if not is_opened:
                assert await reader.read(DISK, 0, 5) == b"first"
        assert await reader.read(DISK, 0, 5) == b"first"
    finally:
        asked.may_answer.set()


async def test_what_is_followed_is_not_closed_in_the_event_loop(
    overlay: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system may answer a close as late as a read."""
    reader = reader_of(overlay, Follow([str(overlay.parent)], serving=True))
    assert await reader.read(DISK, 0, 5) == b"first"
    beneath = overlay.with_name("beneath").stat().st_ino
    whole, closed, threads = os.close, threading.Event(), []

    def close(fd: int) -> None:
        is_beneath = os.fstat(fd).st_ino == beneath
        if is_beneath:
            threads.append(threading.current_thread())
        whole(fd)
        if is_beneath:
            closed.set()

    monkeypatch.setattr(os, "close", close)
    reader.forget()
    gc.collect()
    assert await trio.to_thread.run_sync(closed.wait, 10)
    assert threading.main_thread() not in threads


async def test_what_was_looked_at_a_moment_ago_is_believed(
    overlay: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("instarfs.guest.reader.FRESH_SECONDS", 60)
    reader = reader_of(overlay, Follow([str(overlay.parent)]))
    assert await reader.read(DISK, 0, 5) == b"first"
    asked = Asked(overlay.with_name("beneath"), monkeypatch)
    assert await reader.read(DISK, 0, 5) == b"first"
    await reader.refresh()
    assert asked.threads == []
