"""Holds a run to its bounds of processor time and memory; what goes over them is an exception."""

from __future__ import annotations

import resource
import time
from pathlib import Path

from tests.fuzz.targets import MEMORY, SECONDS, Target

PAGE = resource.getpagesize()


class TooSlow(AssertionError):
    """An input took more processor time than any may."""


def run(target: Target, data: bytes) -> float:
    """Run *target* on *data*: the seconds it took. Raises what it raises, and `TooSlow`.

    An allocation beyond `MEMORY` raises MemoryError.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + MEMORY, resource.RLIM_INFINITY))
    try:
        start = time.process_time()
        target.run(data)
        taken = time.process_time() - start
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if taken > SECONDS:
        raise TooSlow(f"{taken:.1f} s of processor time")
    return taken


def _data_bytes() -> int:
    """What of this process counts against RLIMIT_DATA now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5]) * PAGE
