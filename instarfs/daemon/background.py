"""Into the background: the fork, who waits until the mount answers, and the log from then on.

It comes before what serves a mount is loaded: the broker is forked between the two, and what is
loaded by then stays in its memory for as long as the mount lasts.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import sys
import syslog
import time
from collections.abc import Callable
from typing import NoReturn

from instarfs.daemon.logs import log_to


def nobody_waits() -> None:
    """What a mount in the foreground calls when it is ready."""


# ---- to the background ----


def to_background() -> Callable[[], None]:
    """Fork. Returns in the child only, with what the child calls once it is ready.

    The parent waits for that and exits with 0, or with the child's exit code should it end first;
    until then the child's stderr is the caller's. To be called before there are threads.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        _wait_for(child, reader)
    os.close(reader)
    return functools.partial(_detach, writer, os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))


def _wait_for(child: int, reader: int) -> NoReturn:
    if os.read(reader, 1):
        # At once: nothing is held back that was to be written, and to take Python down takes long.
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.exit(code if code >= 0 else 128 - code)


def _detach(writer: int, null: int) -> None:
    """Leave the caller's session and terminal, and tell it that all is well.

    Opens nothing: by now the process may not. Raises BrokenPipeError when the caller has gone.
    """
    os.setsid()
    for standard in range(3):
        os.dup2(null, standard)
    os.close(null)
    os.write(writer, b"\0")
    os.close(writer)


# ---- the log ----


def log_to_syslog(address: str = "/dev/log") -> None:
    """For a mount in the background. *address*: where the program listens that keeps the log."""
    log_to(_SyslogHandler(address), "%(message)s")


class _SyslogHandler(logging.Handler):
    """To syslog, one message a line of a traceback, by a socket that is made here and never again.

    syslog(3) makes another one when whoever listens was started anew, which a mount may not. This
    one is connected to nobody: each message looks for the address. Nobody there, or nobody who
    reads: nothing is logged, and readers of the mount do not wait.
    """

    def __init__(self, address: str) -> None:
        super().__init__()
        self._address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def emit(self, record: logging.LogRecord) -> None:
        level = (
            syslog.LOG_ERR
            if record.levelno >= logging.ERROR
            else syslog.LOG_WARNING
            if record.levelno >= logging.WARNING
            else syslog.LOG_INFO
        )
        # As syslog(3) writes it (RFC 3164, but for the host).
        begin = f"<{syslog.LOG_DAEMON | level}>{time.strftime('%b %e %T')} instarfs[{os.getpid()}]:"
        for line in self.format(record).split("\n"):
            with contextlib.suppress(OSError):
                self._socket.sendto(f"{begin} {line}".encode(), self._address)
