"""instarfs.image.directory: what is opened in the place of an image, and what is not even touched.

Whether something was opened is the kernel's word (inotify): a look (O_PATH) is no opening.
"""

import ctypes
import errno
import fcntl
import os
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from instarfs.errors import ImageNotFollowed, ImageReplaced
from instarfs.image.directory import (
    NO_FILE,
    OF_IMAGE,
    SUFFIX,
    Hands,
    Opening,
    Origin,
    OwnHands,
    exists,
)
from instarfs.image.file import Image
from instarfs.image.linux import identity_at, is_mounted, look, look_at
from instarfs.repair.run import Repairer
from planner.repair.plan import RepairTier
from tests.instarfs.daemon.test_broker import attended

OWN = Origin(os.geteuid())
NOBODY = 65534
IMAGE, NEIGHBOUR, BEFORE = "image", "neighbour", "before"
FLAGS = {Opening.IMAGE: os.O_RDONLY, Opening.IMAGE_TO_WRITE: os.O_RDWR}

_libc = ctypes.CDLL(None, use_errno=True)
_EVENT = struct.Struct("iIII")
_IN_OPEN = 0x20
_RENAME_EXCHANGE = 2


@contextmanager
def opens(folder: Path) -> Iterator[Callable[[], set[str]]]:
    """What tells the names of the files in *folder* that were opened since it was asked last."""
    fd = _libc.inotify_init1(os.O_NONBLOCK)
    assert _libc.inotify_add_watch(fd, os.fsencode(folder), _IN_OPEN) >= 0

    def seen() -> set[str]:
        names = set()
        try:
            while events := os.read(fd, 1 << 16):
                while events:
                    length = _EVENT.unpack_from(events)[3]
                    name = events[_EVENT.size : _EVENT.size + length]
                    names.add(name.rstrip(b"\0").decode())
                    events = events[_EVENT.size + length :]
        except BlockingIOError:
            pass
        return names

    try:
        yield seen
    finally:
        os.close(fd)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / IMAGE).write_bytes(b"image")
    (folder / NEIGHBOUR).write_bytes(b"neighbour")
    return folder


@pytest.fixture
def directory(folder: Path) -> Iterator[int]:
    fd = os.open(folder, os.O_PATH)
    yield fd
    os.close(fd)


@dataclass(frozen=True, slots=True)
class Replacement:
    """What *make* puts in the place of an image, and what it is called in a message."""

    make: Callable[[Path], object]
    said: str = "a symbolic link"
    needs_root: bool = False


def link_to(target: str) -> Replacement:
    return Replacement(lambda path: path.symlink_to(target))


def private_file_of_another(path: Path) -> None:
    path.write_bytes(b"theirs")
    path.chmod(0o600)
    os.chown(path, NOBODY, NOBODY)


REPLACEMENTS = {
    "a link to a neighbour": link_to(NEIGHBOUR),
    "a link to what it was": link_to(BEFORE),
    "a link that leads nowhere": link_to("nowhere"),
    "a link to a descriptor": link_to("/proc/self/fd/0"),
    "a link to memory": link_to("/proc/self/mem"),
    "a FIFO": Replacement(os.mkfifo, "a FIFO"),
    "a directory": Replacement(Path.mkdir, "a directory"),
    "a character device": Replacement(
        lambda path: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3)),
        "a character device",
        needs_root=True,
    ),
    "a block device": Replacement(
        lambda path: os.mknod(path, stat.S_IFBLK | 0o666, os.makedev(7, 0)),
        "a block device",
        needs_root=True,
    ),
    "a file of another owner": Replacement(
        private_file_of_another, "a file of another owner", needs_root=True
    ),
}


@pytest.fixture(params=REPLACEMENTS)
def replacement(request: pytest.FixtureRequest) -> Replacement:
    found: Replacement = REPLACEMENTS[request.param]
    if found.needs_root and os.geteuid() != 0:
        pytest.skip("only root can make it")
    return found


def outcome(hands: Hands, what: Opening, directory: int) -> object:
    """The errno; or how it was opened, and what is in it."""
    try:
        fd = hands.open(what, directory, IMAGE)
    except OSError as error:
        return error.errno
    mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    content = os.pread(fd, 16, 0)
    os.close(fd)
    return mode, content


@pytest.mark.parametrize("what", sorted(OF_IMAGE), ids=str)
@pytest.mark.parametrize("is_asked", [False, True], ids=["itself", "broker"])
def test_only_a_file_of_the_owner_is_opened_in_the_place_of_an_image(
    folder: Path, directory: int, replacement: Replacement, what: Opening, is_asked: bool
) -> None:
    with attended(folder) as it, opens(folder) as opened:
        hands: Hands = it.hands if is_asked else OwnHands(OWN)
        assert outcome(hands, what, directory) == (FLAGS[what], b"image")
        assert opened() == {IMAGE}
        (folder / IMAGE).rename(folder / BEFORE)
        replacement.make(folder / IMAGE)
        opened()
        assert outcome(hands, what, directory) == errno.ESTALE
        assert opened() == set()
        (folder / IMAGE).rename(folder / "away")
        (folder / NEIGHBOUR).rename(folder / IMAGE)
        assert outcome(hands, what, directory) == (FLAGS[what], b"neighbour")


@pytest.mark.parametrize("what", [Opening.UNDO, Opening.UNDO_TO_WRITE], ids=str)
def test_a_hard_link_in_the_place_of_an_undo_file_is_the_file(
    folder: Path, directory: int, what: Opening
) -> None:
    (folder / IMAGE).unlink()
    (folder / IMAGE).hardlink_to(folder / NEIGHBOUR)
    assert outcome(OwnHands(OWN), what, directory) == (
        os.O_RDONLY if what is Opening.UNDO else os.O_RDWR,
        (folder / NEIGHBOUR).read_bytes(),
    )


@pytest.mark.parametrize("what", [Opening.UNDO, Opening.UNDO_TO_WRITE], ids=str)
@pytest.mark.parametrize("is_asked", [False, True], ids=["itself", "broker"])
def test_what_can_be_no_undo_file_is_not_opened(
    folder: Path, directory: int, replacement: Replacement, what: Opening, is_asked: bool
) -> None:
    name = IMAGE + SUFFIX
    replacement.make(folder / name)
    is_file = stat.S_ISREG((folder / name).lstat().st_mode)
    with attended(folder) as it, opens(folder) as opened:
        hands: Hands = it.hands if is_asked else OwnHands(OWN)
        if is_file:  # whose it is whoever asked finds out
            os.close(hands.open(what, directory, name))
            assert opened() == {name}
            return
        with pytest.raises(OSError) as caught:  # noqa: PT011 - any text
            hands.open(what, directory, name)
        assert caught.value.errno in (NO_FILE, errno.ELOOP)
        assert opened() == set()


def test_an_image_says_what_has_taken_its_place(folder: Path, replacement: Replacement) -> None:
    with Image.open(str(folder / IMAGE)) as image, opens(folder) as opened:
        assert not image.is_replaced()
        (folder / IMAGE).rename(folder / BEFORE)
        replacement.make(folder / IMAGE)
        opened()
        assert image.is_replaced()
        with pytest.raises(ImageNotFollowed) as caught:
            image.reopen()
        assert f"what is there now is {replacement.said}, and not opened" in str(caught.value)
        assert caught.value.errno == errno.EACCES
        image.signature()
        image.gone()
        assert opened() == set()
        assert os.pread(image.fileno(), 16, 0) == b"image"


def test_nothing_is_opened_for_a_repair_in_the_place_of_an_image(
    folder: Path, replacement: Replacement
) -> None:
    with Image.open(str(folder / IMAGE)) as image, opens(folder) as opened:
        (folder / IMAGE).rename(folder / BEFORE)
        replacement.make(folder / IMAGE)
        opened()
        assert isinstance(Repairer(image).repair(RepairTier.LEAKS).error, ImageReplaced)
        assert opened() == set()


def test_a_neighbour_is_not_opened_however_often_they_change_places(
    folder: Path, directory: int
) -> None:
    """Between the look and the opening there is nothing to be won."""
    (folder / "link").symlink_to(NEIGHBOUR)
    names = [os.fsencode(folder / name) for name in (IMAGE, "link")]
    is_over = threading.Event()

    def change_places() -> None:
        while not is_over.is_set():
            _libc.renameat2(-100, names[0], -100, names[1], _RENAME_EXCHANGE)

    thread = threading.Thread(target=change_places)
    with opens(folder) as opened:
        thread.start()
        try:
            found = {outcome(OwnHands(OWN), Opening.IMAGE_TO_WRITE, directory) for _ in range(3000)}
        finally:
            is_over.set()
            thread.join()
        assert NEIGHBOUR not in opened()
    assert found <= {(os.O_RDWR, b"image"), errno.ESTALE}


def test_the_device_that_was_named_and_no_other() -> None:
    def status(kind: int, device: int = 0, owner: int = 1) -> os.stat_result:
        return os.stat_result((kind | 0o600, 1, 2, 1, owner, 0, 0, 0, 0, 0), {"st_rdev": device})

    origin = Origin.of(status(stat.S_IFBLK, 5))
    assert origin.admits(status(stat.S_IFBLK, 5))
    assert origin.admits(status(stat.S_IFBLK, 5, owner=2))
    assert not origin.admits(status(stat.S_IFBLK, 6))
    assert not origin.admits(status(stat.S_IFCHR, 5))
    assert not origin.admits(status(stat.S_IFREG, 5))


# ---- links of the user ----


def test_a_link_is_followed_once(folder: Path, tmp_path: Path) -> None:
    """What replaces the file that it led to replaces the image; where it leads later is nothing."""
    link = tmp_path / "link"
    link.symlink_to(f"folder/{IMAGE}")
    with Image.open(str(link)) as image:
        assert image.path == str(link)
        link.unlink()
        assert (image.is_replaced(), image.gone()) == (False, None)
        link.symlink_to(f"folder/{NEIGHBOUR}")
        assert not image.is_replaced()
        (folder / IMAGE).unlink()
        assert not image.is_replaced()
        assert image.gone() is not None
        (folder / NEIGHBOUR).rename(folder / IMAGE)
        assert image.is_replaced()
        with image.reopen() as again:
            assert os.pread(again.fileno(), 16, 0) == b"neighbour"


def test_a_descriptor_has_no_name_that_could_be_replaced(folder: Path) -> None:
    with (folder / IMAGE).open("rb") as held:
        (folder / IMAGE).unlink()
        with Image.open(f"/proc/self/fd/{held.fileno()}") as image:
            (folder / f"{IMAGE} (deleted)").write_bytes(b"other")
            assert (image.is_replaced(), image.gone()) == (False, None)
            fd = image.open_to_write()
            try:
                assert os.path.sameopenfile(fd, held.fileno())
                os.pwrite(fd, b"I", 0)
            finally:
                os.close(fd)
            assert os.pread(image.fileno(), 16, 0) == b"Image"


# ---- what is mounted on a name ----


@pytest.mark.parametrize("name", ["proc", "dev"])
def test_what_is_mounted_on_a_name_is_not_entered(name: str) -> None:
    if not Path("/", name).is_mount():
        pytest.skip("not mounted here")
    root = os.open("/", os.O_PATH)
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EXDEV)):
            look_at(root, name)
        with pytest.raises(OSError, match=os.strerror(errno.EXDEV)):
            identity_at(root, name)
        os.close(look(root, name, across=True))
        assert identity_at(root, name, across=True) == identity(look_at(root, name, across=True))
        assert exists(root, name)
    finally:
        os.close(root)


# ---- what stands under a name, at one look ----


def identity(status: os.stat_result) -> tuple[int, ...]:
    times = status.st_mtime_ns, status.st_ctime_ns
    return status.st_dev, status.st_ino, status.st_size, *times


def test_one_look_tells_what_two_would(folder: Path, directory: int) -> None:
    os.utime(folder / IMAGE, ns=(1, -1_500_000_000))
    (folder / "link").symlink_to(IMAGE)
    for name in (IMAGE, "link"):
        assert identity_at(directory, name) == identity(look_at(directory, name)), name
    assert identity_at(directory, "link") != identity_at(directory, IMAGE)
    with pytest.raises(FileNotFoundError):
        identity_at(directory, "nothing")


# ---- what is not there ----


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM])
def test_a_kernel_that_does_not_tell_what_is_mounted(
    folder: Path, directory: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        ctypes.set_errno(code)
        return -1

    monkeypatch.setattr("instarfs.image.linux._statx", refuse)
    assert is_mounted(directory) is None
    assert identity_at(directory, IMAGE) is None
    assert outcome(OwnHands(OWN), Opening.IMAGE, directory) == (os.O_RDONLY, b"image")
    (folder / IMAGE).unlink()
    (folder / IMAGE).symlink_to(NEIGHBOUR)
    assert outcome(OwnHands(OWN), Opening.IMAGE, directory) == errno.ESTALE


@pytest.mark.parametrize(
    ("comes", "expected"),
    [(None, (os.O_RDWR, b"image")), (NEIGHBOUR, errno.ESTALE), ("link", errno.ELOOP)],
)
def test_without_proc_what_comes_between_is_not_used(
    folder: Path,
    directory: int,
    comes: str | None,
    expected: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (folder / "link").symlink_to(NEIGHBOUR)
    whole = os.open

    def without_proc(path: str, *args: int, **kwargs: int) -> int:
        if path.startswith("/proc/"):
            if comes is not None:
                (folder / comes).rename(folder / IMAGE)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return whole(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", without_proc)
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert outcome(OwnHands(OWN), Opening.IMAGE_TO_WRITE, directory) == expected
    assert len(list(Path("/proc/self/fd").iterdir())) == before
