"""What a process was started with and does not need: descriptors that are the caller's.

A daemon stays when its caller has gone, and whoever takes it over has what it has open.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

_OPEN = Path("/proc/self/fd")
_STANDARD = (0, 1, 2)


def open_now() -> frozenset[int]:
    """All but the standard ones. To be asked before anything of one's own is opened."""
    listed: list[int] = []
    with contextlib.suppress(OSError):
        listed = [int(it.name) for it in _OPEN.iterdir()]
    # One of them was what they were listed with, and its number will be given to another.
    return frozenset(filter(is_open, listed)).difference(_STANDARD)


def let_go_of(inherited: Iterable[int]) -> None:
    """Close them, and read and write nothing but what is said on stderr."""
    for fd in inherited:
        os.close(fd)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for standard in _STANDARD[:2]:
        os.dup2(null, standard)
    os.close(null)


def is_open(fd: int) -> bool:
    """Whether there is a descriptor of that number."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
