"""The undo file: what repairs changed, durable before they write, and how far the last one came.

It is a stack. Each repair that stands adds a record of what it changed; the newest is taken back
first, and with it its record goes. Its layout is declared here and only here, and here it is read
and written; the image is not. Which record is on top, and what may be believed of the image, says
one word, and writing that word is all that commits anything:

    empty      nothing can be taken back
    applying   anything between before and after the repair on top: it, or its undoing, was
               interrupted
    applied    what the repair on top leaves
    sealed     what a repair leaves of which there is no record: those below cannot be taken back
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Self

import numpy as np
from construct import Array, Bytes, Container, Int32ul, Int64sl, Int64ul, Struct

from instarfs.errors import (
    NO_SPACE,
    UndoFileDamaged,
    UndoFileFailed,
    UndoFileFull,
    UndoFileImpossible,
    UndoFileNoSpace,
    reason_of,
)
from instarfs.image.directory import Opening
from instarfs.image.file import close_all
from instarfs.repair.undo_place import Identity, UndoPlace
from planner.check.report import CheckCounters
from planner.repair.plan import (
    ID_LENGTH,
    Plan,
    PlanTier,
    RepairTier,
    RescueTier,
    Stage,
    StageKind,
    tier_of,
)
from planner.source import SECTOR

log = logging.getLogger(__name__)

MAX_BYTES = 8 << 30
"""No record is larger: such a one is neither written nor read."""

MAGIC, VERSION = b"instarfs-undo\0", b"\x03\0"
RECORD_MAGIC = b"repair\0\0"
DIGEST_LENGTH = 32
TIER_LENGTH = 16

MAX_FILE = (1 << 63) - 1

# Integers are little-endian. A sector with the magic; two slots for the word, each a sector; then
# the records. A record is a header with its digest, in one sector, and for each stage, in order,
# three columns: sector numbers (int64), the sectors before, the sectors after; zeros fill its last
# sector. What lies behind the record on top is what a crash left, or a record that has gone.
WORD = Struct(
    "sequence" / Int64ul,
    "state" / Int32ul,
    "depth" / Int32ul,
    "top" / Int64ul,
    "end" / Int64ul,
    "trimmed" / Int64ul,
    "mtime_ns" / Int64sl,
)
HEADER = Struct(
    "magic" / Bytes(len(RECORD_MAGIC)),
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
    "below" / WORD,
)
SUM = Int32ul

# Both slots hold the word; they are written in turn, so that a crash tears one at most, and a
# sector that goes bad later takes one of two.
SLOTS = 2
SLOTS_AT, BODY_AT = SECTOR, SECTOR * (1 + SLOTS)

_PLAN_ID = re.compile(rb"[0-9a-f]{%d}" % ID_LENGTH)

Read = Callable[[int, int], bytes]
"""(offset, length) of an undo file: as many bytes of that as there are. Raises `OSError`."""


class State(IntEnum):
    """What may be believed of the image."""

    EMPTY = 0
    APPLYING = 1
    APPLIED = 2
    SEALED = 3


NEXT = {
    State.EMPTY: (State.APPLYING, State.SEALED),
    State.APPLYING: (State.APPLIED, State.SEALED, State.EMPTY),
    State.APPLIED: (State.APPLYING, State.SEALED, State.EMPTY),
    State.SEALED: (State.APPLYING, State.APPLIED),
}
"""Which state follows which. Undoing, too, is `APPLYING` until the record is gone; then the one
below it counts."""


@dataclass(frozen=True, slots=True)
class StateWord:
    """What changes in an undo file.

    ``depth``: how many repairs can be taken back one after the other; records that no longer
    fitted when the one on top was made are not among them. ``top``, ``end``: where in
    the file the newest record begins and ends. ``trimmed``: bytes of free clusters punched since
    that repair. ``mtime_ns``: of the image when it was left so; 0 where others may have written to
    it since.
    """

    state: State = State.EMPTY
    depth: int = 0
    top: int = 0
    end: int = BODY_AT
    trimmed: int = 0
    mtime_ns: int = 0
    sequence: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """One repair: what never changes in an undo file.

    ``head``: `digest_of` the image's first sector before the repair. ``counters``: of the check
    before it, or after it where there was no header before; QEMU's, for their meaning outlives a
    version of this program. ``identity``: of the
    image then; images move.
    """

    plan: Plan
    head: bytes
    counters: CheckCounters
    identity: Identity


@dataclass(frozen=True, slots=True)
class Summary:
    """What an undo file says of the repair on top before its sectors are read."""

    tier: PlanTier
    plan_id: str
    status: StateWord
    stale_count: int = 0
    """Of the repairs below, those that no longer fitted when it was made."""


# ---- bytes ----


def digest_of(*parts: bytes | memoryview) -> bytes:
    """SHA-256 of the parts, one after the other."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.digest()


def encode_front(status: StateWord) -> bytes:
    """What stands before the records."""
    return (MAGIC + VERSION).ljust(SECTOR, b"\0") + encode_slot(status) * SLOTS


def encode_slot(status: StateWord) -> bytes:
    """The word as it stands in a slot."""
    content: bytes = WORD.build(_word_fields(status))
    content += SUM.build(zlib.crc32(content))
    return content.ljust(SECTOR, b"\0")


def encode_record(record: Record, below: StateWord) -> list[bytes | memoryview]:
    """A record, in pieces, whole sectors together. *below*: what counts when it has gone."""
    plan = record.plan
    body = list(_columns(plan))
    lengths = {stage.kind: len(stage.sectors) for stage in plan.stages}
    header: bytes = HEADER.build(
        {
            "magic": RECORD_MAGIC,
            "tier": plan.tier.encode().ljust(TIER_LENGTH, b"\0"),
            "plan_id": plan.id.encode(),
            "size_before": plan.size_before,
            "size_after": plan.size_after,
            "device": record.identity.device,
            "inode": record.identity.inode,
            "head": record.head,
            "counters": [getattr(record.counters, each.name) for each in fields(CheckCounters)],
            "sectors": [lengths.get(kind, 0) for kind in StageKind],
            "body_digest": digest_of(*body),
            "below": _word_fields(below),
        }
    )
    header += digest_of(header)
    padding = bytes(-sum(map(len, body)) % SECTOR)
    return [header.ljust(SECTOR, b"\0"), *body, padding]


def decode_word(raw: bytes, size: int, name: str) -> StateWord:
    """The word in the first `BODY_AT` bytes of an undo file of *size*.

    Any bytes give this or `UndoFileDamaged`, with *name*.
    """
    if size <= BODY_AT and size % SECTOR == 0 and _is_begun(raw):
        return StateWord()
    if raw[: len(MAGIC)] != MAGIC:
        raise UndoFileDamaged(name, "this is no undo file")
    if raw[len(MAGIC) : len(MAGIC + VERSION)] not in (VERSION, b""):
        raise UndoFileDamaged(name, "another version of instarfs wrote this undo file")
    if len(raw) < BODY_AT:
        raise UndoFileDamaged(name, "the undo file is cut off")
    status = _decode_slots(raw, name)
    if status.end > size:
        raise UndoFileDamaged(name, "the undo file is cut off")
    return status


def decode_summary(read: Read, size: int, name: str) -> tuple[Summary, Identity] | None:
    """What the front and the header of the newest record say; None where there is no record.

    Raises `UndoFileDamaged`, with *name*, and what *read* does.
    """
    status = decode_word(read(0, BODY_AT), size, name)
    if status.state is State.EMPTY:
        return None
    header = _decode_header(read(status.top, SECTOR), status, name)
    return _summary(header, status), Identity(header["device"], header["inode"])


def decode_record(read: Read, status: StateWord, name: str) -> tuple[Record, StateWord]:
    """The record on top by *status*, and the word that counts when it has gone.

    Raises `UndoFileDamaged`, with *name*, and what *read* does.
    """
    header = _decode_header(read(status.top, SECTOR), status, name)
    summary = _summary(header, status)
    length = sum(header["sectors"]) * (8 + 2 * SECTOR)
    start = status.top + SECTOR
    if length > MAX_BYTES or start + length + -length % SECTOR != status.end:
        raise UndoFileDamaged(name, "the undo file contradicts itself")
    _require_sectors(read, start, header, name)
    body = memoryview(read(start, length))
    if len(body) != length:
        raise UndoFileDamaged(name, "the undo file is cut off")
    if digest_of(body) != header["body_digest"]:
        raise UndoFileDamaged(name, "the undo file is damaged: its checksum is wrong")
    stages = tuple(_stages(body, header["sectors"]))
    plan = Plan(summary.tier, stages, header["size_before"], header["size_after"])
    if plan.id != summary.plan_id:
        raise UndoFileDamaged(name, "the undo file contradicts itself")
    identity = Identity(header["device"], header["inode"])
    record = Record(plan, header["head"], CheckCounters(*header["counters"]), identity)
    return record, _below(header, status, name)


def _word_fields(status: StateWord) -> dict[str, int]:
    return {each.name: getattr(status, each.name) for each in fields(status)}


def _columns(plan: Plan) -> Iterator[memoryview]:
    for stage in plan.stages:
        for column in (stage.sectors.astype("<i8"), stage.before, stage.after):
            yield np.ascontiguousarray(column).reshape(-1).view(np.uint8).data


def _is_begun(raw: bytes) -> bool:
    """Whether *raw* is what a crash leaves of an undo file in which there never was a record."""
    whole = encode_front(StateWord())
    parts = ((raw[at : at + SECTOR], whole[at : at + SECTOR]) for at in range(0, BODY_AT, SECTOR))
    return all(not any(part) or part == full for part, full in parts)


def _decode_slots(raw: bytes, name: str) -> StateWord:
    """The later of the slots that are whole."""
    found = []
    for at in range(SLOTS_AT, BODY_AT, SECTOR):
        content = raw[at : at + WORD.sizeof()]
        if SUM.parse(raw[at + WORD.sizeof() :]) == zlib.crc32(content):
            status = _status_of(WORD.parse(content))
            found += [status] if status is not None else []
    if not found:
        raise UndoFileDamaged(name, "the undo file is damaged: how far the repair came is lost")
    return max(found, key=lambda status: status.sequence)


def _status_of(word: Container) -> StateWord | None:
    """None for what no undo file holds."""
    if word["state"] not in tuple(State):
        return None
    names = [each.name for each in fields(StateWord) if each.name != "state"]
    status = StateWord(state=State(word["state"]), **{name: word[name] for name in names})
    if status.state is State.EMPTY:
        return status if (status.depth, status.top, status.end) == (0, 0, BODY_AT) else None
    is_aligned = status.top % SECTOR == 0 and status.end % SECTOR == 0
    is_deep = (status.depth > 0) == (status.state is not State.SEALED)
    return status if is_aligned and is_deep and BODY_AT <= status.top < status.end else None


def _decode_header(raw: bytes, status: StateWord, name: str) -> Container:
    end = HEADER.sizeof()
    if raw[: len(RECORD_MAGIC)] != RECORD_MAGIC or len(raw) < SECTOR:
        raise UndoFileDamaged(name, "the undo file is damaged: the record on top is not there")
    if raw[end : end + DIGEST_LENGTH] != digest_of(raw[:end]):
        raise UndoFileDamaged(name, "the undo file is damaged: the checksum of its header is wrong")
    header = HEADER.parse(raw)
    is_known = header["tier"].rstrip(b"\0") in {
        tier.encode() for tier in (*RepairTier, *RescueTier)
    }
    if not is_known or not _PLAN_ID.fullmatch(header["plan_id"]):
        raise UndoFileDamaged(name, "the undo file contradicts itself")
    _below(header, status, name)
    return header


def _below(header: Container, status: StateWord, name: str) -> StateWord:
    """What counts once the record is gone: what counted before it came."""
    below = _status_of(header["below"])
    if below is None or below.end != status.top or below.state is State.APPLYING:
        raise UndoFileDamaged(name, "the undo file contradicts itself")
    return below


def _summary(header: Container, status: StateWord) -> Summary:
    tier = tier_of(header["tier"].rstrip(b"\0").decode("ascii"))
    stale = _stale_count(status.depth, header["below"]["depth"])
    return Summary(tier, header["plan_id"].decode("ascii"), status, stale)


def _stale_count(depth: int, below: int) -> int:
    return below if depth == 1 else 0


def _stages(body: memoryview, lengths: list[int]) -> Iterator[Stage]:
    at = 0
    for kind, length in zip(StageKind, lengths, strict=True):
        if length:
            sectors = np.frombuffer(body, "<i8", length, at).astype(np.int64)
            at += length * 8
            rows = np.frombuffer(body, np.uint8, 2 * length * SECTOR, at).reshape(2, length, SECTOR)
            at += rows.size
            yield Stage(kind, sectors, rows[0], rows[1])


def _require_sectors(read: Read, start: int, header: Container, name: str) -> None:
    """Read only the sector numbers of the record whose body begins at *start*: every stage lies in
    the file, its sectors ascending. Holes that are claimed to be gigabytes of a body do not.

    Raises `UndoFileDamaged`, with *name*, and what *read* does.
    """
    size = max(header["size_before"], header["size_after"])
    if size > MAX_FILE:
        raise UndoFileDamaged(name, "the undo file contradicts itself")
    for length in header["sectors"]:
        last = -1
        for at in range(0, length, _SECTORS_A_TIME):
            count = min(_SECTORS_A_TIME, length - at)
            raw = read(start + 8 * at, 8 * count)
            if len(raw) != 8 * count:
                raise UndoFileDamaged(name, "the undo file is cut off")
            sectors = np.frombuffer(raw, "<i8")
            is_ascending = sectors[0] > last and bool((sectors[1:] > sectors[:-1]).all())
            last = int(sectors[-1])
            if not is_ascending or last * SECTOR >= size:
                raise UndoFileDamaged(name, "the undo file contradicts itself")
        start += length * (8 + 2 * SECTOR)


_SECTORS_A_TIME = 1 << 16


# ---- the file ----


class Journal:
    """An undo file, open for writing. What fails raises `UndoFileFailed`, but for `open`, `make`
    and `begin`.

    ``record``: the repair on top; None where there is none that could be taken back.
    """

    def __init__(self, place: UndoPlace, fd: int, status: StateWord) -> None:
        """Takes *fd* over. Raises `UndoFileDamaged`."""
        self._place, self._fd = place, fd
        self._status = status
        self._under_seal: StateWord | None = None
        self.record, self._below = self._load()
        if self.record is not None:
            place.require_own(self.record.identity)

    @classmethod
    def open(cls, place: UndoPlace) -> Self | None:
        """The undo file that is there; None where none is.

        Cuts off what a crash left behind its last record. Raises `UndoFileDamaged` for one that
        cannot be used.
        """
        fd = place.open(Opening.UNDO_TO_WRITE)
        if fd is None:
            return None
        try:
            with _readable(place):
                size = os.fstat(fd).st_size
                status = decode_word(_read_all(fd, 0, BODY_AT), size, place.file)
            journal = cls(place, fd, status)
        except BaseException:
            close_all(fd)
            raise
        if size > status.end:
            journal._cut_off()
        return journal

    @classmethod
    def make(cls, place: UndoPlace) -> Self:
        """A new one, of which the name is durable on return. Raises `UndoFileImpossible`."""
        with _possible(place):
            fd = place.make()
            try:
                _write(fd, encode_front(StateWord()), 0)
                os.fsync(fd)
                place.sync()
            except BaseException:
                close_all(fd)
                with suppress(OSError):
                    place.remove()
                raise
        return cls(place, fd, StateWord())

    @property
    def top(self) -> Record:
        """The repair on top. Only where there is one."""
        if self.record is None:
            raise ValueError("no record is on top")
        return self.record

    @property
    def plan(self) -> Plan:
        """What the repair on top did. Only where there is one."""
        return self.top.plan

    @property
    def status(self) -> StateWord:
        """The word that is durable."""
        return self._status

    @property
    def below(self) -> StateWord:
        """The word that counts when the record on top has gone."""
        return self._below

    @property
    def stale_count(self) -> int:
        """How many records are kept below that no longer fitted when the one on top was made."""
        return _stale_count(self._status.depth, self._below.depth) if self.record else 0

    @property
    def file(self) -> str:
        """The undo file's path."""
        return self._place.file

    def begin(self, record: Record, *, is_touched: bool = False, fits: bool = True) -> None:
        """Put the record of a repair that is about to begin on top; durable on return.

        *is_touched*: others may have written to the image since the one below; *fits*: whether that
        one could be taken back all the same. Raises
        `UndoFileImpossible`, and nothing has changed.
        """
        below = replace(self._status, mtime_ns=0) if is_touched else self._status
        depth = 1 + (below.depth if fits else 0)
        with _possible(self._place):
            try:
                end = self._append(encode_record(record, below))
            except BaseException:
                self._cut_off()
                raise
            try:
                self._write_word(StateWord(State.APPLYING, depth, below.end, end, sequence=0))
            except BaseException:
                with suppress(OSError):
                    self._write_word(below)  # or the next one finds a repair that had not begun
                    self._cut_off()
                raise
        self.record, self._below = record, below

    def _append(self, pieces: list[bytes | memoryview]) -> int:
        """Write a record behind the one on top, durable; where it ends."""
        offset = self._status.end
        if sum(map(len, pieces)) > MAX_BYTES:
            raise OSError(errno.EFBIG, f"it would have more than {MAX_BYTES} bytes")
        if self._status.state is State.EMPTY:
            _write(self._fd, encode_front(self._status), 0)
        for piece in pieces:
            _write(self._fd, piece, offset)
            offset += len(piece)
        os.fsync(self._fd)
        return offset

    def advance(self, state: State, mtime_ns: int = 0) -> None:
        """Enter *state*; durable on return. *mtime_ns*: of the image as it is now."""
        status = replace(self._status, state=state)
        self._set(status if state is State.APPLYING else replace(status, mtime_ns=mtime_ns))

    def drop(self, mtime_ns: int = 0) -> None:
        """The repair on top has been taken back: its record goes, and the one below counts.

        That one is read where somebody asks for it: see `load_next`.
        """
        if self.record is None:
            raise ValueError("no record is on top")
        trimmed = self._below.trimmed + self._status.trimmed if self._below.depth else 0
        self._set(replace(self._below, trimmed=trimmed, mtime_ns=mtime_ns))
        self._cut_off()
        self.record = None

    def load_next(self) -> None:
        """Read the record on top, after `drop`. Raises `UndoFileDamaged`."""
        self.record, self._below = self._load()

    def forget(self) -> None:
        """The repair on top stands, and nobody is to take it back, nor those below then."""
        below = self._below
        if below.state is not State.EMPTY:
            below = replace(below, state=State.SEALED, depth=0)
        self._set(below)
        self._cut_off()
        self.record = None

    def seal(self) -> None:
        """A repair is about to begin of which there will be no record."""
        self._under_seal = self._status
        if self._status.state is State.APPLIED:
            self._set(replace(self._status, state=State.SEALED, depth=0))

    def unseal(self) -> None:
        """Nothing came of that repair."""
        if self._under_seal not in (None, self._status):
            self._set(replace(self._under_seal))

    def note_trim(self, length: int, mtime_ns: int = 0) -> None:
        """*length* bytes of free clusters more are gone, or less; durable on return."""
        trimmed = self._status.trimmed + length
        self._set(replace(self._status, trimmed=trimmed, mtime_ns=mtime_ns))

    def walk(self) -> Iterator[tuple[Record, StateWord]]:
        """The records that can be taken back one after the other, the newest first, each with the
        word that counts while it is on top. Raises `UndoFileDamaged`.
        """
        status, left = self._status, self._status.depth
        while left and status.depth:
            with _readable(self._place):
                record, below = decode_record(self._read, status, self._place.file)
            yield record, status
            status, left = below, left - 1

    def close(self) -> None:
        """One that holds nothing is removed."""
        close_all(self._fd)
        if self._status.state is State.EMPTY:
            with suppress(OSError):
                self._place.remove()

    def _load(self) -> tuple[Record | None, StateWord]:
        """The record on top, and the word that counts when it has gone."""
        if not self._status.depth:
            return None, StateWord()
        with _readable(self._place):
            return decode_record(self._read, self._status, self._place.file)

    def _read(self, offset: int, length: int) -> bytes:
        return _read_all(self._fd, offset, length)

    def _set(self, status: StateWord) -> None:
        now = self._status.state
        if status.state not in (now, *NEXT[now]):
            raise ValueError(f"{now.name} is not followed by {status.state.name}")
        with _explained(self._place):
            self._write_word(status)

    def _write_word(self, status: StateWord) -> None:
        """Into one slot, durable; then into the other, which the next flush makes durable."""
        status = replace(status, sequence=self._status.sequence + 1)
        slots = [SLOTS_AT + (status.sequence + each) % SLOTS * SECTOR for each in range(SLOTS)]
        slot = encode_slot(status)
        try:
            _write(self._fd, slot, slots[0])
            os.fsync(self._fd)
        except BaseException:
            # Whoever reads it before the disk is asked again finds what was not entered.
            with suppress(OSError):
                _write(self._fd, encode_slot(self._status), slots[0])
                os.fsync(self._fd)
            raise
        self._status = status
        with suppress(OSError):
            _write(self._fd, slot, slots[1])

    def _cut_off(self) -> None:
        """Give back the space behind the record on top; what stays there means nothing."""
        with suppress(OSError):
            os.ftruncate(self._fd, self._status.end)


def read_summary(place: UndoPlace) -> Summary | None:
    """What the undo file says of the repair on top; None where there is none. Changes nothing.

    Raises `UndoFileDamaged`.
    """
    fd = place.open(Opening.UNDO)
    if fd is None:
        return None
    try:
        with _readable(place):
            size = os.fstat(fd).st_size
            found = decode_summary(
                lambda offset, length: _read_all(fd, offset, length), size, place.file
            )
    finally:
        close_all(fd)
    if found is None:
        return None
    summary, identity = found
    place.require_own(identity)
    return summary


@contextmanager
def _explained(place: UndoPlace) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind = UndoFileFull if error.errno in NO_SPACE else UndoFileFailed
        raise kind(place.file, reason_of(error)) from error


@contextmanager
def _possible(place: UndoPlace) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind = UndoFileNoSpace if error.errno in NO_SPACE else UndoFileImpossible
        raise kind(place.file, reason_of(error)) from error


@contextmanager
def _readable(place: UndoPlace) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = f"the undo file cannot be read: {reason_of(error)}"
        raise UndoFileDamaged(place.file, problem) from error


def _read_all(fd: int, offset: int, length: int) -> bytes:
    parts = []
    while length and (part := os.pread(fd, min(length, _PIECE), offset)):
        parts.append(part)
        offset, length = offset + len(part), length - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


_PIECE = 1 << 30


def _write(fd: int, data: bytes | memoryview, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(fd, rest, offset)
        offset, rest = offset + written, rest[written:]
