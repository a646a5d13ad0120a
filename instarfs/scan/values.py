"""What a scan hands about: a file that may be an image, and what became of it. Values, no more.

They are sent from process to process, and from host to host. Paths are bytes, as Linux has them.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from planner.check.report import CheckCounters

HEADER_BYTES = 512
"""Of the beginning of an image, those that its `Row` has the hash of."""

ERROR, NOT_QCOW2, GONE = "error", "not-qcow2", "gone"
"""Verdicts that only a scan has: not checked; was a qcow2 image when last seen; is not there."""

VERDICTS = (
    ERROR,
    "unreadable",
    "incomplete",
    "torn",
    "unsettled",
    "corrupt",
    "marked-corrupt",
    NOT_QCOW2,
    "leaks",
    "dirty",
    "clean",
)
"""Worst first, as `instarfs.errors.WORST_FIRST` has their exit codes."""

PASSING = frozenset({ERROR, "torn", "unsettled"})
"""Verdicts that say more of the moment than of the image: it is looked at again every time."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """What changes when a file does.

    Not the device: of a file system on the network its number is another after each start.
    """

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, inode: int, size: int, mtime_ns: int, ctime_ns: int) -> Self:
        """Of a file, whatever times somebody gave it.

        Most file systems keep some before 1677 or after 2262, of which the nanoseconds since 1970
        take more than 64 bits: no state has room for those, and the nearest that there are do.
        """
        return cls(inode, size, _within_64_bits(mtime_ns), _within_64_bits(ctime_ns))


def _within_64_bits(number: int) -> int:
    return max(-(1 << 63), min(number, (1 << 63) - 1))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file that may be an image. ``stored``: bytes that its file system has set aside for it."""

    path: bytes
    device: int
    stamp: Stamp
    stored: int

    @property
    def identity(self) -> tuple[int, int]:
        """What no other file of this machine has: device and inode."""
        return self.device, self.stamp.inode


@dataclass(frozen=True, slots=True)
class Skipped:
    """What was not looked at, and why. ``is_failure``: there may be images that nobody saw."""

    path: bytes
    reason: str
    is_failure: bool


@dataclass(frozen=True, slots=True)
class NotImage:
    """A file that does not begin as a qcow2 image."""

    candidate: Candidate


@dataclass(frozen=True, slots=True)
class Row:
    """What is known of an image.

    ``header``: the SHA-256 of its first `HEADER_BYTES`. ``as_of``: when its bytes were what the
    verdict says, in seconds since 1970. ``seconds``, ``bytes_read``: what the check took.
    ``error``: why there is none, without the path. ``in_use``, ``confirmed``, ``in_motion``: as of
    `planner.check.report.Live`. ``lasts``: whether the verdict holds for as long as the stamp does.
    ``interrupted``: that a repair was, in a sentence.
    """

    path: bytes
    device: int
    stamp: Stamp
    header: bytes
    verdict: str
    exit_code: int
    counters: CheckCounters = field(default_factory=CheckCounters)
    as_of: float = 0.0
    seconds: float = 0.0
    bytes_read: int = 0
    in_use: bool = False
    confirmed: int = 0
    in_motion: int = 0
    error: str = ""
    lasts: bool = False
    interrupted: str = ""


@dataclass(frozen=True, slots=True)
class Run:
    """A scan that was made, or is: when, in seconds since 1970; ``ended`` None while it goes on.

    ``checked``, ``unchanged``: images that were looked at, and not again. ``skipped``: files that
    are no images, or could not be looked at. ``complete``: whether all images have a verdict.
    """

    began: float
    ended: float | None
    checked: int
    unchanged: int
    skipped: int
    bytes_read: int
    complete: bool


@dataclass(frozen=True, slots=True)
class Change:
    """That the verdict of an image is another than ``before``."""

    path: bytes
    before: str
    verdict: str


Outcome = Row | NotImage | Skipped
"""What became of a candidate."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What those that check may take, all together or each.

    ``timeout``: seconds for an image, not counting those that it waits for its turn to read.
    ``read_rate``: bytes a second, of all together; 0: as many as there are. ``memory``: bytes for
    an image; 0: as many as it may need, which grows with what is stored of it.
    """

    timeout: float
    read_rate: float = 0.0
    memory: int = 0


def failed(candidate: Candidate, reason: str, *, as_of: float, seconds: float = 0.0) -> Row:
    """The row of an image that could not be checked."""
    return Row(
        candidate.path,
        candidate.device,
        candidate.stamp,
        b"",
        ERROR,
        1,
        as_of=as_of,
        seconds=seconds,
        error=reason,
    )


# ---- shards ----


@dataclass(frozen=True, slots=True)
class Shard:
    """One of ``total`` parts that share the images among them: ``number`` counts from 0."""

    number: int = 0
    total: int = 1

    def has(self, path: bytes) -> bool:
        """Whether an image is in it: by the hash of its path, whoever asks and whenever."""
        if self.total == 1:
            return True
        digest = hashlib.sha256(path).digest()
        return int.from_bytes(digest[:8], "big") % self.total == self.number


Tell = Callable[[Row | Skipped, bool], None]
"""Told of each row as it is known, and whether it is as it was: not looked at again."""


def path_text(path: bytes) -> str:
    """*path* as Python has it: bytes that are no UTF-8 are lone surrogates."""
    return path.decode("utf-8", "surrogateescape")


def exact_path(path: bytes) -> str | None:
    """*path* in base64, where JSON would not tell it exactly."""
    try:
        path.decode("utf-8")
    except UnicodeDecodeError:
        return base64.b64encode(path).decode("ascii")
    return None
