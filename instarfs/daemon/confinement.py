"""What the processes of a mount give up: each goes on with what it needs, and no more.

The daemon has read an image that nobody vouches for, so whatever the image made of it must not
reach the rest of the machine. By Landlock it keeps the directories that are followed, and Python's
own files; nothing in the image's directory, for there are the images of others. What it needs from
there its broker opens, which keeps nothing else. By seccomp each makes the system calls that it is
known to make, and no others (`instarfs.daemon.calls`): no program can be run, no mount changed, no
socket made, and nobody else's file, process or limits changed. No right comes back: not by a
set-user-ID program, nor by a capability. What the kernel lacks of this is said once, in the log.

All of it binds the calling thread and those that it starts, so `Confinement.enforce` is to be
called before there are others: one that was there would keep everything, and whoever took the
process over could have it do anything.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import site
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from enum import IntFlag
from functools import partial
from pathlib import Path
from typing import Self

from instarfs.daemon import calls, seccomp
from instarfs.errors import reason_of
from instarfs.image.file import Image, block_statistics
from instarfs.image.linux import (
    allow_beneath,
    create_ruleset,
    keep_capabilities,
    landlock_version,
    load_what_ends_threads,
    restrict_to,
    rule_out_new_privileges,
)

log = logging.getLogger(__name__)

# linux/capability.h
_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 1, 2
_TO_LOOK = 1 << _CAP_DAC_READ_SEARCH
_TO_USE = 1 << _CAP_DAC_OVERRIDE | _TO_LOOK
"""What lets root use an image that belongs to the user of a virtual machine."""


_THREADS = Path("/proc/self/task")
_ENDING_SECONDS, _POLL_SECONDS = 1.0, 0.001


class Right(IntFlag):
    """LANDLOCK_ACCESS_FS_*: what a path, and all beneath it, may be used for."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15


_OF_FILES = Right.READ_FILE | Right.WRITE_FILE | Right.TRUNCATE | Right.EXECUTE | Right.IOCTL_DEV

_REPAIR = Right.WRITE_FILE | Right.TRUNCATE
_KEEP_UNDO = Right.READ_DIR | Right.MAKE_REG | Right.REMOVE_FILE

# By the version of Landlock that brought them.
_LAST_RIGHT = {1: Right.MAKE_SYM, 2: Right.REFER, 3: Right.TRUNCATE, 5: Right.IOCTL_DEV}
_CUTTING_SINCE = 3
_TCP_SINCE, _BIND_AND_CONNECT = 4, 0b11
_SCOPES_SINCE, _ABSTRACT_SOCKETS_AND_SIGNALS = 6, 0b11


class Confinement:
    """What a process will keep. To be made before anything is mounted.

    Until `enforce` it holds O_PATH descriptors: afterwards a path may lead over the mount itself,
    and a process that asks its own mount waits for itself.
    """

    def __init__(self, capabilities: int, allowed: Callable[[int], Sequence[calls.Call]]) -> None:
        """*capabilities*: those that are kept, if there are any, as a set of bits.

        *allowed*: the system calls that are, to a process of the number that it gets.
        """
        self._capabilities, self._allowed = capabilities, allowed
        self._stack = ExitStack()
        self._kept: list[tuple[int, Right]] = []
        self._is_filtered = False

    @classmethod
    def of_daemon(cls, image: Image, followed: Sequence[str] = ()) -> Self:
        """Of what serves the mount. *followed*: directories with files that the image may name."""
        confinement = cls(_TO_LOOK, calls.of_daemon)
        if image.is_device:
            statistics = block_statistics(os.fstat(image.fileno()).st_rdev)
            confinement._keep(str(statistics), Right.READ_FILE)
        for directory in followed:
            confinement._keep(directory, Right.READ_FILE)
        for directory in _libraries():
            confinement._keep(directory, Right.READ_FILE | Right.READ_DIR)
        # Whether a caller has been killed; that of other processes which matters is behind ptrace.
        confinement._keep("/proc", Right.READ_FILE)
        return confinement

    @classmethod
    def of_broker(cls, image: Image, *, read_only: bool) -> Self:
        """Of what opens the files of the image for the daemon."""
        confinement = cls(_TO_USE, partial(calls.of_broker, read_only=read_only))
        writing = Right(0) if read_only else _REPAIR
        rights = Right.READ_FILE | (writing | _KEEP_UNDO if writing else Right(0))
        if image.undo is not None:
            confinement._keep(".", rights, image.undo.directory)
        spot = image.spot
        if image.is_device:
            confinement._keep(spot.name, Right.READ_FILE | writing, spot.directory)
            return confinement
        # The directory, not the file: another may take its place, and its undo file lies beside it.
        confinement._keep(".", rights, spot.directory)
        return confinement

    def _keep(self, path: str, rights: Right, directory: int | None = None) -> None:
        """*path* may begin at a *directory*, which stays the caller's."""
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC, dir_fd=directory)
        except OSError:  # Whoever needs it will hear why it cannot be had.
            return
        self._stack.callback(os.close, fd)
        self._kept.append((fd, rights))

    def enforce(self) -> None:
        """Give up everything else, for good. Never fails: what cannot be had is logged."""
        time.tzset()  # reads a file, once
        with contextlib.suppress(OSError):  # afterwards it could not be opened
            load_what_ends_threads()
        steps: dict[str, Callable[[], None]] = {
            "other threads": _wait_until_alone,
            "core dumps": _rule_out_core_dumps,
            "capabilities": self._drop_capabilities,
            "new privileges": rule_out_new_privileges,
            "files": self._restrict,
            "system calls": self._deny_calls,  # the last: what it takes to get here is among them
            "openings that empty a file": self._require_rule_on_cutting,
        }
        with self._stack:
            for what, step in steps.items():
                try:
                    step()
                except OSError as error:
                    log.warning("not confined: %s are not given up: %s", what, reason_of(error))

    def _drop_capabilities(self) -> None:
        """Where there are any, as of root: all but those that open the files of others."""
        keep_capabilities(self._capabilities)

    def _deny_calls(self) -> None:
        seccomp.deny_all_but(self._allowed(os.getpid()))
        self._is_filtered = True

    def _require_rule_on_cutting(self) -> None:
        """No filter lets O_TRUNC pass. Before Linux 6.2 Landlock does where a file may be read."""
        if not self._is_filtered and 1 <= landlock_version() < _CUTTING_SINCE:
            raise OSError(errno.ENOSYS, "this kernel's Landlock has no rule on them")

    def _restrict(self) -> None:
        """Landlock: everything that this kernel knows of is ruled out but what is kept."""
        version = landlock_version()
        if version < 1:
            raise OSError(errno.ENOSYS, "this kernel has no Landlock")
        handled = max(right for since, right in _LAST_RIGHT.items() if since <= version) * 2 - 1
        tcp = _BIND_AND_CONNECT if version >= _TCP_SINCE else 0
        scopes = _ABSTRACT_SOCKETS_AND_SIGNALS if version >= _SCOPES_SINCE else 0
        attributes = struct.pack("=QQQ", handled, tcp, scopes)
        size = 24 if scopes else 16 if tcp else 8
        ruleset = create_ruleset(attributes[:size])
        try:
            for fd, rights in self._kept:
                allowed = rights & handled
                if not stat.S_ISDIR(os.fstat(fd).st_mode):
                    allowed &= _OF_FILES
                allow_beneath(ruleset, fd, allowed)
            restrict_to(ruleset)
        finally:
            os.close(ruleset)


def _wait_until_alone() -> None:
    """Until threads that were ended are gone. Raises OSError where there are others."""
    deadline = time.monotonic() + _ENDING_SECONDS
    with contextlib.suppress(FileNotFoundError):  # without /proc it is not known
        while len(list(_THREADS.iterdir())) > 1:
            if time.monotonic() > deadline:
                raise OSError(errno.EBUSY, "they were there before")
            time.sleep(_POLL_SECONDS)


def _libraries() -> Iterator[str]:
    """Where modules are, for those that are imported late; and the sources for tracebacks.

    A package that is loaded from anywhere else, a user's site or PYTHONPATH, may be read on, and
    nothing beside it.
    """
    installed = [str(Path(os.__file__).parent), *site.getsitepackages()]
    yield from installed
    inside = tuple(f"{os.path.realpath(path)}/" for path in installed)
    for name, module in sorted(sys.modules.items()):
        if "." not in name:
            for folder in map(os.path.realpath, getattr(module, "__path__", ())):
                if not folder.startswith(inside):
                    yield folder


# ---- the kernel ----

_CORE_PATTERN = Path("/proc/sys/kernel/core_pattern")


def _rule_out_core_dumps() -> None:
    """None is written, nor handed to a program that collects them (do_coredump of the kernel)."""
    # Not 0: such a program would get one all the same.
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    except ValueError:
        # 0 is what whoever started it left, and more only a privileged process may have.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(FileNotFoundError):
            if _CORE_PATTERN.read_bytes().startswith(b"|"):
                raise OSError(
                    errno.EPERM, "the hard limit is 0, and a program collects them"
                ) from None
