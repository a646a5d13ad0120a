"""What is kept of a rescue's scans in a file, from one run to the next: `rescue --state FILE`.

The one module that knows its layout: a mark, a digest of all that follows, the length of a head in
JSON, the head, and the columns that it names, 64-bit little-endian numbers. It belongs to one image
as it was at one time, and to one version of this program. What it says is not believed beyond that
it shows where to look: see `planner.rescue.scanned`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import time
from dataclasses import dataclass
from importlib.metadata import version
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from instarfs.errors import RescueStateFailed, reason_of
from instarfs.image.directory import MODE, kept_readable
from instarfs.image.file import Generation
from instarfs.text import json_bytes
from planner.rescue.scanned import Scanned, Section

MARK = b"instarfs rescue 1\n"
MAX_BYTES, MAX_HEAD, MAX_SECTIONS = 1 << 30, 1 << 20, 256
SAVED_EVERY = 15.0
"""Seconds after which, at least, a scan that is killed goes on from."""

_NEW = ".instarfs-new"
_DIGEST = hashlib.sha256().digest_size
_COLUMNS = ("again", "ends", "filled")


@dataclass(slots=True)
class RescueState:
    """The state of the rescues of one image, at ``path``. Use `RescueState.open`."""

    path: str
    scanned: Scanned
    _identity: list[object]
    _saved: float

    @classmethod
    def open(cls, path: str, generation: Generation) -> RescueState:
        """That at *path*, of the image of that *generation*; a new one where nothing is there.

        Raises `RescueStateFailed` where something else is.
        """
        identity: list[object] = [
            version("instarfs"),
            generation.device,
            generation.inode,
            generation.size,
            generation.mtime_ns,
        ]
        state = cls(path, Scanned(_read(path, identity)), identity, time.monotonic())
        state.scanned.note = state.note
        return state

    def note(self) -> None:
        """Save it, if it was not saved for some time."""
        if time.monotonic() - self._saved >= SAVED_EVERY:
            self.save()

    def save(self) -> None:
        """Have what is known by now at its path, or leave what is there. Raises
        `RescueStateFailed`.
        """
        sections = self.scanned.gathered()
        columns = [getattr(each, name) for each in sections.values() for name in _COLUMNS]
        head = json_bytes(
            {
                "image": self._identity,
                "scans": [
                    [name, each.done, *(len(getattr(each, column)) for column in _COLUMNS)]
                    for name, each in sections.items()
                ],
            }
        )
        parts = [len(head).to_bytes(8, "little"), head]
        parts += [column.astype("<i8").tobytes() for column in columns]
        digest = hashlib.sha256(b"".join(parts)).digest()
        new = self.path + _NEW
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(kept_readable(os.open(new, flags, MODE)), "wb") as file:
                file.writelines([MARK, digest, *parts])
                file.flush()
                os.fsync(file.fileno())
            Path(new).replace(self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                Path(new).unlink()
            raise RescueStateFailed(self.path, reason_of(error)) from error
        self._saved = time.monotonic()


def _read(path: str, identity: list[object]) -> dict[str, Section]:
    try:
        raw = _content(path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise RescueStateFailed(path, reason_of(error)) from error
    if raw is None or not raw.startswith(MARK):
        raise RescueStateFailed(path, "it is none")
    try:
        of, sections = _decode(raw[len(MARK) :])
    except (ValueError, TypeError, RecursionError, KeyError) as error:
        raise RescueStateFailed(path, "it is damaged") from error
    if of[:1] != identity[:1]:
        raise RescueStateFailed(path, "it is of another version of instarfs")
    if of[1:3] != identity[1:3]:
        raise RescueStateFailed(path, "it is of another image")
    if of != identity:
        raise RescueStateFailed(path, "the image was written to since")
    return sections


def _content(path: str) -> bytes | None:
    """All of the file; None where it is no file, or too large for a state."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            return None
        return file.read(MAX_BYTES)


def _decode(raw: bytes) -> tuple[list[object], dict[str, Section]]:
    """Of which image it is, and its sections. Raises `ValueError`, `TypeError`, `KeyError`."""
    digest, rest = raw[:_DIGEST], raw[_DIGEST:]
    if hashlib.sha256(rest).digest() != digest:
        raise ValueError
    length = int.from_bytes(rest[:8], "little")
    if length > MAX_HEAD:
        raise ValueError
    head = json.loads(rest[8 : 8 + length])
    scans = {str(name): [_number(each) for each in numbers] for name, *numbers in head["scans"]}
    if len(scans) > MAX_SECTIONS or any(len(each) != 1 + len(_COLUMNS) for each in scans.values()):
        raise ValueError
    ends = list(accumulate((n for _, *counts in scans.values() for n in counts), initial=0))
    columns = rest[8 + length :]
    if len(columns) != ends[-1] * 8:
        raise ValueError
    words = np.frombuffer(columns, dtype="<i8").astype(np.int64)
    parts = iter([words[low:high] for low, high in pairwise(ends)])
    sections = {
        name: Section(done, *(next(parts) for _ in _COLUMNS)) for name, (done, *_) in scans.items()
    }
    return list(head["image"]), sections


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError
    return value
