"""How much memory this process may take: in proportion to what the image really holds.

An allocation beyond that raises MemoryError, where otherwise the machine would be looking for a
process to kill. Holes count nothing: whatever a header claims, tables are what is there.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

from instarfs.errors import NotEnoughMemory
from instarfs.image.file import FileSource, Image

FOR_ANY = 2 << 30
FOR_A_BYTE = 8
"""A check takes a few bytes, a repair some dozens, for each 8-byte entry of an image's tables."""

_NO_STACK = "can't start new thread"
"""What Python makes of a thread that there is no memory for."""


def limit(source: FileSource) -> None:
    """Let this process have as much memory as anything done with the image can take.

    What whoever started it allows remains the most (`ulimit -d`, in other words RLIMIT_DATA).
    """
    most = min(FOR_ANY + FOR_A_BYTE * source.stored_bytes(), (1 << 63) - 1)
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


@contextmanager
def limited(image: Image) -> Iterator[None]:
    """Limit it as long as the context lasts; what is refused in it raises `NotEnoughMemory`."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit(image.source())
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and str(error) != _NO_STACK:
            raise
        raise NotEnoughMemory(image.path) from error
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
