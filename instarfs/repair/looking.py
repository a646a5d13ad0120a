"""Looking around an image: where files of it can be kept, and which names are free.

Only looks, through the directory as it was opened; what is made of it is
`instarfs.image.surroundings`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from instarfs.image.directory import SUFFIX, exists
from instarfs.image.file import Image
from instarfs.image.surroundings import LONGEST_NAME, RAW, SUFFIXES, Room, Surroundings, candidates
from instarfs.repair.undo_place import UndoPlace

FUSE = "/dev/fuse"

FILES = 16
"""So many can be made where there is room beside an image: a copy, an undo file, what is lost."""
UNDO_BYTES = 256 << 10
"""What an undo file takes, mostly."""


def look_around(image: Image) -> Surroundings:
    """What is around *image*."""
    room = _room(image)
    taken: frozenset[str] = frozenset()
    if room is Room.BESIDE:
        taken = frozenset(name for suffix in SUFFIXES for name in _taken(image, suffix))
    keeps_undo = image.undo is not None or _keeps_undo(image, room)
    elsewhere = Path(image.path).parent if room is Room.BESIDE else "."
    return Surroundings(
        room,
        taken,
        keeps_undo=keeps_undo,
        undo_elsewhere="" if keeps_undo else f"{elsewhere}/{next(candidates(image.name, SUFFIX))}",
        is_writable=_may_write(image, f"/proc/self/fd/{image.fileno()}"),
        can_mount=os.access(FUSE, os.R_OK | os.W_OK),
    )


def _room(image: Image) -> Room:
    if image.is_device:
        return Room.DEVICE
    if not _may_write(image, "."):
        return Room.READ_ONLY
    return Room.BESIDE if _has_room(image, image.allocated_size(), FILES) else Room.FULL


def _has_room(image: Image, size: int, files: int) -> bool:
    """Whether *files* of *size* bytes altogether can be beside it, as far as is told."""
    try:
        there = os.fstatvfs(image.directory)
    except OSError:
        return True
    # Where none are counted, as in btrfs, their number has no end.
    has_files = not there.f_files or there.f_favail >= files
    return has_files and there.f_bavail * there.f_frsize >= size


def _may_write(image: Image, name: str) -> bool:
    """Whether *name*, as seen from the image's directory, may be written to, as far as is told."""
    if os.access(name, os.W_OK, dir_fd=image.directory):
        return True
    # A daemon has given up what root may; its broker has not.
    return os.geteuid() == 0 and not _is_read_only(image)


def _is_read_only(image: Image) -> bool:
    try:
        return bool(os.fstatvfs(image.directory).f_flag & os.ST_RDONLY)
    except OSError:
        return False


def _keeps_undo(image: Image, room: Room) -> bool:
    """Whether an undo file can be beside the image."""
    if room not in (Room.BESIDE, Room.FULL) or not _fits(image.name + SUFFIX):
        return False
    try:
        with UndoPlace.beside(image) as place:
            if place.is_taken():
                return True
            return not place.other_names() and _has_room(image, UNDO_BYTES, 1)
    except OSError:
        return False


def _fits(name: str) -> bool:
    return len(os.fsencode(name)) <= LONGEST_NAME


def _taken(image: Image, suffix: str) -> Iterator[str]:
    """Names that something has, up to the first that nothing has."""
    for name in candidates(image.name, suffix):
        lists = name + ".map" if suffix == RAW else name
        if not exists(image.directory, name) and not exists(image.directory, lists):
            return
        yield name
