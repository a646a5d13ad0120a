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
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from instarfs.errors import RescueStateFailed, reason_of
from instarfs.image.directory import MODE, kept_readable
from instarfs.image.file import Generation
from instarfs.text import json_bytes
from planner.arrays import I64
from planner.rescue.scanned import Scanned, Section

if TYPE_CHECKING:
    from hashlib import _Hash as Digest

MARK = b"instarfs rescue 1\n"
MAX_HEAD, MAX_SECTIONS = 1 << 20, 256
SAVED_EVERY = 15.0
"""Seconds after which, at least, a scan that is killed goes on from."""

_NEW = ".instarfs-new"
_DIGEST = hashlib.sha256().digest_size
_COLUMNS = ("again", "ends", "filled")
_ASCENDING = ("again", "ends")
_WORDS_A_TIME = 1 << 16


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
        with _opened(path) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode) or file.read(len(MARK)) != MARK:
                raise RescueStateFailed(path, "it is none")
            of, sections = _decode(file)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise RescueStateFailed(path, reason_of(error)) from error
    except (ValueError, TypeError, RecursionError, KeyError) as error:
        raise RescueStateFailed(path, "it is damaged") from error
    if of[:1] != identity[:1]:
        raise RescueStateFailed(path, "it is of another version of instarfs")
    if of[1:3] != identity[1:3]:
        raise RescueStateFailed(path, "it is of another image")
    if of != identity:
        raise RescueStateFailed(path, "the image was written to since")
    return sections


def _opened(path: str) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


def _decode(file: BinaryIO) -> tuple[list[object], dict[str, Section]]:
    """Of which image it is, and its sections, from behind the mark on.

    Whatever it claims, no more is held than half as much again as is there of it: it is refused
    at the first hole in place of what ascends. Raises `ValueError`, `TypeError`, `KeyError`,
    `OSError`.
    """
    digest, length = _exactly(file, _DIGEST), _exactly(file, 8)
    whole = hashlib.sha256(length)
    if int.from_bytes(length, "little") > MAX_HEAD:
        raise ValueError
    raw = _exactly(file, int.from_bytes(length, "little"))
    whole.update(raw)
    head = json.loads(raw)
    scans = {str(name): [_number(each) for each in numbers] for name, *numbers in head["scans"]}
    if len(scans) > MAX_SECTIONS or any(len(each) != 1 + len(_COLUMNS) for each in scans.values()):
        raise ValueError
    if any(ends != filled for _, _, ends, filled in scans.values()):
        raise ValueError
    if os.fstat(file.fileno()).st_size != file.tell() + 8 * sum(
        count for _, *counts in scans.values() for count in counts
    ):
        raise ValueError
    sections = {
        name: Section(
            done,
            *(
                _column(file, count, whole, ascends=column in _ASCENDING)
                for column, count in zip(_COLUMNS, counts, strict=True)
            ),
        )
        for name, (done, *counts) in scans.items()
    }
    if whole.digest() != digest:
        raise ValueError
    return list(head["image"]), sections


def _column(file: BinaryIO, count: int, whole: Digest, *, ascends: bool) -> I64:
    parts, last = [np.zeros(0, dtype=np.int64)], -1
    for at in range(0, count, _WORDS_A_TIME):
        raw = _exactly(file, 8 * min(_WORDS_A_TIME, count - at))
        whole.update(raw)
        words = np.frombuffer(raw, dtype="<i8").astype(np.int64)
        if ascends and not (words[0] > last and bool((words[1:] > words[:-1]).all())):
            raise ValueError
        last = int(words[-1])
        parts.append(words)
    return np.concatenate(parts)


def _exactly(file: BinaryIO, length: int) -> bytes:
    raw = file.read(length)
    if len(raw) != length:
        raise ValueError
    return raw


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError
    return value
