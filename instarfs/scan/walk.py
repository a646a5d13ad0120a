"""Which files there are below some paths: each once, by the same name to everybody who asks.

Folders are gone through by name. Links are not followed, so that no path leads out; of a file with
several names, and of what is mounted in several places, the first counts.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Protocol

from instarfs.image.mount_table import MOUNT_TABLE, mounts_in
from instarfs.scan.listing import Entry, Folder, Identity, Named, look
from instarfs.scan.values import Candidate, Skipped


class Lists(Protocol):
    """Who lists folders: `instarfs.scan.workers.Lister`."""

    def entries(self, folder: Folder) -> Iterator[Entry]:
        """What is in *folder*, by name."""


def real_roots(paths: Iterable[bytes]) -> list[bytes]:
    """The paths that somebody has named, as they really are: of those links are followed.

    What lies below another of them is met there.
    """
    real = list(dict.fromkeys(os.path.realpath(path) for path in paths))
    return [path for path in real if not (os.path.lexists(path) and _is_below(path, real))]


def _is_below(path: bytes, roots: Iterable[bytes]) -> bool:
    return any(path != root and path.startswith(root.rstrip(b"/") + b"/") for root in roots)


class Walk:
    """One walk of *roots*. It keeps the identity of folders, and of files that may be met again."""

    def __init__(self, lister: Lists, roots: Iterable[bytes]) -> None:
        self._lister = lister
        self._seen: set[Identity] = set()
        # A file that is mounted somewhere has one name more than its number of links says.
        self._keeps_all = _holds_mounts(list(roots))

    def below(self, root: bytes) -> Iterator[Candidate | Skipped]:
        """What is at *root*, or below it, that this walk has not met; and what it is not."""
        pending: list[Entry] = [look(root)]
        is_named = True
        while pending:
            entry = pending.pop()
            if isinstance(entry, Folder):
                # Its files come before what is in its folders; the order is the same every time.
                folders: list[Entry] = []
                for each in self._entries(entry):
                    if isinstance(each, Folder):
                        folders.append(each)
                    else:
                        yield self._once(each, is_named=False)
                pending += reversed(folders)
            elif isinstance(entry, Skipped) and is_named:
                yield Skipped(entry.path, entry.reason, is_failure=True)
            else:
                yield self._once(entry, is_named=is_named)
            is_named = False

    def _entries(self, folder: Folder) -> Iterator[Entry]:
        if folder.identity in self._seen:
            return
        self._seen.add(folder.identity)
        yield from self._lister.entries(folder)

    def _once(self, entry: Named | Skipped, *, is_named: bool) -> Candidate | Skipped:
        if isinstance(entry, Skipped):
            return entry
        identity = entry.file.identity
        if identity in self._seen:
            reason = "it is another name of a file that was met"
            return Skipped(entry.file.path, reason, is_failure=False)
        if is_named or entry.names > 1 or self._keeps_all:
            self._seen.add(identity)
        return entry.file


def _holds_mounts(roots: list[bytes]) -> bool:
    """Whether something is mounted below one of *roots*."""
    try:
        mounts = list(mounts_in(MOUNT_TABLE.read_bytes()))
    except OSError:
        return True
    return any(_is_below(mount.point, roots) for mount in mounts)
