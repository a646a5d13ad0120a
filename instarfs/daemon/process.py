"""The process behind a mount: mounting, signals, and the end.

Everything about the life of that process lives here, but for how it came into the background. What
it serves is handed to it; this file does not know what an image is.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import pyfuse3
import trio

from instarfs.errors import MountFailed
from instarfs.image.linux import limit_arenas
from instarfs.mount.mountpoint import STOP_COMPUTING, ReadAhead, Unmounter, follow_no_links
from instarfs.mount.operations import Operations
from instarfs.mount.requests import take_turns_fast

log = logging.getLogger(__name__)

_STOP = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGXCPU)

# A reader that waits for a check keeps a task; by default the hundredth would stop the whole mount.
_MAX_TASKS = 1 << 20

_LEAVING_SECONDS = 3.0
"""After a signal: then it is unmounted, though a repair be put back still."""


@dataclass(frozen=True, slots=True)
class Service:
    """What is served: the handlers, and how to end whatever they are computing.

    ``confine`` is called once the mount is there, before the first of them: what the process may
    do from then on. ``load``, in a thread, once the mount answers: what it has not needed so far.
    """

    operations: Operations
    cancel: Callable[[], None]
    confine: Callable[[], None] = lambda: None
    load: Callable[[], None] = lambda: None


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
    threading.stack_size(_STACK)
    return trio.run(_serve, make_service, directory, options, ready)


def _share_memory_among_threads() -> None:
    """Have the threads take their memory from one arena; to be called before there are any.

    glibc gives eight of them for each processor (mallopt(3)), and what is free in one is of no use
    to the threads of another. Under load a mount held a quarter more that way, and most of it was
    free. And every arena but the first goes back to the kernel as soon as it is free, in pieces of
    64 MiB: of a check of 1 TiB a sixth was page faults. Other allocators are left alone.
    """
    limit_arenas(1)


# Of the 8 MiB that a thread mostly gets for its stack all count to a limit on memory (ulimit -d),
# and no thread here takes one of them.
_STACK = 2 << 20


async def _serve(
    make_service: Callable[[], AbstractAsyncContextManager[Service]],
    directory: str,
    options: set[str],
    ready: Callable[[], None],
) -> int:
    async with make_service() as service:
        # From before the mount on: a signal in between must not leave a dead mount behind.
        with trio.open_signal_receiver(*_stopping(), STOP_COMPUTING) as signals:
            return await _mount(service, signals, directory, options, ready)


def _stopping() -> tuple[signal.Signals, ...]:
    """What ends the mount: not a terminal that is closed, where `nohup` was to see to that."""
    is_kept = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in _STOP if not (is_kept and number is signal.SIGHUP))


async def _mount(
    service: Service,
    signals: AsyncIterator[int],
    directory: str,
    options: set[str],
    ready: Callable[[], None],
) -> int:
    target = os.path.realpath(directory)
    is_over = trio.Event()
    with _mounted(service.operations, directory, options) as unmounter:

        async def leave() -> None:
            with trio.move_on_after(_LEAVING_SECONDS):
                await is_over.wait()
                return
            log.warning("%s: unmounted; what has begun is waited for", directory)
            await trio.to_thread.run_sync(unmounter.unmount)

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
                    unmounter.forget_what_is_gone()
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
        try:
            await trio.to_thread.run_sync(service.load)
        except Exception:
            log.exception("not all of instarfs could be loaded")


@contextlib.contextmanager
def _mounted(operations: Operations, directory: str, options: set[str]) -> Iterator[Unmounter]:
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
            yield unmounter
        finally:
            if not unmounter.unmount():
                log.warning("%s: could not be unmounted: see instarfs umount", directory)
            with _captured_stderr(kept):  # it tries once more, and may not
                pyfuse3.close()


_SAID_BYTES = 4096


@contextlib.contextmanager
def _file_in_memory() -> Iterator[int]:
    """A descriptor of what can be written to. Once the process is confined none can be made."""
    fd = os.memfd_create("stderr", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        # No larger: no limit on memory counts what is in it.
        os.ftruncate(fd, _SAID_BYTES)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _captured_stderr(captured: int) -> Iterator[Callable[[], str]]:
    """What libfuse and fusermount3 say on stderr goes to *captured*, for an error's one line."""
    saved = os.dup(2)

    def said() -> str:
        text = os.pread(captured, _SAID_BYTES, 0).rstrip(b"\0").decode(errors="replace")
        return " ".join(text.split())

    try:
        os.dup2(captured, 2)
        yield said
    finally:
        os.dup2(saved, 2)
        os.close(saved)
