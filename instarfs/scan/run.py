"""One scan: the order of its steps, whoever does the checking.

New images come first, as they are found; then those that are not as they were, or that were checked
too long ago, beginning with the oldest verdict: where time ends before the images do, the next scan
goes on there. What is known of an image is recorded before anybody is told of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Protocol

from instarfs.errors import WORST_FIRST
from instarfs.scan.state import Known, State
from instarfs.scan.values import (
    GONE,
    NOT_QCOW2,
    Candidate,
    NotImage,
    Outcome,
    Row,
    Run,
    Shard,
    Skipped,
    Tell,
)
from instarfs.scan.walk import Walk, real_roots
from instarfs.scan.workers import Lister, Stopped, Unanswered

_SUFFIX = b".qcow2"


class Engine(Protocol):
    """Who checks: `instarfs.scan.pool.Pool`, or `instarfs.scan.cluster.Cluster`."""

    def run(self, candidates: Iterator[Candidate]) -> Iterator[Outcome]:
        """What becomes of each candidate, once, in any order; takes none that it has no room for.

        Raises `Stopped` where it is to stop.
        """


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be scanned: what is at ``paths``, and below.

    Times in seconds. ``program``: the version of whoever checks.
    """

    paths: Sequence[bytes]
    program: str
    shard: Shard = field(default_factory=Shard)
    outdated_after: float = float("inf")
    max_duration: float = float("inf")


class Scan:
    """One scan of what is *wanted* into *state*, of what *lister* finds."""

    def __init__(
        self, wanted: Wanted, state: State, lister: Lister, tell: Tell, stop: Callable[[], bool]
    ) -> None:
        self._wanted, self._state, self._lister = wanted, state, lister
        self._tell, self._stop = tell, stop
        self._roots: list[bytes] = []
        self._began, self._clock = time.time(), time.monotonic()
        self._checked = self._unchanged = self._skipped = self._bytes_read = 0
        # What could not be looked at: of what is below nothing is known.
        self._unseen: set[bytes] = set()
        # Whether every file was met; and whether every image that was has an up-to-date verdict.
        self._is_walked = self._is_complete = False

    def run(self, engine: Engine) -> int:
        """Scan: the exit code, the worst of all images that have a row.

        1 also where something could not be looked at, or an image may have no verdict yet because
        there was no more time. Raises what *engine* and the state do.
        """
        self._state.begin(self._wanted.program, self._began)
        try:
            self._roots = real_roots(self._lister, self._wanted.paths)
            for outcome in engine.run(self._candidates()):
                self._take(outcome)
            if self._is_walked:
                self._look_for_lost()
        except Stopped:
            self._is_walked = self._is_complete = False
        self._state.end(self._so_far())
        codes = self._state.exit_codes()
        if self._unseen or not self._is_walked:
            codes.add(1)
        return min(codes or {0}, key=WORST_FIRST.index)

    def _so_far(self) -> Run:
        return Run(
            self._began,
            time.time(),
            self._checked,
            self._unchanged,
            self._skipped,
            self._bytes_read,
            complete=self._is_complete,
        )

    def _has_time(self) -> bool:
        if self._stop():
            raise Stopped
        return time.monotonic() - self._clock < self._wanted.max_duration

    # ---- what is to be checked ----

    def _candidates(self) -> Iterator[Candidate]:
        """New ones, then those that were put off. Raises `Stopped`."""
        walk = Walk(self._lister, self._roots)
        for root in self._roots:
            for found in walk.below(root):
                if not self._has_time():
                    return
                if not self._wanted.shard.has(found.path):
                    continue
                if isinstance(found, Skipped):
                    self._skip(found)
                elif self._is_new(found):
                    yield found
        self._is_walked = True
        for candidate in self._state.due():
            if not self._has_time():
                return
            yield candidate
        self._is_complete = True

    def _is_new(self, found: Candidate) -> bool:
        """Whether nothing is known of it. What is known holds, or else it is put off."""
        known = self._state.known(found.path)
        if known is None:
            return True
        if self._holds(known, found):
            self._state.meet(found.path, found.device, known.row.device)
            self._unchanged += 1
            self._tell(known.row, True)
        else:
            self._state.put_off(found, known.row.as_of)
        return False

    def _holds(self, known: Known, found: Candidate) -> bool:
        age = time.time() - known.row.as_of
        return (
            known.row.lasts
            and known.row.stamp == found.stamp
            and known.program == self._wanted.program
            and 0 <= age < self._wanted.outdated_after
        )

    # ---- what became of it ----

    def _take(self, outcome: Outcome) -> None:
        if isinstance(outcome, Skipped):
            self._skip(outcome)
        elif isinstance(outcome, NotImage):
            self._take_other(outcome.candidate)
        else:
            self._record(outcome)

    def _record(self, row: Row) -> None:
        self._checked += 1
        self._bytes_read += row.bytes_read
        self._state.record(row, self._wanted.program)
        self._tell(row, False)

    def _take_other(self, candidate: Candidate) -> None:
        """A file that is no image: it may have been one, or be called one."""
        known = self._state.known(candidate.path)
        if known is not None and known.row.stamp.inode == candidate.stamp.inode:
            lost = replace(
                known.row,
                stamp=candidate.stamp,
                verdict=NOT_QCOW2,
                exit_code=63,
                as_of=time.time(),
                error="it was a qcow2 image, and does not begin as one any more",
                lasts=False,
                bytes_read=0,
            )
            self._record(lost)
            return
        reason = "it does not begin as a qcow2 image"
        if candidate.path.lower().endswith(_SUFFIX):
            reason += ", though its name says so"
            self._tell(Skipped(candidate.path, reason, is_failure=False), False)
        self._skipped += 1
        if known is not None:
            self._state.forget(candidate.path, GONE, time.time())

    def _skip(self, skipped: Skipped) -> None:
        self._skipped += 1
        if skipped.is_failure:
            self._unseen.add(skipped.path)
            self._state.skip(skipped)
        elif self._state.known(skipped.path) is not None:
            self._state.forget(skipped.path, GONE, time.time())
        self._tell(skipped, False)

    # ---- what is not there ----

    def _look_for_lost(self) -> None:
        """Images that have a row, and that were not met."""
        for root in self._roots:
            for path in self._state.not_met(root):
                known = self._state.known(path)
                if known is None or not self._wanted.shard.has(path) or self._is_unseen(path):
                    continue
                try:
                    device = self._lister.device_if_lost(path)
                except Unanswered as error:
                    self._skip(Skipped(path, str(error), is_failure=True))
                    continue
                if device == known.row.device:
                    self._state.forget(path, GONE, time.time())
                elif device is not None:
                    reason = "it is not there, nor is what it lay on: is that mounted?"
                    self._skip(Skipped(path, reason, is_failure=True))

    def _is_unseen(self, path: bytes) -> bool:
        """Whether it lies below what could not be looked at."""
        parts = path.split(b"/")
        folders = accumulate(parts, lambda above, name: above + b"/" + name)
        return bool(self._unseen) and any((each or b"/") in self._unseen for each in folders)
