"""What a crash can leave of an image: replayed from a record of what was written and flushed.

A disk keeps what was flushed. Of what was written since, any sectors may have arrived, and a sector
arrives whole. Nothing here judges what is left.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from instarfs.repair.execute import execute
from planner.repair.plan import Plan
from planner.source import SECTOR
from tests.devices import Flush, MemoryDevice, Operation, Truncate, Write

SUBSETS = 50
"""Random subsets of the sectors of a stage; where there are no more than 64, all of them."""


@dataclass(frozen=True, slots=True)
class Crash:
    """``content``: what is left; ``is_prefix``: everything up to some moment, nothing after it."""

    content: bytes
    where: str
    is_prefix: bool


def record(content: bytes, plan: Plan) -> list[Operation]:
    """What carrying out *plan* does to the device."""
    device = MemoryDevice(bytearray(content))
    execute(device, plan)
    return device.log


def crashes(content: bytes, log: list[Operation], rng: random.Random) -> Iterator[Crash]:
    """Every prefix of *log*, and subsets of what each flush stands for; each content once."""
    seen: set[bytes] = set()
    for crash in itertools.chain(_prefixes(content, log), _torn(content, log, rng)):
        if crash.content not in seen:
            seen.add(crash.content)
            yield crash


def _prefixes(content: bytes, log: list[Operation]) -> Iterator[Crash]:
    disk = bytearray(content)
    yield Crash(content, "before the first write", is_prefix=True)
    for number, operation in enumerate(log, 1):
        _apply(disk, operation)
        yield Crash(bytes(disk), f"after operation {number} of {len(log)}", is_prefix=True)


def _torn(content: bytes, log: list[Operation], rng: random.Random) -> Iterator[Crash]:
    disk = bytearray(content)
    for number, epoch in enumerate(_epochs(log)):
        pieces = [piece for operation in epoch for piece in _pieces(operation)]
        assert len(epoch) == 1 or not any(isinstance(each, Truncate) for each in epoch)
        for chosen in _subsets(len(pieces), rng):
            torn = bytearray(disk)
            for piece in itertools.compress(pieces, chosen):
                _apply(torn, piece)
            yield Crash(bytes(torn), f"inside flush {number}", is_prefix=False)
        for piece in pieces:
            _apply(disk, piece)


def _epochs(log: list[Operation]) -> Iterator[list[Operation]]:
    """What was done between two flushes, in order. In the end everything was flushed."""
    assert all(isinstance(last, Flush) for last in log[-1:])
    epoch: list[Operation] = []
    for operation in log:
        if isinstance(operation, Flush):
            yield epoch
            epoch = []
        else:
            epoch.append(operation)


def _pieces(operation: Operation) -> Iterator[Operation]:
    """An operation in parts of which each arrives or does not."""
    if not isinstance(operation, Write):
        yield operation
        return
    assert operation.offset % SECTOR == 0
    for at in range(0, len(operation.data), SECTOR):
        yield Write(operation.offset + at, operation.data[at : at + SECTOR])


def _subsets(count: int, rng: random.Random) -> Iterator[tuple[bool, ...]]:
    if 1 << count <= 64:
        yield from itertools.product((False, True), repeat=count)
        return
    for _ in range(SUBSETS):
        share = rng.random()
        yield tuple(rng.random() < share for _ in range(count))


def _apply(disk: bytearray, operation: Operation) -> None:
    match operation:
        case Write(offset, data):
            disk[offset : offset + len(data)] = data
        case Truncate(size):
            del disk[size:]
            disk += bytes(size - len(disk))
