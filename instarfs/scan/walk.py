"""Which files there are below some paths: each once, by the same name to everybody who asks.

Folders are gone through by name. Links are not followed, so that no path leads out; of a file with
several names, and of what is mounted in several places, the first counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from instarfs.image.mount_table import MOUNT_TABLE, mounts_in
from instarfs.scan.listing import Entry, Folder, Identity, Named
from instarfs.scan.values import Candidate, Skipped


class Lists(Protocol):
    """Who asks the file systems: `instarfs.scan.workers.Lister`. One that hangs holds nobody up."""

    def real(self, path: bytes) -> bytes:
        """*path* without links."""

    def is_there(self, path: bytes) -> bool:
        """Whether anything stands at *path*."""

    def look(self, path: bytes) -> Entry:
        """What stands at *path*."""

    def entries(self, folder: Folder) -> Iterator[Identity | Entry]:
        """Which folder it is, and what is in it by name; or what was skipped."""


def real_roots(lister: Lists, paths: Iterable[bytes]) -> list[bytes]:
    """The paths that somebody has named, as they really are: of those links are followed.

    What lies below another of them is met there.
    """
    real = list(dict.fromkeys(map(lister.real, paths)))
    return [path for path in real if not (_is_below(path, real) and lister.is_there(path))]


def _is_below(path: bytes, roots: Iterable[bytes]) -> bool:
    return any(path != root and path.startswith(root.rstrip(b"/") + b"/") for root in roots)


class Walk:
    """One walk of *roots*. It keeps the identity of folders, and of files that may be met again."""

    def __init__(self, lister: Lists, roots: Sequence[bytes]) -> None:
        self._lister = lister
        self._seen: set[Identity] = set()
        # A file that is mounted somewhere has one name more than its number of links says.
        self._keeps_all = _holds_mounts(roots)

    def below(self, root: bytes) -> Iterator[Candidate | Skipped]:
        """What is at *root*, or below it, that this walk has not met; and what it is not."""
        pending: list[Entry] = [self._lister.look(root)]
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
        for each in self._lister.entries(folder):
            if not isinstance(each, tuple):
                yield each
            elif each in self._seen:
                return
            else:
                self._seen.add(each)

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


def _holds_mounts(roots: Sequence[bytes]) -> bool:
    """Whether something is mounted below one of *roots*."""
    try:
        mounts = list(mounts_in(MOUNT_TABLE.read_bytes()))
    except OSError:
        return True
    return any(_is_below(mount.point, roots) for mount in mounts)
