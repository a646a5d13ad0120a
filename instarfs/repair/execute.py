"""The one writer: nothing else in the project changes an image that exists.

A plan is written stage by stage with a flush after each, its sectors and no others, and is put
back where that fails. What to write is the planner's decision; when, and under which locks and
with which journal, that of `instarfs.repair.run`.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from instarfs.errors import (
    DOMAIN_ERRORS,
    NO_SPACE,
    ImageChanged,
    ImageReadFailed,
    InstarfsError,
    PutBackFailed,
    PutBackNoSpace,
    RepairCancelled,
    RepairNoSpace,
    RepairUnproven,
    RepairWriteFailed,
    TrimCancelled,
    TrimFailed,
    TrimUnsupported,
    UndoFileFailed,
    reason_of,
)
from instarfs.image.linux import punch_hole
from planner.arrays import I64, U8, Mask, distinct
from planner.errors import Cancelled
from planner.progress import Meter, Progress, tell_nobody
from planner.repair.draft import equal_rows
from planner.repair.plan import COMPARED_SECTORS, Plan, Stage, StageKind
from planner.source import SECTOR, Source, read_tables

MAX_WRITE_SECTORS = (1 << 20) // SECTOR
"""One write at most: between two of them a repair can be cancelled."""


class Device(Protocol):
    """What is written to. Everything that fails raises `OSError`."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def size(self) -> int:
        """Length in bytes, as it is now."""

    def pread(self, offset: int, length: int) -> bytes:
        """*length* bytes, or fewer at the end."""

    def pwrite(self, offset: int, data: memoryview) -> None:
        """Write all of *data*."""

    def flush(self) -> None:
        """Return once everything written so far, and the size, outlive a power failure."""

    def truncate(self, size: int) -> None:
        """Cut off, or grow with zeros."""

    def punch_hole(self, offset: int, length: int) -> None:
        """Make the range read as zeros and give its disk space back; the size stays."""


class FileDevice:
    """A file or block device open for writing. The descriptor stays its opener's."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self._resized = False
        self.name = name

    @property
    def size(self) -> int:
        return os.lseek(self._fd, 0, os.SEEK_END)

    @property
    def _is_block(self) -> bool:
        return stat.S_ISBLK(os.fstat(self._fd).st_mode)

    def pread(self, offset: int, length: int) -> bytes:
        parts = []
        while length and (part := os.pread(self._fd, length, offset)):
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return b"".join(parts)

    def pwrite(self, offset: int, data: memoryview) -> None:
        while data:
            written = os.pwrite(self._fd, data, offset)
            if not written:
                raise OSError(errno.EIO, "nothing was written")
            offset, data = offset + written, data[written:]

    def flush(self) -> None:
        if self._resized:
            os.fsync(self._fd)
            self._resized = False
        else:
            os.fdatasync(self._fd)

    def truncate(self, size: int) -> None:
        if self._is_block:
            raise OSError(errno.ENOSPC, "a block device does not change its size")
        self._resized = True
        os.ftruncate(self._fd, size)

    def punch_hole(self, offset: int, length: int) -> None:
        if self._is_block:
            raise OSError(errno.EOPNOTSUPP, "it is a block device; use blkdiscard on a copy")
        punch_hole(self._fd, offset, length)


class DeviceSource:
    """A device as a `planner.source.Source`. Raises `ImageReadFailed`."""

    def __init__(self, device: Device) -> None:
        self._device = device

    @property
    def size(self) -> int:
        try:
            return self._device.size
        except OSError as error:
            raise ImageReadFailed(self._device.name, 0, reason_of(error)) from error

    def read_into(self, offset: int, buffer: memoryview) -> None:
        view = buffer.cast("B")
        try:
            part = self._device.pread(offset, len(view))
        except OSError as error:
            raise ImageReadFailed(self._device.name, offset, reason_of(error)) from error
        view[: len(part)] = part
        view[len(part) :] = bytes(len(view) - len(part))

    def data_extents(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        end = min(offset + length, self.size)
        return [(offset, end)] if offset < end else []


# ---- writing a plan ----


def execute(
    device: Device,
    plan: Plan,
    *,
    progress: Progress = tell_nobody,
) -> None:
    """Write *plan*; when this returns it is durable.

    A plan that changes nothing touches nothing. *progress*: sectors written. Raises `ImageChanged`
    before the first write where the device does not hold what the plan starts from; after it, with
    everything put back and flushed, `RepairWriteFailed`, `RepairNoSpace` or `RepairCancelled`, or
    what *progress* raised. Raises `PutBackFailed` where not even that was possible.
    """
    if plan.changes_nothing:
        return
    require_start(device, plan)
    steps = _steps(plan)
    writer = _Writer(device, plan, progress)
    begun = 0
    try:
        for step in steps:
            begun += 1
            writer.carry_out(step)
    except BaseException as error:
        _put_back_steps(device, plan, steps[:begun], error)
        if isinstance(error, OSError) and error is not writer.outside:
            raise _write_error(device.name, error) from error
        raise


def require_start(device: Device, plan: Plan) -> None:
    """Raise `ImageChanged` unless the device holds what *plan* starts from, and is as long."""
    source = DeviceSource(device)
    if (size := source.size) != plan.size_before:
        raise ImageChanged(device.name, f"it has {size} bytes, not {plan.size_before}")
    changed = [sectors[~_hold(source, sectors, before)] for sectors, before in _starts(plan)]
    if any(map(len, changed)):
        raise ImageChanged(device.name, _not_expected(np.concatenate(changed)))


def holds_start(source: Source, plan: Plan) -> bool:
    """Whether *source* is what *plan* starts from, as far as its sectors tell."""
    return source.size == plan.size_before and all(
        bool(_hold(source, sectors, before).all()) for sectors, before in _starts(plan)
    )


def put_back(device: Device, plan: Plan, cause: BaseException) -> None:
    """Undo all of *plan*, which this process has written, because of *cause*; durable on return.

    Whatever the disk has made of it since is overwritten. Raises `PutBackFailed`.
    """
    _put_back_steps(device, plan, _steps(plan), cause)


def take_back(device: Device, plan: Plan) -> None:
    """Take *plan* back, whichever part of it a crash has left on the device; durable on return.

    Only what the plan has written is written. Raises `ImageChanged`, with nothing written, where
    a sector holds what no moment of the plan leaves there: then somebody else wrote to it since;
    and `PutBackFailed` where writing fails.
    """
    require_remnant(device, plan)
    try:
        _undo_steps(device, plan, _steps(plan), _is_written)
    except OSError as error:
        raise _put_back_error(device.name, "a crash", error) from error


def require_remnant(device: Device, plan: Plan) -> None:
    """Raise `ImageChanged` unless the device is what a crash at some moment of *plan* leaves."""
    source = DeviceSource(device)
    if (size := source.size) not in (plan.size_before, plan.size_after):
        raise ImageChanged(
            device.name, f"it has {size} bytes, neither {plan.size_before} nor {plan.size_after}"
        )
    sectors = distinct(np.concatenate([_NO_SECTORS, *(stage.sectors for stage in plan.stages)]))
    known = np.zeros(len(sectors), dtype=np.bool_)
    for mine, before in _starts(plan):
        known[np.searchsorted(sectors, mine)] = _hold(source, mine, before)
    for stage in plan.stages:
        at = np.searchsorted(sectors, stage.sectors)
        known[at] |= _hold(source, stage.sectors, stage.after)
    if not known.all():
        raise ImageChanged(device.name, _not_expected(sectors[~known]))


@dataclass(frozen=True, slots=True)
class _Resize:
    """The moment at which the file's length changes."""

    before: int
    after: int


_Step = Stage | _Resize
_Choose = Callable[[Device, Stage], Mask]


def _steps(plan: Plan) -> list[_Step]:
    """The stages, and the change of length where the guard covers it: after it when the file
    grows, before it is taken away when a repair is undone.
    """
    steps: list[_Step] = list(plan.stages)
    if plan.size_after == plan.size_before:
        return steps
    resize = _Resize(plan.size_before, plan.size_after)
    kinds = [stage.kind for stage in plan.stages]
    if plan.size_after > plan.size_before:
        at = 1 if kinds[:1] == [StageKind.GUARD] else 0
    else:
        at = len(kinds) - 1 if kinds[-1:] == [StageKind.GUARD] else len(kinds)
    steps.insert(at, resize)
    return steps


class _Writer:
    """Writes the steps of one plan, in order. ``outside``: what its progress failed by."""

    def __init__(self, device: Device, plan: Plan, progress: Progress) -> None:
        self._device, self._plan = device, plan
        total = sum(len(stage.sectors) for stage in plan.stages)
        self._meter = Meter(progress, "writing", total)
        self.outside: OSError | None = None

    def carry_out(self, step: _Step) -> None:
        self._pause(0)
        if isinstance(step, _Resize):
            self._device.truncate(step.after)
        else:
            # What the plan cuts off in the end is not worth the space that writing it may take.
            end = np.searchsorted(step.sectors, -(-self._plan.size_after // SECTOR))
            for count in _write_sectors(self._device, step.sectors[:end], step.after[:end]):
                self._pause(count)
        self._device.flush()

    def _pause(self, count: int) -> None:
        try:
            self._meter.advance(count)
        except Cancelled:
            raise RepairCancelled(self._device.name) from None
        except OSError as error:
            self.outside = error
            raise


def _put_back_steps(
    device: Device, plan: Plan, steps: Sequence[_Step], cause: BaseException
) -> None:
    try:
        _undo_steps(device, plan, steps, _differs_from_before)
    except OSError as error:
        raise _put_back_error(device.name, _why(cause), error) from cause


# Of these the sentence says that all was put back.
_CAUSES = {
    RepairCancelled: "it was cancelled",
    RepairUnproven: "the image was not what had been proven",
    MemoryError: "too little memory",
}


def _why(cause: BaseException) -> str:
    """What a repair ended by, in a few words."""
    if isinstance(cause, OSError):
        return reason_of(cause)
    if isinstance(cause, UndoFileFailed):
        return f"its undo file: {cause.reason}"
    if isinstance(cause, tuple(_CAUSES)):
        return next(words for kind, words in _CAUSES.items() if isinstance(cause, kind))
    if isinstance(cause, DOMAIN_ERRORS):
        return str(cause)
    return type(cause).__name__ if isinstance(cause, Exception) else "a signal"


def _undo_steps(device: Device, plan: Plan, steps: Sequence[_Step], choose: _Choose) -> None:
    """Undo *steps*, the last first, each flushed before the one before it.

    Writes of each stage only the sectors that *choose* names: a disk that is full may have no room
    for the others, where it has a hole.
    """
    for step in reversed(steps):
        if isinstance(step, _Resize):
            if device.size != step.before:
                device.truncate(step.before)
                device.flush()
            continue
        chosen = choose(device, step) & (step.sectors * SECTOR < plan.size_before)
        if chosen.any():
            for _ in _write_sectors(device, step.sectors[chosen], step.before[chosen]):
                pass
            device.flush()


def _differs_from_before(device: Device, stage: Stage) -> Mask:
    """Which sectors of a stage that was begun must be put back."""
    try:
        return ~_hold(DeviceSource(device), stage.sectors, stage.before)
    except ImageReadFailed:
        return np.ones(len(stage.sectors), dtype=np.bool_)


def _is_written(device: Device, stage: Stage) -> Mask:
    """Which sectors of a stage that may have been begun are as it leaves them."""
    return _hold(DeviceSource(device), stage.sectors, stage.after)


# ---- giving space back ----


def punch(
    device: Device,
    runs: Iterable[tuple[int, int]],
    total: int,
    *,
    progress: Progress = tell_nobody,
) -> None:
    """Punch the *runs* (offset, length), *total* bytes of them, and flush.

    *progress*: bytes punched. Raises `TrimUnsupported` where nothing can be punched, `TrimFailed`,
    and `TrimCancelled`, which leaves the rest as it is.
    """
    done = 0
    for offset, length in runs:
        try:
            progress("trimming", done, total)
        except Cancelled:
            raise TrimCancelled(device.name) from None
        with _explained(device):
            device.punch_hole(offset, length)
        done += length
    with _explained(device):
        device.flush()
    with suppress(Cancelled):  # it is done
        progress("trimming", done, total)


@contextmanager
def _explained(device: Device) -> Iterator[None]:
    """Raise what punching a hole in *device* fails by as an error that says so."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise TrimUnsupported(device.name, reason_of(error)) from error
        raise TrimFailed(device.name, reason_of(error)) from error


# ---- sectors ----


_NO_SECTORS: I64 = np.zeros(0, dtype=np.int64)


def _starts(plan: Plan) -> Iterator[tuple[I64, U8]]:
    """Every sector of the plan, once, and what it holds before the first stage; some at a time."""
    seen = _NO_SECTORS
    for stage in plan.stages:
        new = np.flatnonzero(~np.isin(stage.sectors, seen))
        for start in range(0, len(new), COMPARED_SECTORS):
            part = new[start : start + COMPARED_SECTORS]
            yield stage.sectors[part], stage.before[part]
        seen = np.concatenate((seen, stage.sectors))


def _hold(source: Source, sectors: I64, rows: U8) -> Mask:
    """Which *sectors* of the source, ascending, hold these *rows*."""
    hold: Mask = np.empty(len(sectors), dtype=np.bool_)
    for start in range(0, len(sectors), COMPARED_SECTORS):
        part = slice(start, start + COMPARED_SECTORS)
        visible = _visible(rows[part], sectors[part], source.size)
        hold[part] = equal_rows(_read(source, sectors[part]), visible)
    return hold


def _read(source: Source, sectors: I64) -> U8:
    rows = np.empty((len(sectors), SECTOR), dtype=np.uint8)
    for part, found in read_tables(source, sectors * SECTOR, SECTOR):
        rows[part] = found
    return rows


def _write_sectors(device: Device, sectors: I64, rows: U8) -> Iterator[int]:
    """Write each run of adjacent sectors in one piece; yields how many sectors a write had.

    Never past the end of the device: a last sector that is cut off is written cut off.
    """
    size = device.size
    rows = np.ascontiguousarray(rows)
    breaks = np.flatnonzero(np.diff(sectors) != 1) + 1
    bounds = [0, *breaks.tolist(), len(sectors)] if len(sectors) else [0]
    for start, end in itertools.pairwise(bounds):
        for low in range(start, end, MAX_WRITE_SECTORS):
            high = min(end, low + MAX_WRITE_SECTORS)
            offset = int(sectors[low]) * SECTOR
            data = rows[low:high].reshape(-1).data[: max(0, size - offset)]
            if data:
                device.pwrite(offset, data)
            yield high - low


def _visible(rows: U8, sectors: I64, size: int) -> U8:
    """The rows as they read in a file of *size* bytes: zeros past its end."""
    if not len(sectors) or (int(sectors[-1]) + 1) * SECTOR <= size:
        return rows
    rows = rows.copy()
    rows[sectors * SECTOR >= size] = 0
    rows[sectors == size // SECTOR, size % SECTOR :] = 0
    return rows


# ---- errors ----


def _not_expected(sectors: I64) -> str:
    more = f" (and {len(sectors) - 1} more)" if len(sectors) > 1 else ""
    return f"the sector at offset {int(sectors[0]) * SECTOR}{more} was changed by somebody else"


def _put_back_error(path: str, reason: str, error: OSError) -> PutBackFailed:
    kind = PutBackNoSpace if error.errno in NO_SPACE else PutBackFailed
    return kind(path, reason, reason_of(error))


def _write_error(path: str, error: OSError) -> InstarfsError:
    kind = RepairNoSpace if error.errno in NO_SPACE else RepairWriteFailed
    return kind(path, reason_of(error))
