"""The standard streams of a command: what could not be printed is an error, not a traceback.

stdout of a script may be a full disk, a pipe that nobody reads any more, or not there at all.
"""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from instarfs.daemon.descriptors import is_open
from instarfs.errors import OutputFailed, reason_of

_STANDARD = range(3)
_OUT, _ERR = 1, 2


@contextmanager
def standard_streams() -> Iterator[None]:
    """Use them as long as the context lasts.

    What cannot be written to stdout raises `OutputFailed`; what cannot be said on stderr is not.
    """
    missing = _fill_gaps()
    before = sys.stdout, sys.stderr
    out = _Stream(_OUT, "it is closed" if _OUT in missing else "")
    sys.stdout, sys.stderr = _text(out), _text(_Unheard(_ERR))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _fill_gaps() -> set[int]:
    """Where the caller closed one of 0, 1, 2, the next file opened would be taken for it."""
    missing = {fd for fd in _STANDARD if not is_open(fd)}
    for _ in missing:  # each gets the lowest number that is free
        os.set_inheritable(_open_nothing(), True)
    return missing


def _open_nothing() -> int:
    try:
        return os.open(os.devnull, os.O_RDWR)
    except FileNotFoundError:  # as where /dev is not mounted: nothing can be read or written there
        return os.open("/", os.O_PATH)


def _text(stream: io.RawIOBase) -> io.TextIOWrapper:
    # As Python's own: a name that is not UTF-8 is written as the bytes that it is.
    return io.TextIOWrapper(
        stream,  # type: ignore[arg-type]  # it writes all or raises, as a buffer does
        encoding="utf-8",
        errors="backslashreplace",
        write_through=True,
    )


class _Stream(io.RawIOBase):
    """A descriptor. Nothing is held back, so that nothing fails when the process ends."""

    def __init__(self, fd: int, refusal: str = "") -> None:
        super().__init__()
        self._fd, self._refusal = fd, refusal

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        """All of *data*, in bytes. Raises `OutputFailed`."""
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        if self._refusal:
            raise OutputFailed(self._refusal)
        written = 0
        while written < len(view):
            try:
                written += os.write(self._fd, view[written:])
            except BlockingIOError:
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll()
            except OSError as error:
                raise OutputFailed(reason_of(error)) from error
        return written


class _Unheard(_Stream):
    """The same; what fails is passed over, since there is nowhere to say so."""

    def write(self, data: object) -> int:
        try:
            return super().write(data)
        except OutputFailed:
            return memoryview(data).nbytes  # type: ignore[arg-type]
