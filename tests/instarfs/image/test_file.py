"""instarfs.image.file: what may be opened, reading, extents, generations, replacement."""

import errno
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from instarfs import errors
from instarfs.image import file as image
from instarfs.image.file import Generation, Image


def read(opened: Image, offset: int, length: int) -> bytes:
    buffer = bytearray(b"\xaa" * length)
    opened.source().read_into(offset, memoryview(buffer))
    return bytes(buffer)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(range(256)) * 4)
    return path


def test_reads_what_is_there(path: Path) -> None:
    with Image.open(str(path)) as opened:
        assert opened.source().size == 1024
        assert read(opened, 254, 4) == b"\xfe\xff\x00\x01"


@pytest.mark.parametrize("offset", [1022, 1024, 1 << 40, (1 << 63) - 1, 1 << 63, 1 << 70])
def test_past_the_end_are_zeros(path: Path, offset: int) -> None:
    with Image.open(str(path)) as opened:
        there = b"\xfe\xff" if offset == 1022 else b""
        assert read(opened, offset, 8) == there.ljust(8, b"\0")


def test_fills_views_of_wider_items(path: Path) -> None:
    with Image.open(str(path)) as opened:
        words = memoryview(bytearray(16)).cast("Q")
        opened.source().read_into(0, words)
        assert bytes(words) == bytes(range(16))


def test_short_reads_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, *at: whole(fd, [views[0][:3]], *at))
    with Image.open(str(path)) as opened:
        assert read(opened, 10, 20) == bytes(range(10, 30))


def test_a_file_cut_off_while_it_is_read_ends_in_zeros(path: Path) -> None:
    with Image.open(str(path)) as opened:
        source = opened.source()
        os.truncate(path, 2)
        buffer = bytearray(4)
        source.read_into(0, memoryview(buffer))
        assert buffer == b"\0\1\0\0"


def test_a_read_error_says_where(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, views: list[memoryview], offset: int, flags: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with Image.open(str(path)) as opened, pytest.raises(errors.ImageReadFailed) as caught:
        read(opened, 512, 8)
    assert "offset 512 failed: Input/output error" in str(caught.value)
    assert caught.value.errno == errno.EIO


def test_extents_leave_holes_out(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.seek(1 << 20)
        file.write(b"x" * 4096)
        file.truncate(1 << 24)
    with Image.open(str(path)) as opened:
        source = opened.source()
        extents = list(source.data_extents(0, 1 << 62))
        data = [extent for extent in extents if extent[0] <= 1 << 20 < extent[1]]
        assert len(data) == 1
        assert sum(end - start for start, end in extents) < 1 << 20
        assert list(source.data_extents((1 << 20) + 10, 5)) == [((1 << 20) + 10, (1 << 20) + 15)]
        assert list(source.data_extents(1 << 22, 1 << 10)) == []
        assert list(source.data_extents(1 << 24, 1 << 10)) == []


def test_extents_of_a_file_system_without_holes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, offset: int, whence: int) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    with Image.open(str(path)) as opened:
        source = opened.source()
        monkeypatch.setattr(os, "lseek", refuse)
        assert list(source.data_extents(100, 5000)) == [(100, 1024)]


def test_an_error_while_looking_for_holes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, offset: int, whence: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Image.open(str(path)) as opened:
        source = opened.source()
        monkeypatch.setattr(os, "lseek", fail)
        with pytest.raises(errors.ImageReadFailed, match="offset 100"):
            list(source.data_extents(100, 50))


# ---- what may be opened ----


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (Path.mkdir, errors.ImageIsDirectory),
        (make_fifo, errors.ImageIsNoFile),
        (make_socket, errors.ImageIsNoFile),
        (lambda path: path.symlink_to("/dev/null"), errors.ImageIsNoFile),
        (lambda path: path.symlink_to("nowhere"), errors.ImageMissing),
        (lambda path: path.symlink_to(path.name), errors.ImageOpenFailed),
        (lambda path: None, errors.ImageMissing),
    ],
    ids=["directory", "fifo", "socket", "device", "dangling", "loop", "nothing"],
)
def test_refuses_what_is_no_image(
    tmp_path: Path, make: Callable[[Path], None], kind: type[errors.InstarfsError]
) -> None:
    path = tmp_path / "it"
    make(path)
    with pytest.raises(kind) as caught:
        Image.open(str(path))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert caught.value.exit_code == 1


def test_no_permission(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may read everything, so the kernel's answer is made here.
    def refuse(*args: object, **kwargs: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(errors.ImageForbidden, match="no permission to read it") as caught:
        Image.open(str(path))
    assert caught.value.errno == errno.EACCES


def test_a_block_device_is_as_large_as_its_end_and_counted_by_the_kernel(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A loop device needs root and a kernel module: here fstat says "block device" of a file.
    statistics = tmp_path / "7:3"
    statistics.mkdir()
    (statistics / "stat").write_text("  1 2 3 4 5 6 4711 8 9 10\n")
    assert image.block_statistics(os.makedev(7, 3)) == Path("/sys/dev/block/7:3/stat")
    monkeypatch.setattr(image, "block_statistics", lambda device: statistics / "stat")

    def as_device(status: os.stat_result) -> os.stat_result:
        values = list(status[:10])
        values[stat.ST_MODE] = stat.S_IFBLK | 0o660
        values[stat.ST_SIZE] = 0
        return os.stat_result(values, {"st_rdev": os.makedev(7, 3)})

    fstat = os.fstat
    monkeypatch.setattr(os, "fstat", lambda fd: as_device(fstat(fd)))
    with Image.open(str(path)) as opened:
        before = opened.generation()
        assert before.size == opened.source().size == 1024
        assert before.written == 4711
        (statistics / "stat").write_text("  1 2 3 4 5 6 4712 8 9 10\n")
        assert opened.generation() != before


# ---- generations ----


def test_writing_makes_another_generation(path: Path) -> None:
    with Image.open(str(path)) as opened:
        os.utime(path, ns=(0, 0))
        before = opened.generation()
        assert opened.generation() == before
        with path.open("r+b") as file:
            file.write(b"other")
        assert opened.generation() != before
        assert not opened.is_replaced()


S, MS = 10**9, 10**6


def generation(mtime_ns: int, ctime_ns: int | None = None) -> Generation:
    return Generation(1, 2, 3, mtime_ns, mtime_ns if ctime_ns is None else ctime_ns)


@pytest.mark.parametrize(
    ("known", "settled_at"),
    [
        (generation(1000 * S + 1), 1000 * S + 20 * MS + 1),
        # Its time was set, and the other shows what its clock can tell apart.
        (generation(999 * S, 1000 * S + 1), 999 * S + 20 * MS),
        # Whole seconds, or every other one, and a tick.
        (generation(1000 * S), 1002 * S + 20 * MS),
        (generation(0, 1000 * S), 1002 * S + 20 * MS),
        (generation(1000 * S, 0), 1002 * S + 20 * MS),
    ],
)
def test_a_generation_is_young_for_as_long_as_its_clock_takes(
    known: Generation, settled_at: int
) -> None:
    assert known.is_settled(settled_at)
    assert known.is_settled(settled_at + 1000 * S)
    # Also while its time is still to come.
    for now in (settled_at - 1, settled_at - 20 * MS, settled_at - 3 * S, 0):
        assert not known.is_settled(now), now


@pytest.mark.parametrize("step_ns", [10 * MS, S, 2 * S])
def test_whoever_writes_later_gives_a_settled_one_another_time(step_ns: int) -> None:
    def time(now: int) -> int:
        return now // step_ns * step_ns

    for written in range(0, 2 * S, 3 * MS):
        known = generation(time(1000 * S + written))
        for looked_at in range(written, written + 3 * S, 7 * MS):
            if known.is_settled(1000 * S + looked_at):
                assert generation(time(1000 * S + looked_at)) != known
                break
        else:
            pytest.fail("it was never settled")


def test_what_is_settled_is_one_state_and_what_is_not_is_always_another(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = path.stat()
    with Image.open(str(path)) as opened:
        for ahead, is_one in ((-S, False), (0, False), (S, True)):
            monkeypatch.setattr("time.time_ns", lambda at=status.st_mtime_ns + ahead: at)
            assert (opened.generation().state() == opened.generation().state()) is is_one


def test_a_replaced_image_is_noticed_and_reopened(path: Path) -> None:
    with Image.open(str(path)) as opened:
        other = path.with_name("other")
        other.write_bytes(b"new")
        other.rename(path)
        assert opened.is_replaced()
        assert read(opened, 0, 4) == b"\0\1\2\3"
        with opened.reopen() as again:
            assert again.path == opened.path
            assert read(again, 0, 3) == b"new"
            assert not again.is_replaced()


def test_a_signature_is_that_of_the_generation_at_a_single_look(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked for with every answer of a mount."""
    looked: list[str] = []

    def look_at(directory: int, name: str, *, across: bool) -> os.stat_result:
        looked.append(name)
        return os.stat(name, dir_fd=directory)

    monkeypatch.setattr(image, "look_at", look_at)
    for at_once in (True, False):
        with Image.open(str(path)) as it:
            looked.clear()
            vars(it)["answers_at_once"] = at_once
            assert it.signature() == it.generation().signature()
            # A server has to be asked, which a look that asks nobody would not do.
            assert bool(looked) == (not at_once)


def test_a_deleted_image_stays_what_it_is(path: Path) -> None:
    with Image.open(str(path)) as opened:
        path.unlink()
        assert not opened.is_replaced()
        assert read(opened, 0, 2) == b"\0\1"


def test_a_relative_path_still_leads_there_from_elsewhere(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    with Image.open("image") as opened:
        monkeypatch.chdir("/")
        assert opened.path == str(path)
        assert not opened.is_replaced()
        path.rename(path.with_name("old"))
        path.write_bytes(b"new")
        assert opened.is_replaced()
        opened.reopen().close()


def test_the_descriptor_lives_as_long_as_somebody_reads(path: Path) -> None:
    opened = Image.open(str(path))
    fd, source = opened.fileno(), opened.source()
    del opened
    source.read_into(0, memoryview(bytearray(4)))
    del source
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_opening_takes_no_write_access(path: Path) -> None:
    with Image.open(str(path)) as opened, pytest.raises(OSError, match="Bad file descriptor"):
        os.write(opened.fileno(), b"x")
