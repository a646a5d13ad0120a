"""How much memory this process may take: in proportion to what the image really holds.

An allocation beyond that raises MemoryError, where otherwise the machine would be looking for a
process to kill. Holes count nothing: whatever a header claims, tables are what is there. And what
it does with memory that it needs no more.
"""

from __future__ import annotations

import gc
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from instarfs.errors import NotEnoughMemory
from instarfs.image.file import FileSource, Image
from instarfs.image.linux import give_back_freed_pages, keep_freed_blocks

FOR_ANY = 2 << 30
FOR_A_BYTE = 8
"""A check takes a few bytes, a repair some dozens, for each 8-byte entry of an image's tables."""

_KEPT_BYTES, _KEPT_TOGETHER = 4 << 20, 32 << 20
"""Twice as large as the arrays of a batch are (`planner.source.BATCH_BYTES`), and some of them."""

_SIZES = Path("/proc/self/statm")
_SET_ASIDE = 256 << 20
"""Address space that is no memory: what lies between stacks, and what allocators reserve."""

_NO_STACK = "can't start new thread"
"""What Python makes of a thread that there is no memory for."""


def limit(source: FileSource, *, for_good: bool = False) -> None:
    """Let this process have as much memory as anything done with the image can take.

    What whoever started it allows remains the most (`ulimit -d`, in other words RLIMIT_DATA).
    *for_good*: it cannot be lifted any more, unless by one who may lift any limit.
    """
    most = min(FOR_ANY + FOR_A_BYTE * source.stored_bytes(), (1 << 63) - 1)
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most if for_good else hard))


def limit_address_space() -> None:
    """Let this process have no more than its limit on memory beside what it has mapped by now.

    For good, and of any kind: stacks, and what nobody may touch, do not count to that limit. To be
    called when that is set and all is loaded. Nothing is done where it is not known what is mapped.
    """
    try:
        mapped = int(_SIZES.read_bytes().split()[0]) * resource.getpagesize()
    except FileNotFoundError:  # without /proc
        return
    memory, hard = (resource.getrlimit(it)[1] for it in (resource.RLIMIT_DATA, resource.RLIMIT_AS))
    most = min(mapped + memory + _SET_ASIDE, (1 << 63) - 1)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


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


@cache
def keep_freed_memory() -> None:
    """Have this process reuse the memory of freed arrays, rather than give it back each time.

    glibc returns a block over 128 KiB to the kernel as soon as it is freed, and gets the next one
    from there page by page, until a larger one was freed before (mallopt(3), M_MMAP_THRESHOLD).
    In a check that made batches of arrays, the page faults took longer than the counting. What is
    larger than the arrays of a batch goes back: among what is in use by then a heap would grow by
    a quarter.
    """
    keep_freed_blocks(_KEPT_BYTES, _KEPT_TOGETHER)


def give_back() -> None:
    """Give back what this process needs no more: for one that goes on for long.

    Errors hold on to the functions that they came out of, and to the reports and plans of those,
    until the cycles between them are found. What is free among what is in use stays the process's
    until it is asked for (malloc_trim(3)).
    """
    gc.collect()
    give_back_freed_pages()
