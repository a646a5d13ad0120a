"""How fast all processes of a scan read together, and how long each of them has waited for that.

One number that they share says when the next byte may be read; whoever reads moves it on, and waits
until then. It lies in a file without a name, and so does the lock: the kernel lets go of it when a
process is killed.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import threading
import time

_WORD = struct.Struct("d")


class Pace:
    """The pace of ``slots`` processes, as one of them sees it."""

    def __init__(self, fd: int, rate: float, slots: int, slot: int = 0) -> None:
        """*fd*: from `shared`. *rate*: bytes a second, 0 for any. *slot*: whose waits are noted."""
        self._fd, self._rate, self._slot = fd, rate, slot
        self._words = mmap.mmap(fd, (1 + slots) * _WORD.size)
        self._lock = threading.Lock()
        self.bytes_read = 0

    def of(self, slot: int, slots: int) -> Pace:
        """The same for the process *slot*, which starts to count."""
        return Pace(self._fd, self._rate, slots, slot)

    def took(self, count: int) -> None:
        """Note that *count* bytes were read, and wait as long as that takes at this pace."""
        if not self._rate:
            with self._lock:
                self.bytes_read += count
            return
        with self._lock:
            self.bytes_read += count
            wait = self._move_on(count / self._rate)
            if wait > 0:
                # Said first: whoever watches must not take it for somebody who hangs.
                self._set(1 + self._slot, self.waited(self._slot) + wait)
                time.sleep(wait)

    def waited(self, slot: int) -> float:
        """How long a process has waited in all, in seconds."""
        return self._get(1 + slot)

    def _move_on(self, seconds: float) -> float:
        """Take *seconds* of the time that all share: how long it is until they are over."""
        fcntl.lockf(self._fd, fcntl.LOCK_EX)
        try:
            now = time.monotonic()
            until = max(now, self._get(0)) + seconds
            self._set(0, until)
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)
        return until - now

    def _get(self, word: int) -> float:
        value: float = _WORD.unpack_from(self._words, word * _WORD.size)[0]
        return value

    def _set(self, word: int, value: float) -> None:
        _WORD.pack_into(self._words, word * _WORD.size, value)


def shared(slots: int) -> int:
    """The descriptor of what so many processes share; it is inherited by name only."""
    fd = os.memfd_create("instarfs-pace", os.MFD_CLOEXEC)
    os.ftruncate(fd, (1 + slots) * _WORD.size)
    return fd
