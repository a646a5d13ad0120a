"""What becomes of one candidate, in a process that may be killed meanwhile.

It is opened to see how it begins, and checked as `instarfs check -U` does: nobody is kept out, so
that a virtual machine can start whenever it wants to. No other file is opened.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from dataclasses import replace

from instarfs.errors import DOMAIN_ERRORS, reason_of
from instarfs.image import locks
from instarfs.image.file import Image
from instarfs.image.opening import opened
from instarfs.repair.checking import Checked, LiveCheck, run_check
from instarfs.scan.pace import Pace
from instarfs.scan.values import (
    HEADER_BYTES,
    PASSING,
    Candidate,
    NotImage,
    Outcome,
    Row,
    Skipped,
    Stamp,
    failed,
    path_text,
)
from planner.check.check import check_image
from planner.qcow2.header import MAGIC

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

_MAGIC = MAGIC.to_bytes(4, "big")

_VANISHED = "it is not there any more"
_ANOTHER = "another file has taken its place"


def examine(candidate: Candidate, pace: Pace) -> Outcome:
    """What *candidate* is, and if it is an image, the row of its check."""
    began, as_of, read_before = time.monotonic(), time.time(), pace.bytes_read
    try:
        start = _start_of(candidate)
        if not start.startswith(_MAGIC):
            return NotImage(candidate)
        row = _check(candidate, start, pace)
    except FileNotFoundError:
        return Skipped(candidate.path, _VANISHED, is_failure=False)
    except DOMAIN_ERRORS as error:
        row = failed(candidate, _without_path(candidate, str(error)), as_of=as_of)
    except OSError as error:
        row = failed(candidate, reason_of(error), as_of=as_of)
    except Exception as error:  # noqa: BLE001 - a bug, or no memory: the others are checked
        row = failed(candidate, f"the check failed: {type(error).__name__}: {error}", as_of=as_of)
    taken = time.monotonic() - began
    return replace(row, seconds=taken, bytes_read=pace.bytes_read - read_before)


def _start_of(candidate: Candidate) -> bytes:
    """How it begins. Raises OSError."""
    fd = os.open(candidate.path, _FLAGS)
    try:
        status = os.fstat(fd)
        if not stat.S_ISBLK(status.st_mode):
            _require_same(candidate, status)
        return os.pread(fd, HEADER_BYTES, 0)
    finally:
        os.close(fd)


def _require_same(candidate: Candidate, status: os.stat_result) -> None:
    """What was found is what is looked at: no link can lead to anything else by now."""
    if (status.st_dev, status.st_ino) != candidate.identity:
        raise OSError(0, _ANOTHER)


def _check(candidate: Candidate, start: bytes, pace: Pace) -> Row:
    with opened(path_text(candidate.path), access=locks.FORCE_SHARE) as image:
        _require_same(candidate, os.fstat(image.fileno()))
        image.meter = pace.took
        as_of, now_ns = time.time(), time.time_ns()
        checked = run_check(image, check_image, live=LiveCheck())
        return _row(candidate, start, checked, as_of, now_ns)


def _row(candidate: Candidate, start: bytes, checked: Checked, as_of: float, now_ns: int) -> Row:
    report, before, left_over = checked.report, checked.before, checked.pending
    verdict, live = report.verdict, report.live
    if live is not None and live.as_of is not None:
        as_of = live.as_of
    return Row(
        candidate.path,
        candidate.device,
        Stamp.of(candidate.stamp.inode, before.size, before.mtime_ns, before.ctime_ns),
        hashlib.sha256(start).digest(),
        verdict,
        report.exit_code,
        counters=report.counters,
        as_of=as_of,
        in_use=report.in_use,
        confirmed=live.confirmed if live is not None else 0,
        in_motion=live.in_motion if live is not None else 0,
        error=str(report.error) if report.error is not None else "",
        # A write after this moment gives another stamp, and one before it is in the verdict. That
        # an interrupted repair was taken back may leave no trace in the image.
        lasts=verdict not in PASSING
        and _tells(checked.image)
        and before.is_settled(now_ns)
        and left_over is None,
        interrupted=left_over.sentence if left_over is not None else "",
    )


def _tells(image: Image) -> bool:
    """Whether its times tell of what is written: those of a device do not."""
    return not image.is_device


def _without_path(candidate: Candidate, sentence: str) -> str:
    return sentence.removeprefix(f"{path_text(candidate.path)}: ")
