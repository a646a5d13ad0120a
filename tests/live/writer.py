"""The guest of a running machine: it allocates, discards, flushes, and does what its owner does.

Only in the first part of the disk; the rest is quiet. A thread, so that checks run beside it.
"""

from __future__ import annotations

import ctypes
import os
import random
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

from tests.live.machine import Machine, QmpError, Shape

ALLOCATING = 850
"""Allocating writes a second: more than 800 is left of it when snapshots have held it up."""

ROOM = 1500
"""Clusters, scattered, that a guest finds free at first."""

_PUNCH = 0x01 | 0x02
"""FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE"""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


@dataclass(frozen=True, slots=True)
class Habits:
    """How often what is done, in seconds between two of it; 0: never.

    ``rate``: allocating writes a second; 0: as many as go. ``written``: the part of the disk that
    is written to.
    """

    rate: int = ALLOCATING
    flush: float = 0.25
    snapshot: float = 1.1
    resize: float = 1.7
    bitmap: float = 1.3
    written: float = 0.5


BUSY = Habits()

CALM = Habits(snapshot=0, resize=0, bitmap=0)
"""A guest alone: nobody takes snapshots of it, or resizes its disk."""


@dataclass
class Writer:
    """One guest. ``done``: how often what was done; ``refused``: what the daemon would not do."""

    machine: Machine
    shape: Shape
    habits: Habits
    seed: int
    done: dict[str, int] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._rng = random.Random(f"writer {self.seed}")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ready = threading.Event()
        self._unit = self.shape.cluster_size
        count = int(self.shape.size * self.habits.written) // self._unit
        self._used, self._free = list(range(count)), list[int]()
        self._snapshots, self._bitmaps, self._names = list[str](), list[str](), 0

    def __enter__(self) -> Writer:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Write no more."""
        self._stop.set()
        self._thread.join()

    @property
    def rate(self) -> float:
        """Allocating writes a second, so far."""
        return self.done.get("allocate", 0) / self.seconds if self.seconds else 0.0

    def is_at_it(self) -> bool:
        """Whether it still writes; a disk that fails ends it."""
        return self._thread.is_alive()

    def _run(self) -> None:
        descriptor = os.open(self.machine.disk, os.O_RDWR)
        try:
            self._make_room(descriptor)
            self._write(descriptor)
        except OSError as error:
            self.refused.append(f"the guest: {error}")
        finally:
            self._ready.set()
            with suppress(OSError):  # of a disk that has gone
                os.close(descriptor)

    def _count(self, what: str) -> None:
        self.done[what] = self.done.get(what, 0) + 1

    def _make_room(self, descriptor: int) -> None:
        """Make room: a half of the written part is discarded, or a good deal of it."""
        self._discard(descriptor, min(ROOM, len(self._used) // 2))
        os.fsync(descriptor)
        self.done.clear()

    def _write(self, descriptor: int) -> None:
        habits = self.habits
        turns = [
            (habits.flush, lambda: self._flush(descriptor)),
            (habits.snapshot, self._snapshot),
            (habits.resize, lambda: self._resize(descriptor)),
            (habits.bitmap, self._bitmap),
        ]
        began = time.monotonic()
        due = [began + every for every, _ in turns]
        while not self._stop.is_set():
            self._step(descriptor)
            now = time.monotonic()
            self.seconds = now - began
            for number, (every, turn) in enumerate(turns):
                if every and now >= due[number]:
                    turn()
                    due[number] = time.monotonic() + every * self._rng.uniform(0.5, 1.5)
            ahead = self.done.get("allocate", 0) / habits.rate - self.seconds if habits.rate else 0
            if ahead > 0:
                self._stop.wait(ahead)
                self._ready.set()
        self._ready.set()

    def _step(self, descriptor: int) -> None:
        """One allocating write, and a discard or two so that there is always room."""
        if len(self._free) < 16 or self._rng.random() < 0.1:
            self._discard(descriptor, self._rng.randint(8, 24))
        unit = self._take(self._free)
        self._used.append(unit)
        at = unit * self._unit
        os.pwrite(descriptor, b"w" * min(self._unit, 4096), at)
        self._count("allocate")
        if self.done["allocate"] % 64 == 0:
            self._ready.set()

    def _discard(self, descriptor: int, count: int) -> None:
        for _ in range(min(count, len(self._used))):
            unit = self._take(self._used)
            self._free.append(unit)
            if _libc.fallocate(descriptor, _PUNCH, unit * self._unit, self._unit):
                raise OSError(ctypes.get_errno(), "fallocate")
            self._count("discard")

    def _take(self, units: list[int]) -> int:
        number = self._rng.randrange(len(units))
        units[number], units[-1] = units[-1], units[number]
        return units.pop()

    def _flush(self, descriptor: int) -> None:
        os.fsync(descriptor)
        self._count("flush")

    # -- what its owner does --------------------------------------------------------------------

    def _ask(self, what: str, command: str, /, **arguments: object) -> bool:
        try:
            self.machine.ask(command, **arguments)
        except QmpError as error:
            self.refused.append(f"{what}: {error}")
            return False
        self._count(what)
        return True

    def _name(self) -> str:
        self._names += 1
        return f"n{self._names}"

    def _snapshot(self) -> None:
        if len(self._snapshots) < 3 and self._rng.random() < 0.6:
            name = self._name()
            command = "blockdev-snapshot-internal-sync"
            if self._ask("snapshot", command, device="disk", name=name):
                self._snapshots.append(name)
        elif self._snapshots:
            name = self._take_name(self._snapshots)
            command = "blockdev-snapshot-delete-internal-sync"
            self._ask("delete snapshot", command, device="disk", name=name)

    def _bitmap(self) -> None:
        if len(self._bitmaps) < 3 and self._rng.random() < 0.6:
            name = self._name()
            if self._ask(
                "bitmap", "block-dirty-bitmap-add", node="disk", name=name, persistent=True
            ):
                self._bitmaps.append(name)
        elif self._bitmaps:
            name = self._take_name(self._bitmaps)
            self._ask("remove bitmap", "block-dirty-bitmap-remove", node="disk", name=name)

    def _take_name(self, names: list[str]) -> str:
        return names.pop(self._rng.randrange(len(names)))

    def _resize(self, descriptor: int) -> None:
        """Longer, and as it was again: what is behind the quiet part comes and goes."""
        is_long = os.fstat(descriptor).st_size > self.shape.size
        more = 0 if is_long else self._rng.randint(1, 64) * max(self._unit, 1 << 20)
        try:
            os.ftruncate(descriptor, self.shape.size + more)
        except OSError as error:
            self.refused.append(f"resize: {error}")
            return
        self._count("resize")
