"""The process that forks those which look at files: it has all loaded, and never looks itself.

So a process that hangs, or that takes too much, is ended and replaced in a millisecond. It does
what `instarfs.scan.workers` asks of it, over a socket, and ends when that is closed; whatever it
has forked ends with it. It is started by name, not forked: whoever asks may have threads, and open
databases.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import NoReturn

from instarfs.image.linux import end_with_parent, name_process
from instarfs.scan.examine import examine
from instarfs.scan.listing import ANSWERS, Folder, Question, list_folder
from instarfs.scan.pace import Pace
from instarfs.scan.values import Candidate, Limits

MESSAGE_BYTES = 64
FORK, END = b"fork", b"end"

_REAP_SECONDS = 0.2
"""Somebody who waits for a disk ends when that answers: nobody waits for it longer than this."""


def main() -> NoReturn:
    """Serve until nobody asks any more. Arguments: the socket, the pace's descriptor, the rest."""
    # Whoever stops a scan stops the one that asks; and then there is nothing more to do here.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    control, pace_fd, values, slots = sys.argv[1:]
    limits = Limits(**json.loads(values))
    if limits.memory:
        _limit_memory(limits.memory)
    pace = Pace(int(pace_fd), limits.read_rate, int(slots))
    gc.freeze()
    children: set[int] = set()
    with contextlib.suppress(OSError):
        _nurse(socket.socket(fileno=int(control)), pace, int(slots), children)
    for child in children:  # so that what they have taken is told of this process
        _end(child)
    os._exit(0)


def _nurse(control: socket.socket, pace: Pace, slots: int, children: set[int]) -> None:
    """Do what is asked, as long as somebody asks. *children*: those that there are."""
    control.sendall(b"ready")
    while True:
        message, fds, _, _ = socket.recv_fds(control, MESSAGE_BYTES, 1)
        if not message:
            return
        word, _, argument = message.partition(b" ")
        if word == FORK:
            answer = _fork(control, fds[0], pace.of(int(argument), slots))
            children |= {answer} if answer > 0 else set()
        else:
            children.discard(int(argument))
            answer = _end(int(argument))
        control.sendall(b"%d" % answer)


def _limit_memory(most: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _fork(control: socket.socket, fd: int, pace: Pace) -> int:
    """The process that serves *fd*; minus the errno where there is none."""
    parent = os.getpid()
    try:
        child = os.fork()
    except OSError as error:
        os.close(fd)
        return -(error.errno or 1)
    if child:
        os.close(fd)
        return child
    with contextlib.suppress(BaseException):
        control.close()
        end_with_parent()
        name_process(b"instarfs-scan")
        if os.getppid() == parent:
            _serve(Connection(fd), pace)
    os._exit(0)


def _end(child: int) -> int:
    """Kill *child*: what it ended by, minus the number of a signal; 0 if that is not known."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    until = time.monotonic() + _REAP_SECONDS
    while time.monotonic() < until:
        with contextlib.suppress(ChildProcessError):
            if (ended := os.waitpid(child, os.WNOHANG))[0]:
                return os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.001)
    return 0


def _serve(connection: Connection, pace: Pace) -> None:
    """Answer until nobody asks any more: of many candidates, of a folder in parts, of a path."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            for answer in _answers(connection.recv(), pace):
                connection.send(answer)


def _answers(
    asked: Folder | tuple[Question, bytes] | list[Candidate], pace: Pace
) -> Iterator[object]:
    if isinstance(asked, Folder):
        yield from list_folder(asked.path)
        yield None
    elif isinstance(asked, tuple):
        question, path = asked
        yield ANSWERS[question](path)
    else:
        for candidate in asked:
            yield examine(candidate, pace)
