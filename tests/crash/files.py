"""What a power cut can leave of an image and its undo file together: both recorded, both replayed.

Of each file a disk keeps what was flushed, and of what was written since any sectors; which file
comes first nobody promises. A name is there, or gone, for sure once its directory was flushed.
Nothing here judges what is left.
"""

from __future__ import annotations

import itertools
import os
import random
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from planner.source import SECTOR

Files = dict[str, bytes]
"""What there is, by name."""

Piece = tuple[int, bytes] | int
"""A sector that is written: where, and what. Or the length that a file is cut or grown to."""

VARIANTS = 6
"""Random choices of what arrived, for each moment; besides nothing, everything, and one file."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that was done to ``name``: ``pieces`` of it, its coming or going, or a flush."""

    name: str
    pieces: tuple[Piece, ...] = ()
    is_there: bool | None = None
    is_flush: bool = False


@dataclass
class Recorder:
    """Records what this process does to files in *directory*, in ``log``."""

    directory: Path
    log: list[Event] = field(default_factory=list)

    def __enter__(self) -> Recorder:
        self._patches = mock.patch.multiple(
            os,
            open=self._wrap(os.open, self._opened),
            unlink=self._wrap(os.unlink, self._unlinked),
            pwrite=self._wrap(os.pwrite, self._written),
            ftruncate=self._wrap(os.ftruncate, self._truncated),
            fsync=self._wrap(os.fsync, self._flushed),
            fdatasync=self._wrap(os.fdatasync, self._flushed),
        )
        self._patches.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.stop()

    def _wrap(
        self, function: Callable[..., object], note: Callable[..., Event | None]
    ) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            result = function(*args, **kwargs)
            event = note(*args)
            self.log += [event] if event else []
            return result

        return call

    def _name(self, fd: int) -> str:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        return path.name if path.parent == self.directory else ""

    def _opened(self, name: str, flags: int, *_: object) -> Event | None:
        return Event(str(name), is_there=True) if flags & os.O_CREAT else None

    def _unlinked(self, name: str) -> Event:
        return Event(name, is_there=False)

    def _written(self, fd: int, data: bytes, offset: int) -> Event:
        raw = bytes(data)
        ends = range(offset - offset % SECTOR + SECTOR, offset + len(raw), SECTOR)
        bounds = [offset, *ends, offset + len(raw)]
        pieces = tuple(
            (low, raw[low - offset : high - offset]) for low, high in itertools.pairwise(bounds)
        )
        return Event(self._name(fd), pieces)

    def _truncated(self, fd: int, size: int) -> Event:
        return Event(self._name(fd), (size,))

    def _flushed(self, fd: int) -> Event:
        is_directory = stat.S_ISDIR(os.fstat(fd).st_mode)
        return Event("" if is_directory else self._name(fd), is_flush=True)


@dataclass
class _Disk:
    """``there``: names that are sure; ``coming``: what was done to names since, in order."""

    content: dict[str, bytearray]
    there: set[str]
    pending: dict[str, list[Piece]] = field(default_factory=dict)
    coming: list[Event] = field(default_factory=list)

    def happen(self, event: Event) -> None:
        if event.is_there is not None:
            self.coming.append(event)
            if event.is_there:
                self.content[event.name], self.pending[event.name] = bytearray(), []
        elif not event.is_flush:
            self.pending.setdefault(event.name, []).extend(event.pieces)
        elif event.name:
            for piece in self.pending.pop(event.name, []):
                _apply(self.content[event.name], piece)
        else:
            self.there = self._names(len(self.coming))
            self.coming.clear()

    def _names(self, count: int) -> set[str]:
        names = set(self.there)
        for event in self.coming[:count]:
            names = names | {event.name} if event.is_there else names - {event.name}
        return names

    def left(self, choose: Callable[[str], bool], names: int) -> Files:
        """What is left where each piece of a file arrived that *choose* says."""
        files = {}
        for name in self._names(names):
            content = bytearray(self.content[name])
            for piece in self.pending.get(name, []):
                if choose(name):
                    _apply(content, piece)
            files[name] = bytes(content)
        return files


def _apply(content: bytearray, piece: Piece) -> None:
    if isinstance(piece, int):
        del content[piece:]
        content += bytes(max(0, piece - len(content)))
        return
    offset, data = piece
    content += bytes(max(0, offset - len(content)))
    content[offset : offset + len(data)] = data


def power_cuts(before: Files, log: list[Event], rng: random.Random) -> Iterator[tuple[int, Files]]:
    """(how many events there were, what is left) for every moment; each once."""
    disk = _Disk({name: bytearray(content) for name, content in before.items()}, set(before))
    seen: set[tuple[tuple[str, bytes], ...]] = set()
    for number in range(len(log) + 1):
        if number:
            disk.happen(log[number - 1])
        for choose, names in _choices(disk, rng):
            files = disk.left(choose, names)
            key = tuple(sorted(files.items()))
            if key not in seen:
                seen.add(key)
                yield number, files


def _choices(disk: _Disk, rng: random.Random) -> Iterator[tuple[Callable[[str], bool], int]]:
    everything = len(disk.coming)
    choices: list[Callable[[str], bool]] = [lambda _name: False, lambda _name: True]
    choices += [lambda name, only=only: name == only for only in disk.content]  # type: ignore[misc]
    choices += [lambda _name: rng.random() < 0.5] * (VARIANTS if disk.pending else 0)
    for choose in choices:
        for names in {0, everything}:
            yield choose, names
