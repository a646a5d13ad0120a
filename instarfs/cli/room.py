"""The room that the caller leaves to a command: its limits, the signals that it is started with.

Importing this loads nothing of weight. What is too little to load the rest in is found before that:
libraries that run out of memory while they are loaded say so each in their own way, some in pages.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import sys
import time
from types import FrameType
from typing import NoReturn

_MIB = 1 << 20
_LEAST = (
    (resource.RLIMIT_DATA, "ulimit -d", 96 * _MIB),
    (resource.RLIMIT_AS, "ulimit -v", 256 * _MIB),
)
"""What it takes to load everything, and to look at a small image; address space is also what is
only set aside."""

SHORTAGES = {
    errno.EMFILE: "there are too few file descriptors for that (ulimit -n)",
    errno.ENFILE: "this machine has no file descriptor left",
    errno.ENOMEM: "there is not enough memory for that (ulimit -d, ulimit -v)",
    errno.EAGAIN: "no more processes or threads can be started (ulimit -u)",
}
_ALMOST_A_SECOND = 0.8

NO_TIME = "there is not enough processor time for that (ulimit -t)"

# What the dynamic linker says of a library that there is no room for,
# and Python of a module that it cannot keep.
_NO_ROOM = (
    "failed to map segment",
    "cannot map zero-fill pages",
    "cannot allocate memory",
    "error return without exception set",
)
_NO_THREAD = "can't start new thread"
_NO_DESCRIPTOR = "too many open files"


class OutOfTime(BaseException):
    """The limit on processor time is reached; its hard one, which kills, is a second away."""


def settle() -> None:
    """Make the most of it; ends the process where there is too little to begin with."""
    if sys.flags.optimize > 1:
        end(
            "Python leaves out what it would say (python -OO): unset PYTHONOPTIMIZE, or set it to 1"
        )
    # A program that is told of no child's end takes every one for a success; and whoever blocked
    # signals when it started this one did not mean that this is never to be stopped.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
    for limit, name, least in _LEAST:
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY and soft < least:
            end(f"{least // _MIB} MiB of memory are the least it takes ({name} {least // 1024})")
    _be_told_of_the_end()


def _be_told_of_the_end() -> None:
    """Of processor time: at its hard limit a process is killed, whatever it does just then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard != resource.RLIM_INFINITY and soft == hard > 1:
        resource.setrlimit(resource.RLIMIT_CPU, (hard - 1, hard))
    if signal.getsignal(signal.SIGXCPU) is signal.SIG_DFL:
        signal.signal(signal.SIGXCPU, _out_of_time)
    if soft == hard == 1 and signal.getsignal(signal.SIGPROF) is signal.SIG_DFL:
        # There is no second before it: limits are whole seconds, timers are not.
        signal.signal(signal.SIGPROF, lambda _number, _frame: signal.raise_signal(signal.SIGXCPU))
        _be_woken_in_time()
        os.register_at_fork(after_in_child=_be_woken_in_time)


def _be_woken_in_time() -> None:
    """Shortly before a second of processor time is over. Of a process that is forked anew."""
    signal.setitimer(signal.ITIMER_PROF, max(_ALMOST_A_SECOND - time.process_time(), 0.01))


def _out_of_time(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGXCPU, signal.SIG_IGN)  # once is enough
    raise OutOfTime


def shortage_of(error: BaseException) -> str | None:
    """What this process has too little of, where that is what is wrong: it may turn up anywhere."""
    if isinstance(error, OutOfTime):
        return NO_TIME
    number, text = error.errno if isinstance(error, OSError) else None, str(error).lower()
    if isinstance(error, MemoryError) or any(words in text for words in _NO_ROOM):
        number = errno.ENOMEM
    elif _NO_THREAD in text:
        number = errno.EAGAIN
    elif isinstance(error, ImportError) and _NO_DESCRIPTOR in text:
        number = errno.EMFILE
    return SHORTAGES.get(number or 0)


def end_if_short(error: BaseException) -> None:
    """End the process with one line if *error* is a shortage."""
    shortage = shortage_of(error)
    if shortage is not None:
        end(shortage)


def end(sentence: str) -> NoReturn:
    """End the process with this line."""
    with contextlib.suppress(OSError):
        os.write(2, f"instarfs: {sentence}\n".encode())
    os._exit(1)
