"""The broker of a mount: the one process that reaches into the image's directory.

The daemon, which reads the image, must not: there are the images of others. It asks the broker for
one of a few fixed things, each under the image's own name or that of its undo file, and gets a
descriptor, or word that it is done. No path is ever asked for, and the broker reads no file. It is
forked before anything is known of the image but its name, keeps its directory, that of an undo file
elsewhere, and nothing else, and ends when the daemon does. What there is to ask for is declared in
`instarfs.image.directory`.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import queue
import resource
import select
import signal
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from instarfs.daemon.confinement import Confinement
from instarfs.image.directory import (
    OF_IMAGE,
    OF_READERS,
    SUFFIX,
    Change,
    HandsGone,
    Opening,
    Origin,
    OwnHands,
    Spot,
)
from instarfs.image.file import Image, close_all
from instarfs.image.linux import name_process

log = logging.getLogger(__name__)

CHANNELS = 4
"""So many requests are carried out at a time: a reader is not to wait for a repair's flush."""

# What is asked for, and where that is to be: see `_place_of`.
REQUEST = struct.Struct("=BxxxIQQ")
# The errno, or 0.
ANSWER = struct.Struct("=i")

_IGNORED = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGXCPU)

_GONE = (
    "the process that opens the image's files has ended, or does not answer;"
    " unmount, and mount again"
)

_PATIENCE_SECONDS = 5.0
_POLL_SECONDS = 0.01


@contextmanager
def separated(image: Image, *, read_only: bool = False) -> Iterator[None]:
    """From now on let a new process reach into the directory of *image*, for as long as this lasts.

    *read_only*: it opens nothing for writing. To be called before there are threads.
    """
    ours, its = zip(*(pair() for _ in range(CHANNELS)), strict=True)
    child = os.fork()
    if not child:
        try:
            _become_broker(image, its, read_only=read_only)
        finally:
            os._exit(0)
    for channel in its:
        channel.close()
    image.hands = Broker(ours)
    try:
        yield
    finally:
        for channel in ours:
            channel.close()
        _wait_for_end_of(child)


def pair() -> tuple[socket.socket, socket.socket]:
    """A channel: the end of who asks, and that of the broker.

    No more than a few answers wait in it. Descriptors that are on their way count for the user, and
    a daemon that was taken over, and asks and never reads, would leave none for others to send.
    """
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    its.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least that the kernel gives
    return ours, its


def _wait_for_end_of(child: int) -> None:
    """For a while: the kernel may keep it waiting for a disk, and it ends when that answers."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while os.waitpid(child, os.WNOHANG) == (0, 0) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


class Broker:
    """The broker as the daemon sees it: `instarfs.image.directory.Hands`. Usable from any thread.

    Where the broker has ended, everything raises `HandsGone`, which is EIO.
    """

    def __init__(self, channels: Sequence[socket.socket]) -> None:
        self._free: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
        self._late: list[socket.socket] = []
        for channel in channels:
            self._free.put(channel)
        self._is_gone = False

    def open(self, what: Opening, directory: int, name: str) -> int:
        fds = self._ask(what, directory, name)
        if not fds:  # the kernel had no number left to give it
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        os.set_inheritable(fds[0], False)
        return fds[0]

    def change(self, change: Change, directory: int, name: str) -> None:
        self._ask(change, directory, name)

    def _ask(self, what: Opening | Change, directory: int, name: str) -> list[int]:
        request = REQUEST.pack(what, *_place_of(directory, name))
        # A flush takes as long as it takes, and only a repair asks.
        is_awaited = isinstance(what, Opening)
        if is_awaited and not self._has_caught_up():
            raise self._gone()
        channel = self._free.get()
        try:
            channel.send(request)
            if is_awaited and not _has_answer(channel, _PATIENCE_SECONDS):
                # Put aside: the answer must not be taken for another's.
                self._late.append(channel)
                raise self._gone()
            answer, fds, *_ = socket.recv_fds(channel, ANSWER.size, 1)
        except HandsGone:
            raise
        except OSError:
            answer, fds = b"", []
        # Not where anything else was raised: the answer may still come, and be taken for another's.
        self._free.put(channel)
        if not answer:
            raise self._gone()
        code = ANSWER.unpack(answer)[0]
        if code:
            raise OSError(code, os.strerror(code))
        return fds

    def _has_caught_up(self) -> bool:
        """Whether all that was asked for has been answered; what came too late is let go of.

        Who asks next does not wait anew for a disk that did not answer the one before.
        """
        for channel in tuple(self._late):
            if _has_answer(channel, 0):
                with suppress(OSError, ValueError):  # it has ended; another thread was faster
                    self._late.remove(channel)
                    for fd in socket.recv_fds(channel, ANSWER.size, 1)[1]:
                        os.close(fd)
                    self._free.put(channel)
        return not self._late

    def _gone(self) -> HandsGone:
        if not self._is_gone:
            self._is_gone = True
            log.error("%s", _GONE)
        return HandsGone(errno.EIO, _GONE)


def _has_answer(channel: socket.socket, seconds: float) -> bool:
    """Wait for it, but not for long: the event loop of a mount may be who waits."""
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _place_of(directory: int, name: str) -> tuple[int, int, int]:
    """Stands for *name* in *directory*: both must mean the same by what is asked for."""
    status = os.fstat(directory)
    return zlib.crc32(os.fsencode(name)), status.st_dev, status.st_ino


# ---- the process itself ----


class Attendant:
    """What carries out the requests: the little that the broker knows, and it never changes."""

    def __init__(
        self, image: Spot, origin: Origin, undo: Spot | None = None, *, read_only: bool = False
    ) -> None:
        """*origin*: what may be opened under the image's name. *undo*: of an undo file that is not
        beside it. The directories stay the caller's.
        """
        self._image = image
        self._undo = undo or Spot(image.directory, image.name + SUFFIX)
        self._allowed = OF_READERS if read_only else frozenset((*Opening, *Change))
        self._hands = OwnHands(origin)

    def attend(self, channel: socket.socket) -> None:
        """Answer what comes on *channel* until its other end is closed; then close it.

        Whatever else ends this: who waits for an answer learns that there will be none.
        """
        with channel, suppress(OSError):  # of the channel: nobody is left to answer
            # Longer than a request, so that one that is too long is not taken for one.
            while request := channel.recv(REQUEST.size + 1):
                code, fds = 0, []
                try:
                    fds = self._carry_out(request)
                except OSError as error:
                    code = error.errno or errno.EIO
                _answer(channel, code, fds)

    def _carry_out(self, request: bytes) -> list[int]:
        """The descriptor, where one was asked for."""
        if len(request) != REQUEST.size:
            raise OSError(errno.EINVAL, "no request")
        number, *place = REQUEST.unpack(request)
        what = next((each for each in (*Opening, *Change) if each == number), None)
        if what is None:
            raise OSError(errno.EINVAL, "no request")
        if what not in self._allowed:
            raise OSError(errno.EROFS, "nothing is written")
        spot = self._image if what in OF_IMAGE else self._undo
        if _place_of(spot.directory, spot.name) != tuple(place):
            raise OSError(errno.ESTALE, "this is not where it is")
        if isinstance(what, Opening):
            return [self._hands.open(what, spot.directory, spot.name)]
        self._hands.change(what, spot.directory, spot.name)
        return []


def _answer(channel: socket.socket, code: int, fds: Sequence[int]) -> None:
    """Send both, and close *fds*. Where the kernel sends no descriptor, the reason for that."""
    try:
        socket.send_fds(channel, [ANSWER.pack(code)], fds)
    except OSError as error:
        # Of all processes of a user no more may be on their way than one may have open
        # (ETOOMANYREFS of unix(7)), and for root too: the capability that lifts this is given up.
        if not fds:
            raise
        channel.sendmsg([ANSWER.pack(error.errno or errno.EIO)])
    finally:
        close_all(*fds)


def _become_broker(image: Image, channels: Sequence[socket.socket], *, read_only: bool) -> None:
    """What the new process does, until the daemon has ended."""
    # The daemon ends first: it may have to put a repair back, and to take its undo file away.
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    os.setsid()
    name_process(b"instarfs-broker")
    os.chdir("/")
    os.umask(0o077)  # it could not put a mode right afterwards
    spots = [image.spot, *([image.undo] if image.undo else [])]
    _let_go_of_all_but(
        {*(spot.directory for spot in spots), *(channel.fileno() for channel in channels)}
    )
    # What it cannot give up the daemon cannot either, and says so.
    logging.disable()
    Confinement.of_broker(image, read_only=read_only).enforce()
    attendant = Attendant(image.spot, image.origin, image.undo, read_only=read_only)
    threads = [threading.Thread(target=attendant.attend, args=[each]) for each in channels]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _let_go_of_all_but(kept: set[int]) -> None:
    """Close what was open before the fork; the standard ones lead nowhere."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    bounds = [2, *sorted(kept), resource.getrlimit(resource.RLIMIT_NOFILE)[0]]
    for below, above in itertools.pairwise(bounds):
        os.closerange(below + 1, above)
