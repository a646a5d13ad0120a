"""Processes that look at files, as the one sees them that asks: started, asked, and ended.

Nothing that lies in the file systems that are scanned is touched by anybody else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from instarfs.errors import ScanCrippled
from instarfs.scan import pace
from instarfs.scan.listing import Entry, Folder, Identity, Question
from instarfs.scan.nursery import END, FORK, MESSAGE_BYTES
from instarfs.scan.values import Limits, Skipped

_ROOT = str(Path(__file__).parents[2])
# It takes nothing from the current folder (-P); and what runs from a checkout is found there.
_PROGRAM = (
    "import sys; sys.path.append(sys.argv.pop()); from instarfs.scan.nursery import main; main()"
)

POLL_SECONDS = 0.25
"""So long may it take until somebody notices that the scan is to stop."""

LISTING_SECONDS = 60.0
"""A folder that does not answer for so long is not waited for."""


class Stopped(Exception):
    """Whoever asked for a scan wants it to stop; never leaves `instarfs.scan.run`."""


class Nursery:
    """Starts and ends processes; see `instarfs.scan.nursery`. Slot 0 is whoever lists folders."""

    def __init__(self, jobs: int, limits: Limits) -> None:
        """Raises `ScanCrippled`."""
        self.limits, self.slots = limits, jobs + 1
        fd = pace.shared(self.slots)
        ours, theirs = socket.socketpair()
        self._control = ours
        self.pace = pace.Pace(fd, limits.read_rate, self.slots)
        values = json.dumps(dataclasses.asdict(limits))
        words = [str(theirs.fileno()), str(fd), values, str(self.slots), _ROOT]
        try:
            self._process = subprocess.Popen(  # noqa: S603 - this program
                [sys.executable, "-P", "-c", _PROGRAM, *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), fd),
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )
        except OSError as error:
            ours.close()
            raise ScanCrippled(error.strerror or str(error)) from error
        finally:
            theirs.close()
        self._is_ready = False

    def fork(self, slot: int) -> Worker:
        """A new process. Raises `ScanCrippled`."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            answer = int(self._ask(FORK, slot, theirs.fileno()))
            if answer < 0:
                raise ScanCrippled(os.strerror(-answer))
            return Worker(self, answer, slot, Connection(ours.detach()))

    def end(self, pid: int) -> int:
        """End a process: how it ended, as `subprocess` says it; 0 where that is not known."""
        return int(self._ask(END, pid))

    def _ask(self, word: bytes, number: int, *fds: int) -> bytes:
        try:
            if not self._is_ready:
                self._is_ready = bool(self._control.recv(MESSAGE_BYTES))
            socket.send_fds(self._control, [b"%s %d" % (word, number)], list(fds))
            answer = self._control.recv(MESSAGE_BYTES)
        except OSError:
            answer = b""
        if not answer:
            raise ScanCrippled("the process that starts them has ended")
        return answer

    def close(self) -> None:
        """End it, and with it all that it has started."""
        self._control.close()
        try:
            self._process.wait(POLL_SECONDS)
        except subprocess.TimeoutExpired:  # it is being loaded
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


@dataclasses.dataclass(slots=True)
class Worker:
    """A process that answers what it is sent, in that order."""

    nursery: Nursery
    pid: int
    slot: int
    connection: Connection

    def end(self) -> str:
        """End it: what became of it, for a sentence."""
        self.connection.close()
        code = self.nursery.end(self.pid)
        return f"was killed by signal {-code}" if code < 0 else "ended by itself"


class Unanswered(Exception):
    """Whoever was asked of a path did not answer, and was ended; the message says which of both."""


class Lister:
    """Asks of folders and paths, in a process that is replaced where a file system says nothing."""

    def __init__(self, nursery: Nursery, stop: Callable[[], bool]) -> None:
        self._nursery, self._stop = nursery, stop
        self._seconds = min(LISTING_SECONDS, nursery.limits.timeout)
        self._worker: Worker | None = None

    def real(self, path: bytes) -> bytes:
        """*path* without links; absolute. Where nobody answers: as it is named, but absolute."""
        try:
            return cast(bytes, self._ask(Question.REAL, path))
        except Unanswered:
            with contextlib.suppress(FileNotFoundError):  # of the current folder
                return os.path.abspath(path)  # noqa: PTH100 - of bytes
            return path

    def is_there(self, path: bytes) -> bool:
        """Whether anything stands at *path*; so it may be where nobody answers."""
        try:
            return self.device_if_lost(path) is None
        except Unanswered:
            return True

    def look(self, path: bytes) -> Entry:
        """What stands at *path*."""
        try:
            return cast(Entry, self._ask(Question.LOOK, path))
        except Unanswered as error:
            return Skipped(path, str(error), is_failure=True)

    def device_if_lost(self, path: bytes) -> int | None:
        """As `instarfs.scan.listing.device_if_lost`. Raises `Unanswered`."""
        return cast("int | None", self._ask(Question.DEVICE_IF_LOST, path))

    def entries(self, folder: Folder) -> Iterator[Identity | Entry]:
        """Which folder it is, and what is in it by name; or what was skipped."""
        is_through = False
        try:
            connection = self._send(folder)
            while (part := self._receive(connection)) is not None:
                if isinstance(part, tuple):
                    yield part
                else:
                    yield from part
            is_through = True
        except Unanswered as error:
            yield Skipped(folder.path, str(error), is_failure=True)
        finally:
            if not is_through:
                self._end()

    # All of these raise `Stopped`, `ScanCrippled`; and `Unanswered`, and then the process is ended.

    def _ask(self, question: Question, path: bytes) -> object:
        return self._receive(self._send((question, path)))

    def _send(self, asked: object) -> Connection:
        if self._worker is None:
            self._worker = self._nursery.fork(0)
        with contextlib.suppress(OSError):  # one that has ended is noticed where it is read from
            self._worker.connection.send(asked)
        return self._worker.connection

    def _receive(self, connection: Connection) -> Any:
        until = time.monotonic() + self._seconds
        try:
            while not connection.poll(POLL_SECONDS):
                if self._stop():
                    raise Stopped
                if time.monotonic() > until:
                    self._end()
                    raise Unanswered(f"it did not answer for {self._seconds:g} seconds")
            return connection.recv()
        except (EOFError, OSError) as error:
            self._end()
            raise Unanswered("whoever looked at it was killed") from error

    def _end(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            with contextlib.suppress(ScanCrippled):
                worker.end()
