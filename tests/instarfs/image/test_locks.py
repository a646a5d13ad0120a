"""instarfs.image.locks: QEMU's protocol, spoken with the real thing and byte by byte."""

import errno
import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from instarfs.errors import ImageInUse, ImageNotLocked
from instarfs.image import locks
from instarfs.image.locks import FORCE_SHARE, READ_ONLY, READ_WRITE, Access, Permission


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "image.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True)
    return path


@pytest.fixture
def fd(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def other(path: Path) -> Iterator[int]:
    """Another open file description: to locks as strange as another process."""
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def held_bytes(fd: int) -> set[int]:
    """The bytes on which somebody other than *fd* holds a lock."""
    return {byte for byte in range(90, 260) if locks._is_held(fd, byte)}


@pytest.mark.parametrize(
    ("access", "expected"),
    [
        (READ_ONLY, {100, 201, 203}),
        (READ_WRITE, {100, 101, 103, 201, 203}),
        (FORCE_SHARE, {100}),
    ],
)
def test_holds_what_qemu_holds(fd: int, other: int, access: Access, expected: set[int]) -> None:
    with locks.held(fd, "image", access):
        assert held_bytes(other) == expected
    assert held_bytes(other) == set()


def test_bytes_are_let_go_when_the_work_fails(fd: int, other: int) -> None:
    with pytest.raises(ZeroDivisionError), locks.held(fd, "image"):
        raise ZeroDivisionError
    assert held_bytes(other) == set()


def test_readers_do_not_exclude_each_other(fd: int, other: int) -> None:
    with locks.held(fd, "image"), locks.held(other, "image"):
        pass


WRITER = Access((Permission.CONSISTENT_READ, Permission.WRITE), ())
RESIZER = Access((Permission.CONSISTENT_READ, Permission.RESIZE), ())
JEALOUS = Access((), (Permission.CONSISTENT_READ,))


@pytest.mark.parametrize(
    ("access", "message"),
    [
        (WRITER, 'Failed to get shared "write" lock'),
        (RESIZER, 'Failed to get shared "resize" lock'),
        (JEALOUS, 'Failed to get "consistent read" lock'),
    ],
)
def test_a_conflict_names_the_permission_and_holds_nothing(
    fd: int, other: int, access: Access, message: str
) -> None:
    with locks.held(other, "image", access):
        with pytest.raises(ImageInUse) as caught, locks.held(fd, "image"):
            pytest.fail("held in spite of the conflict")
        assert held_bytes(other) == set()
    assert message in str(caught.value)
    assert caught.value.errno == errno.EBUSY


def test_force_share_stands_beside_a_writer(fd: int, other: int) -> None:
    with locks.held(other, "image", WRITER), locks.held(fd, "image", FORCE_SHARE):
        assert locks.is_written(fd, "image")
    assert not locks.is_written(fd, "image")


def test_a_readers_denial_is_no_writer(fd: int, other: int) -> None:
    with locks.held(other, "image", READ_ONLY):
        assert not locks.is_written(fd, "image")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_obstacle(
    fd: int, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(fd: int, command: int, argument: bytes) -> bytes:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with locks.held(fd, "image"):
        assert not locks.is_written(fd, "image")


@pytest.mark.parametrize("command", [fcntl.F_OFD_SETLK, fcntl.F_OFD_GETLK])
def test_a_server_whose_locks_fail_is_named(
    fd: int, other: int, monkeypatch: pytest.MonkeyPatch, command: int
) -> None:
    """As over NFS: nobody knows then who else has the image, and nothing is said of it."""
    real = fcntl.fcntl

    def fail(fd: int, asked: int, argument: bytes) -> bytes:
        if asked == command and locks._FLOCK.unpack(argument)[0] != fcntl.F_UNLCK:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(fd, asked, argument)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "fcntl", fail)
        with pytest.raises(ImageNotLocked, match=r"image: .*Stale"), locks.held(fd, "image"):
            pytest.fail("held in spite of the failure")
        if command == fcntl.F_OFD_GETLK:
            with pytest.raises(ImageNotLocked, match=r"image: .*Stale"):
                locks.is_written(fd, "image")
    assert held_bytes(other) == set()


def test_a_server_that_fails_afterwards_takes_nothing_of_the_work_back(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int, command: int, argument: bytes) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with locks.held(fd, "image"):
        monkeypatch.setattr(fcntl, "fcntl", fail)


def test_a_lock_of_another_kind_is_a_conflict(fd: int, path: Path) -> None:
    stranger = os.open(path, os.O_RDWR)
    try:
        fcntl.fcntl(stranger, fcntl.F_OFD_SETLK, locks._flock(fcntl.F_WRLCK, 201))
        with pytest.raises(ImageInUse, match="byte 201"), locks.held(fd, "image"):
            pytest.fail("held in spite of the conflict")
    finally:
        os.close(stranger)


def test_qemu_keeps_its_hands_off_while_we_read(fd: int, path: Path) -> None:
    with locks.held(fd, "image"):
        write = subprocess.run(
            ["qemu-io", "-c", "write 0 4k", path], capture_output=True, text=True, check=False
        )
        assert 'Failed to get "write" lock' in write.stderr
        subprocess.run(["qemu-img", "check", "-q", path], check=True)
    subprocess.run(["qemu-io", "-c", "write 0 4k", path], check=True, capture_output=True)


def test_we_keep_our_hands_off_what_qemu_writes(fd: int, path: Path) -> None:
    with subprocess.Popen(
        ["qemu-io", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        # An answer to the first command means that the image is open.
        writer.stdin.write("length\n")
        writer.stdin.flush()
        assert "1 MiB" in writer.stdout.readline()
        assert locks.is_written(fd, "image")
        with (
            pytest.raises(ImageInUse, match='Failed to get shared "write" lock'),
            locks.held(fd, "image"),
        ):
            pytest.fail("held in spite of the conflict")
        writer.communicate("quit\n")
    assert not locks.is_written(fd, "image")
