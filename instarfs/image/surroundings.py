"""What is around an image, as a value: where files can be kept, and under which names.

Looked at in `instarfs.repair.looking`; nothing here reaches the world.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

SUFFIXES = (COPY, LOST, RAW, FOLDER) = (".copy", ".lost", ".raw", ".mnt")
"""What the names of files that may be made have after the image's: a copy of it, one of its leaked
clusters, one of the guest's disk, and a folder to mount it on.
"""

LONGEST_NAME = 255
"""Bytes of a file name, in all file systems that matter here."""


@dataclass(frozen=True, slots=True)
class Gone:
    """That the path of an image, which is open, names nothing any more.

    ``is_deleted``: nor does any other path. ``descriptor``: what the file can be copied from.
    """

    is_deleted: bool
    descriptor: str


class Room(Enum):
    """Whether files can be kept beside the image, and why not."""

    BESIDE = auto()
    DEVICE = auto()
    """The image is a device: what lies beside it is in memory."""
    READ_ONLY = auto()
    """Nobody, or not this user, can make files in its folder."""
    FULL = auto()
    """There is no space for a copy of it, or no more files can be made."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What is around an image.

    ``taken``: of the names that a file of it could have, those that something has already, as far
    as they were looked at. ``keeps_undo``: whether it has an undo file where nobody says one;
    ``undo_elsewhere``: where else, always the same. ``is_writable``: whether it can be repaired
    where it is; ``can_mount``: and be mounted by who looks.
    """

    room: Room = Room.BESIDE
    taken: frozenset[str] = frozenset()
    keeps_undo: bool = True
    undo_elsewhere: str = ""
    is_writable: bool = True
    can_mount: bool = True

    def is_taken(self, image: str, suffix: str) -> bool:
        """Whether the first choice of a name is taken."""
        return next(candidates(Path(image).name, suffix)) in self.taken

    def path(self, image: str, suffix: str) -> str:
        """A path for a file of *image*: beside it, or else in the folder that somebody works in."""
        names = candidates(Path(image).name, suffix)
        name = next(name for name in names if name not in self.taken)
        return str(Path(image).parent / name) if self.room is Room.BESIDE else f"./{name}"


def candidates(name: str, suffix: str) -> Iterator[str]:
    """Names for a file of the image called *name*, the first that is free to be taken."""
    raw = os.fsencode(name)
    for number in itertools.count(1):
        ending = os.fsencode(suffix if number == 1 else f"{suffix}-{number}")
        yield os.fsdecode(raw[: LONGEST_NAME - len(ending)] + ending)
