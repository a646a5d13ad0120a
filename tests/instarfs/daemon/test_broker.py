"""instarfs.daemon.broker: what it does for a daemon, and what it does not.

Here it attends in a thread, so that it can be watched; as a process of its own it is in
tests/mount/test_confinement.py.
"""

import errno
import fcntl
import gc
import logging
import os
import random
import select
import socket
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from instarfs.daemon import broker
from instarfs.daemon.broker import ANSWER, CHANNELS, REQUEST, Attendant, Broker, pair
from instarfs.errors import ImageOpenFailed
from instarfs.image.directory import (
    OF_IMAGE,
    OF_READERS,
    SUFFIX,
    Change,
    Hands,
    HandsGone,
    Opening,
    Origin,
    OwnHands,
    Spot,
)
from instarfs.image.file import Image
from instarfs.repair.interrupted import pending
from instarfs.repair.undo_place import UndoPlace

Request = Opening | Change
REQUESTS: tuple[Request, ...] = (*Opening, *Change)

IMAGE = "image"
OWN = Origin(os.geteuid())
NAMES = {IMAGE: b"image", IMAGE + SUFFIX: b"undo"}


@dataclass(frozen=True, slots=True)
class Attended:
    """``channel``: the daemon's end; ``hands``: the broker behind it."""

    channel: socket.socket
    hands: Broker

    def send(self, request: bytes, *fds: int) -> int:
        """The errno that *request* is answered with; no descriptor may come with one."""
        socket.send_fds(self.channel, [request], fds)
        answer, received, *_ = socket.recv_fds(self.channel, ANSWER.size, 1)
        code: int = ANSWER.unpack(answer)[0]
        assert not (code and received)
        return code


@contextmanager
def attended(
    folder: Path, name: str = IMAGE, undo: Spot | None = None, *, read_only: bool = False
) -> Iterator[Attended]:
    ours, its = pair()
    directory = os.open(folder, os.O_PATH)
    attendant = Attendant(Spot(directory, name), OWN, undo, read_only=read_only)
    thread = threading.Thread(target=attendant.attend, args=[its])
    thread.start()
    try:
        with ours, its:
            yield Attended(ours, Broker([ours]))
            ours.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            assert not thread.is_alive()
    finally:
        os.close(directory)


def fill(folder: Path, names: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in names.items():
        (folder / name).write_bytes(content)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def outcome(hands: Hands, what: Request, folder: Path, name: str = IMAGE) -> object:
    """Of the image *name*, or its undo file: the errno; or what was opened, and how; or None."""
    name += "" if what in OF_IMAGE else SUFFIX
    directory = os.open(folder, os.O_PATH)
    try:
        if isinstance(what, Change):
            hands.change(what, directory, name)
            return None
        fd = hands.open(what, directory, name)
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        opened = Path(f"/proc/self/fd/{fd}").readlink().name
        os.close(fd)
    except OSError as error:
        return error.errno
    else:
        return mode, opened
    finally:
        os.close(directory)


# ---- what it does ----


@pytest.mark.parametrize("what", REQUESTS, ids=str)
@pytest.mark.parametrize("names", [NAMES, {}], ids=["all there", "nothing there"])
def test_all_that_a_process_does_itself_it_can_have_done(
    tmp_path: Path, names: dict[str, bytes], what: Request
) -> None:
    here, there = fill(tmp_path / "here", names), fill(tmp_path / "there", names)
    with attended(there) as it:
        assert outcome(it.hands, what, there) == outcome(OwnHands(OWN), what, here)
    assert content(there) == content(here)


def test_names_behind_links(tmp_path: Path) -> None:
    folder = fill(tmp_path / "folder", NAMES)
    (tmp_path / "link").symlink_to("folder/image")
    with Image.open(str(tmp_path / "link")) as image, attended(folder) as it:
        image.hands = it.hands
        with UndoPlace.beside(image) as place:
            place.remove()
            fd = place.make()
            os.write(fd, b"another")
            os.close(fd)
            place.sync()
        with image.reopen() as again:
            assert os.pread(again.fileno(), 5, 0) == b"image"
    assert content(folder) == {IMAGE: b"image", IMAGE + SUFFIX: b"another"}


def test_an_undo_file_elsewhere(tmp_path: Path) -> None:
    """Where it was said to be when the mount was made, and nowhere else."""
    folder, elsewhere = fill(tmp_path / "folder", NAMES), fill(tmp_path / "elsewhere", {})
    with Image.open(str(folder / IMAGE), str(elsewhere / "chosen")) as image:
        assert image.undo
        with attended(folder, undo=image.undo) as it:
            image.hands = it.hands
            place = UndoPlace.of(image)
            assert place
            with place:
                os.close(place.make())
            assert content(elsewhere) == {"chosen": b""}
            for what in (Opening.UNDO, Change.REMOVE_UNDO):
                assert outcome(it.hands, what, folder) == errno.ESTALE
                assert outcome(it.hands, what, elsewhere) == errno.ESTALE
    assert content(folder) == NAMES
    assert content(elsewhere) == {"chosen": b""}


def test_no_descriptor_is_left_behind(tmp_path: Path) -> None:
    folder = fill(tmp_path / "folder", NAMES)
    with attended(folder) as it:
        gc.collect()  # what earlier tests left may go at any moment, and takes descriptors along
        before = len(list(Path("/proc/self/fd").iterdir()))
        for what in REQUESTS * 2:
            outcome(it.hands, what, folder)
        assert len(list(Path("/proc/self/fd").iterdir())) <= before


# ---- what it does not ----

VALID = REQUEST.pack(Opening.IMAGE, 0, 0, 0)
GARBAGE = [
    b"?",
    VALID[:-1],
    VALID + b"/etc/passwd",
    bytes(REQUEST.size),
    REQUEST.pack(max(Opening) + 1, 0, 0, 0),
    REQUEST.pack(max(Change) + 1, 0, 0, 0),
    b"\xff" * REQUEST.size,
    b"\xff" * 100_000,
]


@pytest.mark.parametrize("request_", GARBAGE, ids=lambda it: f"{len(it)} bytes, {it[:1].hex()}")
def test_garbage_is_refused_and_the_broker_goes_on(tmp_path: Path, request_: bytes) -> None:
    folder = fill(tmp_path / "folder", NAMES)
    with attended(folder) as it:
        assert it.send(request_) == errno.EINVAL
        assert outcome(it.hands, Opening.IMAGE, folder) == (os.O_RDONLY, IMAGE)
    assert content(folder) == NAMES


def test_of_any_requests_nothing_is_had_but_the_image_and_its_undo_file(tmp_path: Path) -> None:
    """Six thousand, whole, cut and too long, for the right place and for others."""
    folder, chance = fill(tmp_path / "folder", NAMES | {"neighbour": b"theirs"}), random.Random(1)
    place = (zlib.crc32(IMAGE.encode()), folder.stat().st_dev, folder.stat().st_ino)
    answers, had = set(), set()
    with attended(folder) as it:
        for _ in range(6000):
            where = [
                number if chance.random() < 0.8 else chance.getrandbits(32) for number in place
            ]
            what = chance.choice([*REQUESTS, chance.randrange(256)])
            request = REQUEST.pack(what, *where)
            if chance.random() < 0.2:
                request = request[: chance.randrange(1, len(request) + 1)] + chance.randbytes(2)
            it.channel.send(request)
            answer, fds, *_ = socket.recv_fds(it.channel, 64, 8)
            answers.add(ANSWER.unpack(answer)[0])
            for fd in fds:
                had.add(Path(f"/proc/self/fd/{fd}").readlink().name)
                os.close(fd)
    assert had == {IMAGE}  # of an undo file the place is another
    assert answers == {0, errno.EINVAL, errno.ESTALE}
    assert content(folder) == NAMES | {"neighbour": b"theirs"}


def test_descriptors_that_come_along_are_not_taken(tmp_path: Path) -> None:
    folder = fill(tmp_path / "folder", NAMES)
    with attended(folder) as it, (folder / IMAGE).open() as file:
        before = len(list(Path("/proc/self/fd").iterdir()))
        assert it.send(b"?", file.fileno()) == errno.EINVAL
        assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("what", [it for it in REQUESTS if it not in OF_READERS], ids=str)
def test_of_a_mount_that_only_reads_nothing_can_be_had_to_write(
    tmp_path: Path, what: Request
) -> None:
    folder = fill(tmp_path / "folder", NAMES)
    with attended(folder, read_only=True) as it:
        assert outcome(it.hands, what, folder) == errno.EROFS
        assert outcome(it.hands, Opening.UNDO, folder) == (os.O_RDONLY, IMAGE + SUFFIX)
    assert content(folder) == NAMES


@pytest.mark.parametrize("what", REQUESTS, ids=str)
def test_no_other_place_can_be_asked_for(tmp_path: Path, what: Request) -> None:
    folder = fill(tmp_path / "folder", {f"{n}.{name}": b"" for n in (1, 2) for name in NAMES})
    before = content(folder)
    with attended(folder, f"2.{IMAGE}") as it:
        assert outcome(it.hands, what, folder, f"1.{IMAGE}") == errno.ESTALE
    assert content(folder) == before


# ---- when an answer cannot be sent ----


def test_who_asks_and_never_reads_has_a_few_descriptors_on_their_way() -> None:
    """As many as a process may have open, and nobody else of its user could send one."""
    ours, its = pair()
    its.setblocking(False)
    with ours, its:
        waiting = 0
        with suppress(BlockingIOError):
            while waiting < 100:
                socket.send_fds(its, [ANSWER.pack(0)], [ours.fileno()])
                waiting += 1
        assert 0 < waiting * CHANNELS < 64
        assert socket.recv_fds(ours, ANSWER.size, 1)[0] == ANSWER.pack(0)


def refuse_to_send(monkeypatch: pytest.MonkeyPatch, code: int, *, always: bool) -> None:
    """As the kernel does where too many descriptors are on their way, or it has no memory."""
    send_fds = socket.send_fds

    def send(channel: socket.socket, buffers: list[bytes], fds: list[int]) -> int:
        if fds or always:
            raise OSError(code, os.strerror(code))
        return send_fds(channel, buffers, fds)

    monkeypatch.setattr(socket, "send_fds", send)


def test_where_no_descriptor_can_be_sent_the_reason_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fill(tmp_path / "folder", NAMES)
    with attended(folder) as it:
        with monkeypatch.context() as patch:
            refuse_to_send(patch, errno.ETOOMANYREFS, always=False)
            before = len(list(Path("/proc/self/fd").iterdir()))
            for _ in range(9):
                assert outcome(it.hands, Opening.IMAGE, folder) == errno.ETOOMANYREFS
            # The last is closed when its answer is sent, or soon after.
            assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1
        assert outcome(it.hands, Opening.IMAGE, folder) == (os.O_RDONLY, IMAGE)


def test_a_server_of_files_that_fails_at_a_closing_does_not_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, close = fill(tmp_path / "folder", NAMES), os.close
    its_thread = []

    def fail(fd: int) -> None:
        is_open = not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH
        is_image = Path(f"/proc/self/fd/{fd}").readlink().name == IMAGE
        close(fd)
        if is_open and is_image and threading.current_thread() is not threading.main_thread():
            its_thread.append(fd)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with attended(folder) as it:
        monkeypatch.setattr(os, "close", fail)
        for _ in range(3):
            assert outcome(it.hands, Opening.IMAGE, folder) == (os.O_RDONLY, IMAGE)
    assert len(its_thread) == 3


def test_where_nothing_can_be_sent_nobody_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = fill(tmp_path / "folder", NAMES)
    with attended(folder) as it:
        refuse_to_send(monkeypatch, errno.ENOBUFS, always=True)
        it.channel.settimeout(10)
        assert outcome(it.hands, Change.SYNC, folder) == errno.EIO
    assert "mount again" in caplog.text


# ---- when it is no more ----


def end(it: Attended) -> None:
    it.channel.shutdown(socket.SHUT_RDWR)


def end_in_the_middle(it: Attended) -> None:
    it.channel.shutdown(socket.SHUT_RD)


@pytest.mark.parametrize("how", [end, end_in_the_middle])
def test_without_a_broker_nothing_can_be_opened_and_that_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: Callable[[Attended], None]
) -> None:
    folder = fill(tmp_path / "folder", NAMES)
    with Image.open(str(folder / IMAGE)) as image, attended(folder) as it:
        how(it)
        image.hands = it.hands
        for _ in range(CHANNELS + 1):
            with pytest.raises(ImageOpenFailed, match="mount again") as caught:
                image.reopen()
            assert caught.value.errno == errno.EIO
        assert outcome(it.hands, Change.REMOVE_UNDO, folder) == errno.EIO
        assert os.pread(image.fileno(), 5, 0) == b"image"
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def test_without_a_broker_nobody_is_told_to_move_the_undo_file_away(tmp_path: Path) -> None:
    folder = fill(tmp_path / "folder", NAMES)
    with Image.open(str(folder / IMAGE)) as image, attended(folder) as it:
        end(it)
        image.hands = it.hands
        unknown = pending(image)
    assert unknown
    assert unknown.sentence.startswith(f"{folder / IMAGE}{SUFFIX}: the undo file cannot be opened:")
    assert unknown.sentence.endswith("; unmount, and mount again")


class SlowBroker:
    """The other end of *count* channels, where what is asked for is answered when it is told."""

    def __init__(self, count: int) -> None:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(count)]
        self.channels = [its for _, its in pairs]
        self._ours = [ours for ours, _ in pairs]
        self.hands = Broker([ours for ours, _ in pairs])

    def close(self) -> None:
        for channel in (*self._ours, *self.channels):
            channel.close()

    def asked(self) -> list[socket.socket]:
        """The channels on which something was asked for and not taken yet."""
        return [each for each in self.channels if select.select([each], [], [], 0)[0]]

    def answer(self, channel: socket.socket, fd: int) -> None:
        channel.recv(REQUEST.size)
        socket.send_fds(channel, [ANSWER.pack(0)], [fd])


def test_a_broker_that_does_not_answer_is_waited_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a while for each channel; and what comes too late is taken for nobody's answer."""
    monkeypatch.setattr(broker, "_PATIENCE_SECONDS", 0.05)
    slow = SlowBroker(3)
    directory = os.open(tmp_path, os.O_PATH)
    try:
        for _ in range(10):
            with pytest.raises(HandsGone):
                slow.hands.open(Opening.IMAGE, directory, IMAGE)
        (late,) = slow.asked()
        (tmp_path / "late").write_bytes(b"late")
        (tmp_path / IMAGE).write_bytes(b"image")
        with (tmp_path / "late").open("rb") as wrong:
            slow.answer(late, wrong.fileno())
        answering = threading.Thread(target=_answer_next, args=[slow, tmp_path / IMAGE])
        answering.start()
        monkeypatch.setattr(broker, "_PATIENCE_SECONDS", 10)
        with os.fdopen(slow.hands.open(Opening.IMAGE, directory, IMAGE), "rb") as file:
            assert file.read() == b"image"
        answering.join(10)
    finally:
        os.close(directory)
        slow.close()


def _answer_next(slow: SlowBroker, path: Path) -> None:
    (asked,) = select.select(slow.channels, [], [], 10)[0]
    with path.open("rb") as file:
        slow.answer(asked, file.fileno())
