"""Checks images in processes of this machine, several at a time."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import wait

from instarfs.scan.values import Candidate, Outcome, failed
from instarfs.scan.workers import POLL_SECONDS, Nursery, Stopped, Worker

AHEAD = 8
AHEAD_BYTES = 32 << 20
"""What a process has to do next, at most: small images come faster than one by one, and of large
ones none waits for another while there is somebody who could take it."""


@dataclass(slots=True)
class _Busy:
    """A process, and what it has still to answer; the first of that since ``began``."""

    worker: Worker
    queue: deque[Candidate] = field(default_factory=deque)
    began: float = 0.0
    waited: float = 0.0

    def begin_next(self) -> None:
        self.began = time.monotonic()
        self.waited = self.worker.nursery.pace.waited(self.worker.slot)

    def seconds(self) -> float:
        """How long it has worked on the first, without the time that it let others read."""
        paused = self.worker.nursery.pace.waited(self.worker.slot) - self.waited
        return time.monotonic() - self.began - paused

    def has_room_for(self, candidate: Candidate) -> bool:
        stored = sum(each.stored for each in self.queue) + candidate.stored
        return not self.queue or (len(self.queue) < AHEAD and stored <= AHEAD_BYTES)


class Pool:
    """The engine of one machine: ``jobs`` processes of *nursery*."""

    def __init__(self, nursery: Nursery, jobs: int, stop: Callable[[], bool]) -> None:
        self._nursery, self._stop = nursery, stop
        self._idle_slots = deque(range(1, jobs + 1))
        self._busy: list[_Busy] = []

    def run(self, candidates: Iterator[Candidate]) -> Iterator[Outcome]:
        """What becomes of each, as it is known; no more of them are taken than are begun soon.

        Raises `Stopped`, `ScanCrippled`, and what *candidates* does.
        """
        while True:
            candidates = self._hand_out(candidates)
            working = {busy.worker.connection: busy for busy in self._busy if busy.queue}
            if not working:
                return
            for ready in wait(list(working), POLL_SECONDS):
                yield from self._take(working[ready])  # type: ignore[index]
            if self._stop():
                raise Stopped
            for busy in list(self._busy):
                if busy.queue and busy.seconds() > self._nursery.limits.timeout:
                    limit = f"{self._nursery.limits.timeout:g} seconds"
                    yield self._replace(busy, f"the check took longer than {limit}: --timeout")

    def close(self) -> None:
        """End its processes; the nursery stays."""
        while self._busy:
            self._busy.pop().worker.end()

    def _hand_out(self, candidates: Iterator[Candidate]) -> Iterator[Candidate]:
        """Give everybody enough to do: what is left."""
        parts: dict[int, list[Candidate]] = {}
        for candidate in candidates:
            busy = self._least_busy()
            if not busy.has_room_for(candidate):
                candidates = itertools.chain([candidate], candidates)
                break
            busy.queue.append(candidate)
            parts.setdefault(id(busy), []).append(candidate)
        for busy in self._busy:
            if part := parts.get(id(busy)):
                self._send(busy, part)
        return candidates

    def _least_busy(self) -> _Busy:
        if self._idle_slots and all(busy.queue for busy in self._busy):
            self._busy.append(_Busy(self._nursery.fork(self._idle_slots.popleft())))
        return min(self._busy, key=lambda busy: len(busy.queue))

    def _send(self, busy: _Busy, part: list[Candidate]) -> None:
        if len(part) == len(busy.queue):
            busy.begin_next()
        # One that has ended is noticed where it is read from.
        with contextlib.suppress(OSError):
            busy.worker.connection.send(part)

    def _take(self, busy: _Busy) -> Iterator[Outcome]:
        """What it has answered by now."""
        try:
            while busy.queue and busy.worker.connection.poll():
                outcome: Outcome = busy.worker.connection.recv()
                busy.queue.popleft()
                busy.begin_next()
                yield outcome
        except (EOFError, OSError):
            if self._stop():
                raise Stopped from None
            yield self._replace(busy, "the process that checked it")

    def _replace(self, busy: _Busy, reason: str) -> Outcome:
        """End a process: the row of what it was at. Another does what it had still to do."""
        seconds, candidate = busy.seconds(), busy.queue.popleft()
        how = busy.worker.end()
        self._busy.remove(busy)
        new = _Busy(self._nursery.fork(busy.worker.slot), busy.queue)
        self._busy.append(new)
        if new.queue:
            self._send(new, list(new.queue))
        if not reason.endswith("--timeout"):
            reason = f"{reason} {how}"
        return failed(candidate, reason, as_of=time.time() - seconds, seconds=seconds)
