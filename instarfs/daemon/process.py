"""The process behind a mount: to the background, readiness, signals, the log, and the end.

Everything about the life of that process lives here. What it serves is handed to it; this file
does not know what an image is.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import socket
import sys
import syslog
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import NoReturn

import pyfuse3
import trio

from instarfs.daemon.logs import log_to
from instarfs.errors import MountFailed
from instarfs.image.linux import limit_arenas
from instarfs.mount.mountpoint import STOP_COMPUTING, ReadAhead, Unmounter, follow_no_links
from instarfs.mount.operations import Operations
from instarfs.mount.requests import take_turns_fast

log = logging.getLogger(__name__)

_STOP = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGXCPU)

# A reader that waits for a check keeps a task; by default the hundredth would stop the whole mount.
_MAX_TASKS = 1 << 20

_ARENAS = 2

_LEAVING_SECONDS = 3.0
"""After a signal: then it is unmounted, though a repair be put back still."""


@dataclass(frozen=True, slots=True)
class Service:
    """What is served: the handlers, and how to end whatever they are computing.

    ``confine`` is called once the mount is there, before the first of them: what the process may
    do from then on.
    """

    operations: Operations
    cancel: Callable[[], None]
    confine: Callable[[], None] = lambda: None


def run(
    make_service: Callable[[], AbstractAsyncContextManager[Service]],
    directory: str,
    options: set[str],
    *,
    ready: Callable[[], None],
) -> int:
    """Mount on *directory* and serve until it is unmounted or a signal comes: the exit code.

    What *make_service* makes is entered in the event loop, and left when there is no mount any
    more. *ready* is called once the mount answers; when nobody is left to hear that
    (BrokenPipeError), the mount ends. Raises `MountFailed`.
    """
    _share_memory_among_threads()
    return trio.run(_serve, make_service, directory, options, ready)


def _share_memory_among_threads() -> None:
    """Have the threads take their memory from two arenas; to be called before there are any.

    glibc gives eight of them for each processor (mallopt(3)), and what is free in one is of no use
    to the threads of another. Under load a mount held a quarter more that way, and most of it was
    free. Other allocators are left alone.
    """
    limit_arenas(_ARENAS)


async def _serve(
    make_service: Callable[[], AbstractAsyncContextManager[Service]],
    directory: str,
    options: set[str],
    ready: Callable[[], None],
) -> int:
    async with make_service() as service:
        # From before the mount on: a signal in between must not leave a dead mount behind.
        with trio.open_signal_receiver(*_STOP, STOP_COMPUTING) as signals:
            return await _mount(service, signals, directory, options, ready)


async def _mount(
    service: Service,
    signals: AsyncIterator[int],
    directory: str,
    options: set[str],
    ready: Callable[[], None],
) -> int:
    target = os.path.realpath(directory)
    is_over = trio.Event()
    with _mounted(service.operations, directory, options) as unmount:

        async def leave() -> None:
            with trio.move_on_after(_LEAVING_SECONDS):
                await is_over.wait()
                return
            log.warning("%s: unmounted; what has begun is waited for", directory)
            await trio.to_thread.run_sync(unmount)

        read_ahead = ReadAhead(target)
        follow_no_links(target)
        os.chdir("/")  # whatever the caller's directory is on can be unmounted
        service.confine()
        try:
            async with trio.open_nursery() as nursery:
                stop = nursery.cancel_scope.cancel
                nursery.start_soon(_obey, signals, service, stop, leave)
                nursery.start_soon(_announce, service, read_ahead, ready, stop)
                nursery.start_soon(service.operations.watch_callers)
                nursery.start_soon(service.operations.drop_names)
                take_turns_fast()
                try:
                    await pyfuse3.main(max_tasks=_MAX_TASKS)
                finally:
                    is_over.set()
                stop()
        except Exception:
            log.exception("the mount ended unexpectedly")
            return 1
    return 0


async def _obey(
    signals: AsyncIterator[int],
    service: Service,
    stop: Callable[[], None],
    leave: Callable[[], Awaitable[None]],
) -> None:
    async for number in signals:
        if number == STOP_COMPUTING:
            service.cancel()
            service.operations.cancel_opening()
        else:
            log.info("%s: unmounting", signal.Signals(number).name)
            stop()
            with trio.CancelScope(shield=True):
                await leave()


async def _announce(
    service: Service, read_ahead: ReadAhead, ready: Callable[[], None], stop: Callable[[], None]
) -> None:
    await service.operations.answering.wait()
    read_ahead.widen()
    try:
        ready()
    except BrokenPipeError:
        log.info("whoever asked for the mount has gone: unmounting")
        stop()
    else:
        log.info("mounted")


@contextlib.contextmanager
def _mounted(
    operations: Operations, directory: str, options: set[str]
) -> Iterator[Callable[[], bool]]:
    """Yields what unmounts it early, in any thread."""
    with Unmounter(directory) as unmounter, _file_in_memory() as kept:
        with _captured_stderr(kept) as said:
            try:
                pyfuse3.init(operations, directory, options)
            except RuntimeError as error:
                raise MountFailed(directory, said() or str(error)) from error
            warning = said()
        unmounter.remember()
        if warning:
            log.warning("%s", warning)
        try:
            yield unmounter.unmount
        finally:
            if not unmounter.unmount():
                log.warning("%s: could not be unmounted: see instarfs umount", directory)
            with _captured_stderr(kept):  # it tries once more, and may not
                pyfuse3.close()


@contextlib.contextmanager
def _file_in_memory() -> Iterator[int]:
    """A descriptor of what can be written to. Once the process is confined none can be made."""
    fd = os.memfd_create("stderr")
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _captured_stderr(captured: int) -> Iterator[Callable[[], str]]:
    """What libfuse and fusermount3 say on stderr goes to *captured*, for an error's one line."""
    saved = os.dup(2)

    def said() -> str:
        text = os.pread(captured, 4096, 0).decode(errors="replace")
        return " ".join(text.split())

    try:
        os.dup2(captured, 2)
        yield said
    finally:
        os.dup2(saved, 2)
        os.close(saved)


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
        sys.exit(0)
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
