"""Bombs with other files beside them, or of a format that is rarely met: what a header may name.

Chains of images, external data files, encryption, version 2, zstd, and what a hostile neighbour may
leave in the folder: undo files, and the states of a scan or a rescue. What is there of all of them
together is less than `FILE_BYTES`, but for the disk at the end of a chain, which has as much again.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from instarfs.repair.journal import (
    BODY_AT,
    HEADER,
    MAX_BYTES,
    Record,
    State,
    StateWord,
    digest_of,
    encode_front,
    encode_record,
)
from instarfs.repair.rescue_state import MARK
from instarfs.repair.undo_place import Identity
from planner.check.report import CheckCounters
from planner.qcow2 import extensions
from planner.qcow2.header import CRYPT_AES, CRYPT_LUKS, MAGIC, Autoclear, Incompatible
from planner.repair.plan import Plan, RepairTier, Stage, StageKind
from planner.source import SECTOR
from tests.fuzz.guest_bombs import EXTREMES, make_guest_bomb
from tests.fuzz.holed import HEADER_LENGTH, LARGEST, ROOM, Holed, Said, extension, make_bomb
from tests.fuzz.scan_states import make_state
from tests.images.luks_headers import luks_bytes

UNDO = "image.qcow2.instarfs-undo"
STATE = "state"
"""What commands take for a state, where they are told of one."""

BACKING = b"below0.qcow2"
NAMES = (BACKING, b"image.qcow2", b"/dev/zero", b"json:{}", b"nbd://\x1b", b"\x1b" * 1023)


def make_rare_bomb(seed: int) -> Holed:
    """Tables as `make_bomb` makes them, of a format that it never makes."""
    rng = random.Random(f"rare {seed}")
    data, backing = (
        extension(extensions.DATA_FILE, rng.choice((*NAMES, b"data"))),
        rng.choice(NAMES),
    )
    said = rng.choice(
        (
            Said(version=2),
            Said(version=2, crypt=CRYPT_AES, backing=backing),
            Said(crypt=CRYPT_AES),
            Said(incompatible=Incompatible.COMPRESSION),
            Said(incompatible=Incompatible.DATA_FILE, extensions=data),
            Said(
                incompatible=Incompatible.DATA_FILE | Incompatible.EXTENDED_L2,
                autoclear=Autoclear.DATA_FILE_RAW,
                extensions=data,
            ),
            Said(backing=backing),
            Said(backing=backing, extensions=extension(extensions.BACKING_FORMAT, b"raw")),
        )
    )
    if rng.random() < 0.2:
        pointer = struct.pack(">QQ", 1 << 30, 1 << 20)
        crypto = extension(extensions.CRYPTO_HEADER, pointer)
        said = replace(said, crypt=CRYPT_LUKS, extensions=said.extensions + crypto)
    bomb = make_bomb(seed, said, ROOM - (64 << 10))
    bomb.parts.append((1 << 30, _luks(rng)))
    bomb.size = max(bomb.size, (1 << 30) + (1 << 20))
    bomb.beside = {"data": Holed(size=LARGEST), BACKING.decode(): Holed(size=LARGEST)}
    return bomb


def _luks(rng: random.Random) -> bytes:
    """A header of LUKS, a few of its fields at their limits."""
    header = bytearray(luks_bytes()[:4096])
    for _ in range(rng.choice((0, 1, 4))):
        at = rng.randrange(104, 592, 4)
        header[at : at + 4] = rng.choice(EXTREMES).to_bytes(4, "big")
    return bytes(header)


def make_chain(seed: int) -> Holed:
    """Bombs one over the other, as many as are opened, or more, and a guest's disk below."""
    rng = random.Random(f"chain {seed}")
    count = rng.choice((1, 3, 62, 66))
    format_of = extension(extensions.BACKING_FORMAT, b"qcow2")

    def below(number: int) -> bytes:
        return f"below{number}.qcow2".encode()

    def member(number: int) -> Holed:
        said = Said(extensions=format_of, backing=below(number))
        if count > 10:
            return _overlay(said)
        return make_bomb(rng.randrange(1 << 32), said, ROOM // (count + 1))

    top = member(0)
    top.beside = {below(n).decode(): member(n + 1) for n in range(count)}
    top.beside[below(count).decode()] = make_guest_bomb(seed)
    return top


def _overlay(said: Said) -> Holed:
    """An image with no table, so that all is read of what is below."""
    rest = said.extensions + bytes(8)
    fields = (16, LARGEST, 0, 1024, 1 << 16, 0, 0, 0, 0, 0, 0, 0, 4, HEADER_LENGTH)
    head = struct.pack(
        ">IIQIIQIIQQIIQQQQII8x",
        *(MAGIC, 3, HEADER_LENGTH + len(rest), len(said.backing), *fields),
    )
    return Holed([(0, head + rest + said.backing)], 3 << 16)


def make_with_undo(seed: int) -> Holed:
    """With an undo file that says a great deal, of which nothing is there."""
    rng = random.Random(f"undo {seed}")
    bomb = make_bomb(seed, room=ROOM // 8)
    shown = rng.choice((1, 100, 100_000))
    rows = np.zeros((shown, SECTOR), dtype=np.uint8)
    stage = Stage(StageKind.CORRECT, np.arange(shown, dtype=np.int64), rows, rows)
    plan = Plan(RepairTier.LEAKS, (stage,), 1 << 40, 1 << 40)
    record = Record(plan, bytes(32), CheckCounters(), Identity(0, 0))
    header, sectors, *_ = encode_record(record, StateWord())
    header, sectors = bytes(header), bytes(sectors)
    claimed = rng.choice((shown, 1 << 20, MAX_BYTES // (8 + 2 * SECTOR)))
    if claimed != shown:  # the same, of so many sectors; only the header's checksum is right
        fields = HEADER.parse(header)
        fields["sectors"][list(StageKind).index(stage.kind)] = claimed
        header = HEADER.build(fields)
        header += digest_of(header)
    length = SECTOR + claimed * (8 + 2 * SECTOR)
    status = StateWord(State.APPLIED, 1, BODY_AT, BODY_AT + length + -length % SECTOR)
    parts = [(0, encode_front(status)), (BODY_AT, header), (BODY_AT + SECTOR, sectors)]
    bomb.beside[UNDO] = Holed(parts, status.end)
    return bomb


def make_with_state(seed: int) -> Holed:
    """With a state of a rescue, or of scans, that somebody made up."""
    rng = random.Random(f"state {seed}")
    bomb = make_bomb(seed, room=ROOM // 2)
    count = 1 << rng.choice((10, 20, 27))
    head = json.dumps({"image": [], "scans": [["tables", 0, count, 0, 0]]}).encode()
    rest = len(head).to_bytes(8, "little") + head
    rest += np.arange(min(count, 1 << 15), dtype="<i8").tobytes()
    states: tuple[Callable[[], Holed], ...] = (
        lambda: Holed([(0, MARK)], 1 << 30),
        lambda: Holed([(0, MARK + bytes(32) + rest)], len(MARK) + 40 + len(head) + 8 * count),
        lambda: Holed([(0, b"SQLite format 3\0")], 1 << 32),
        lambda: Holed(size=LARGEST),
    )
    bomb.beside[STATE] = rng.choice(states)()
    return bomb


def make_with_scans(seed: int) -> Holed:
    """With a state of scans that is one, but for what somebody has put there."""
    bomb = make_bomb(seed, room=ROOM // 8)
    bomb.beside[STATE] = Holed([(0, make_state(random.Random(f"scans {seed}")))])
    return bomb
