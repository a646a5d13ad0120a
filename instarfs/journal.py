"""The undo file: what a repair changes, durable before its first write, and how far it came.

Its layout is declared here and only here, and here it is read and written; the image is not. Its
state says what may be believed of the image:

    applying   anything between before and after: a repair, or its undoing, was interrupted
    applied    what the repair leaves
    undone     what it was before

While a repair is under way the undo file of the one before is kept aside, and comes back if the
new repair does not stand: there is always one way back, that of the last repair.
"""

from __future__ import annotations

import errno
import hashlib
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Self

import numpy as np
from construct import Array, Bytes, Container, Int32ul, Int64ul, Struct

from instarfs.errors import (
    NO_SPACE,
    UndoFileDamaged,
    UndoFileFailed,
    UndoFileImpossible,
    UndoFileNoSpace,
    reason_of,
)
from instarfs.names import Opening
from instarfs.undo_place import UndoPlace
from planner.plan import ID_LENGTH, Plan, RepairTier, Stage, StageKind
from planner.report import CheckCounters
from planner.source import SECTOR

MAX_BYTES = 8 << 30
"""No undo file is larger: such a one is neither written nor read."""

MAGIC, VERSION = b"instarfs-undo\0", b"\x01\0"
DIGEST_LENGTH = 32
TIER_LENGTH = 8

MAX_FILE = (1 << 63) - 1

# Integers are little-endian. The file is a header with its digest, in one sector; two slots for the
# state, each a sector; and for each stage, in order, three columns: sector numbers (int64), the
# sectors before, the sectors after.
HEADER = Struct(
    "magic" / Bytes(len(MAGIC)),
    "version" / Bytes(len(VERSION)),
    "tier" / Bytes(TIER_LENGTH),
    "plan_id" / Bytes(ID_LENGTH),
    "size_before" / Int64ul,
    "size_after" / Int64ul,
    "device" / Int64ul,
    "inode" / Int64ul,
    "head" / Bytes(DIGEST_LENGTH),
    "counters" / Array(len(fields(CheckCounters)), Int64ul),
    "sectors" / Array(len(StageKind), Int64ul),
    "body_digest" / Bytes(DIGEST_LENGTH),
)
SLOT = Struct("sequence" / Int64ul, "state" / Int32ul, "trimmed" / Int64ul)
SUM = Int32ul

# The slots are written in turn: one that a crash tears has the wrong sum, and the other holds.
SLOTS = 2
SLOTS_AT, BODY_AT = SECTOR, SECTOR * (1 + SLOTS)


class State(IntEnum):
    """How far a repair came."""

    APPLYING = 1
    APPLIED = 2
    UNDONE = 3


NEXT = {
    State.APPLYING: (State.APPLIED, State.UNDONE),
    State.APPLIED: (State.APPLYING,),
    State.UNDONE: (),
}
"""Which state follows which. Undoing, too, is `APPLYING` until it is done."""


@dataclass(frozen=True, slots=True)
class StateWord:
    """What changes in an undo file. ``trimmed``: bytes of free clusters punched since."""

    state: State = State.APPLYING
    trimmed: int = 0
    sequence: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """What never changes in an undo file.

    ``head``: `digest_of` the image's first sector before the repair. ``counters``: of the check
    before it; QEMU's, for their meaning outlives a version of this program. ``device``, ``inode``:
    of the image then; a hint, for images move.
    """

    plan: Plan
    head: bytes
    counters: CheckCounters
    device: int = 0
    inode: int = 0


@dataclass(frozen=True, slots=True)
class Summary:
    """What an undo file says of itself before its sectors are read."""

    tier: RepairTier
    plan_id: str
    status: StateWord


# ---- bytes ----


def digest_of(*parts: bytes | memoryview) -> bytes:
    """SHA-256 of the parts, one after the other."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.digest()


def encode(record: Record, status: StateWord) -> list[bytes | memoryview]:
    """An undo file, in pieces."""
    plan = record.plan
    body = list(_columns(plan))
    lengths = {stage.kind: len(stage.sectors) for stage in plan.stages}
    header: bytes = HEADER.build(
        {
            "magic": MAGIC,
            "version": VERSION,
            "tier": plan.tier.encode().ljust(TIER_LENGTH, b"\0"),
            "plan_id": plan.id.encode(),
            "size_before": plan.size_before,
            "size_after": plan.size_after,
            "device": record.device,
            "inode": record.inode,
            "head": record.head,
            "counters": [getattr(record.counters, each.name) for each in fields(CheckCounters)],
            "sectors": [lengths.get(kind, 0) for kind in StageKind],
            "body_digest": digest_of(*body),
        }
    )
    header += digest_of(header)
    return [header.ljust(SECTOR, b"\0"), encode_slot(status) * SLOTS, *body]


def encode_slot(status: StateWord) -> bytes:
    """The state as it stands in a slot."""
    content: bytes = SLOT.build(
        {"sequence": status.sequence, "state": status.state, "trimmed": status.trimmed}
    )
    content += SUM.build(zlib.crc32(content))
    return content.ljust(SECTOR, b"\0")


def decode(raw: bytes, name: str) -> tuple[Record, StateWord]:
    """The inverse of `encode`. Any bytes give this or `UndoFileDamaged`, with *name*."""
    header, summary = _decode_header(raw, name), decode_summary(raw, name)
    body = memoryview(raw)[BODY_AT:]
    if len(body) != sum(header["sectors"]) * (8 + 2 * SECTOR):
        raise UndoFileDamaged(name, "the undo file is cut off")
    if digest_of(body) != header["body_digest"]:
        raise UndoFileDamaged(name, "the undo file is damaged: its checksum is wrong")
    stages = tuple(_stages(body, header["sectors"]))
    plan = Plan(summary.tier, stages, header["size_before"], header["size_after"])
    if plan.id != summary.plan_id or not _is_possible(plan):
        raise UndoFileDamaged(name, "the undo file contradicts itself")
    record = Record(
        plan,
        header["head"],
        CheckCounters(*header["counters"]),
        header["device"],
        header["inode"],
    )
    return record, summary.status


def decode_summary(raw: bytes, name: str) -> Summary:
    """What the first `BODY_AT` bytes say. Raises `UndoFileDamaged`, with *name*."""
    header = _decode_header(raw, name)
    try:
        tier = RepairTier(header["tier"].rstrip(b"\0").decode("ascii"))
        plan_id = header["plan_id"].decode("ascii")
    except ValueError as error:
        raise UndoFileDamaged(name, "the undo file contradicts itself") from error
    return Summary(tier, plan_id, _decode_status(raw, name))


def _columns(plan: Plan) -> Iterator[memoryview]:
    for stage in plan.stages:
        for column in (stage.sectors.astype("<i8"), stage.before, stage.after):
            yield np.ascontiguousarray(column).reshape(-1).view(np.uint8).data


def _decode_header(raw: bytes, name: str) -> Container:
    if raw[: len(MAGIC)] != MAGIC:
        raise UndoFileDamaged(name, "this is no undo file")
    if raw[len(MAGIC) : len(MAGIC + VERSION)] not in (VERSION, b""):
        raise UndoFileDamaged(name, "another version of instarfs wrote this undo file")
    if len(raw) < BODY_AT:
        raise UndoFileDamaged(name, "the undo file is cut off")
    end = HEADER.sizeof()
    if raw[end : end + DIGEST_LENGTH] != digest_of(raw[:end]):
        raise UndoFileDamaged(name, "the undo file is damaged: the checksum of its header is wrong")
    return HEADER.parse(raw)


def _decode_status(raw: bytes, name: str) -> StateWord:
    """The later of the slots that are whole."""
    found = []
    for at in range(SLOTS_AT, BODY_AT, SECTOR):
        content = raw[at : at + SLOT.sizeof()]
        slot = SLOT.parse(content)
        known = slot["state"] in tuple(State)
        if known and SUM.parse(raw[at + SLOT.sizeof() :]) == zlib.crc32(content):
            found.append(StateWord(State(slot["state"]), slot["trimmed"], slot["sequence"]))
    if not found:
        raise UndoFileDamaged(name, "the undo file is damaged: how far the repair came is lost")
    return max(found, key=lambda status: status.sequence)


def _stages(body: memoryview, lengths: list[int]) -> Iterator[Stage]:
    at = 0
    for kind, length in zip(StageKind, lengths, strict=True):
        if length:
            sectors = np.frombuffer(body, "<i8", length, at).astype(np.int64)
            at += length * 8
            rows = np.frombuffer(body, np.uint8, 2 * length * SECTOR, at).reshape(2, length, SECTOR)
            at += rows.size
            yield Stage(kind, sectors, rows[0], rows[1])


def _is_possible(plan: Plan) -> bool:
    """Whether every stage lies in the file, its sectors ascending."""
    size = max(plan.size_before, plan.size_after)
    return size <= MAX_FILE and all(
        stage.sectors[0] >= 0
        and int(stage.sectors[-1]) * SECTOR < size
        and bool((np.diff(stage.sectors) > 0).all())
        for stage in plan.stages
    )


# ---- the file ----


class Journal:
    """An undo file, open. What fails raises `UndoFileFailed`, but for `create` and `open`."""

    def __init__(self, place: UndoPlace, fd: int, record: Record, status: StateWord) -> None:
        """Takes *fd* over."""
        self._place, self._fd = place, fd
        self._status = status
        self.record = record

    @classmethod
    def create(cls, place: UndoPlace, record: Record) -> Self:
        """Write the undo file of a repair that is about to begin; durable on return.

        Raises `UndoFileImpossible`, and the image has the undo file that it had before.
        """
        status = StateWord()
        try:
            fd = place.make()
            try:
                _write_new(fd, encode(record, status))
                place.put_in_place()
            except BaseException:
                os.close(fd)
                with suppress(OSError):
                    place.discard_new()
                raise
        except OSError as error:
            kind = UndoFileNoSpace if error.errno in NO_SPACE else UndoFileImpossible
            raise kind(place.file, reason_of(error)) from error
        return cls(place, fd, record, status)

    @classmethod
    def open(cls, place: UndoPlace) -> Self | None:
        """The undo file that is there, for writing; None where none is.

        Finishes what a crash cut short of `settle` and `remove`. Raises `UndoFileDamaged` for one
        that cannot be used, and `UndoFileFailed`.
        """
        with _explained(place):
            place.restore_old()
            journal = cls._load(place)
            if journal is not None and place.has_old():
                journal = cls._finish(place, journal)
        return journal

    @classmethod
    def _load(cls, place: UndoPlace) -> Self | None:
        fd = place.open(Opening.UNDO_TO_WRITE)
        if fd is None:
            return None
        try:
            record, status = decode(_read(fd, place.file), place.file)
        except BaseException:
            os.close(fd)
            raise
        return cls(place, fd, record, status)

    @classmethod
    def _finish(cls, place: UndoPlace, journal: Self) -> Self | None:
        """Of two undo files the one that counts, the only one then; *journal* is the later one,
        and closed unless it is returned.
        """
        try:
            match journal.status.state:
                case State.APPLYING:
                    return journal
                case State.APPLIED:
                    journal.settle()
                    return journal
                case State.UNDONE:
                    journal.remove()
        except UndoFileFailed:
            journal.close()
            raise
        journal.close()
        return cls._load(place)

    @property
    def plan(self) -> Plan:
        """What the repair does."""
        return self.record.plan

    @property
    def status(self) -> StateWord:
        """The state that is durable."""
        return self._status

    @property
    def file(self) -> str:
        """The undo file's path."""
        return self._place.file

    def advance(self, state: State) -> None:
        """Enter *state*; durable on return."""
        if state not in NEXT[self._status.state]:
            raise ValueError(f"{self._status.state.name} is not followed by {state.name}")
        self._set(replace(self._status, state=state))

    def note_trim(self, length: int) -> None:
        """*length* bytes of free clusters are about to be punched; durable on return."""
        self._set(replace(self._status, trimmed=self._status.trimmed + length))

    def settle(self) -> None:
        """The repair stands: the undo file of the one before is of no use any more."""
        with _explained(self._place):
            self._place.drop_old()

    def remove(self) -> None:
        """The repair does not stand: its undo file goes, and the one that was kept comes back."""
        with _explained(self._place):
            self._place.drop_current()

    def close(self) -> None:
        os.close(self._fd)

    def _set(self, status: StateWord) -> None:
        status = replace(status, sequence=status.sequence + 1)
        at = SLOTS_AT + status.sequence % SLOTS * SECTOR
        with _explained(self._place):
            _write(self._fd, encode_slot(status), at)
            os.fsync(self._fd)
        self._status = status


def read_summary(place: UndoPlace) -> Summary | None:
    """What the undo file says of itself; None where there is none. Changes nothing.

    Raises `UndoFileDamaged`.
    """
    fd = place.open(Opening.UNDO)
    if fd is None:
        return None
    try:
        return decode_summary(os.pread(fd, BODY_AT, 0), place.file)
    except OSError as error:
        problem = f"the undo file cannot be read: {reason_of(error)}"
        raise UndoFileDamaged(place.file, problem) from error
    finally:
        os.close(fd)


@contextmanager
def _explained(place: UndoPlace) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UndoFileFailed(place.file, reason_of(error)) from error


def _read(fd: int, name: str) -> bytes:
    try:
        length = os.fstat(fd).st_size
        if length > MAX_BYTES:
            raise UndoFileDamaged(name, f"this is no undo file: it has {length} bytes")
        with os.fdopen(os.dup(fd), "rb", buffering=0) as file:
            return file.readall()
    except OSError as error:
        raise UndoFileDamaged(name, f"the undo file cannot be read: {reason_of(error)}") from error


def _write_new(fd: int, parts: list[bytes | memoryview]) -> None:
    """Fill a new file; durable on return."""
    if sum(map(len, parts)) > MAX_BYTES:
        raise OSError(errno.EFBIG, f"it would have more than {MAX_BYTES} bytes")
    offset = 0
    for part in parts:
        _write(fd, part, offset)
        offset += len(part)
    os.fsync(fd)


def _write(fd: int, data: bytes | memoryview, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(fd, rest, offset)
        offset, rest = offset + written, rest[written:]
