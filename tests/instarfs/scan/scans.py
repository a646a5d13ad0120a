"""Scans as the tests make them: in this process, with the processes that really check."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from instarfs.scan.pool import Pool
from instarfs.scan.run import Engine, Scan, Wanted
from instarfs.scan.state import State
from instarfs.scan.values import Candidate, Limits, Outcome, Row, Skipped
from instarfs.scan.workers import Lister, Nursery

PROGRAM = "1.0"
JOBS = 2


def never() -> bool:
    return False


@dataclass
class Told:
    """What a scan told of, and how it ended."""

    rows: dict[bytes, Row] = field(default_factory=dict)
    unchanged: set[bytes] = field(default_factory=set)
    skipped: dict[bytes, Skipped] = field(default_factory=dict)
    code: int = 0

    def tell(self, what: Row | Skipped, unchanged: bool) -> None:
        if isinstance(what, Skipped):
            self.skipped[what.path] = what
            return
        assert what.path not in self.rows, "told twice"
        self.rows[what.path] = what
        self.unchanged |= {what.path} if unchanged else set()

    def verdicts(self) -> dict[str, str]:
        """By the name of the file."""
        return {path.rpartition(b"/")[2].decode(): row.verdict for path, row in self.rows.items()}


class Recorded:
    """An engine that has another do it, and keeps the order in which it was asked."""

    def __init__(self, engine: Engine, most: int | None = None) -> None:
        self._engine, self._most = engine, most
        self.asked: list[bytes] = []

    def run(self, candidates: Iterator[Candidate]) -> Iterator[Outcome]:
        def noted() -> Iterator[Candidate]:
            for candidate in candidates:
                self.asked.append(candidate.path)
                yield candidate

        return self._engine.run(noted())


def scan(
    nursery: Nursery,
    roots: Sequence[Path | bytes],
    state: State | None = None,
    *,
    engine: Engine | None = None,
    jobs: int = JOBS,
    stop: Callable[[], bool] = never,
    **wanted: object,
) -> Told:
    """Scan *roots*; options are those of `Wanted`."""
    told = Told()
    paths = list(map(os.fsencode, roots))
    asked = Wanted(**{"paths": paths, "program": PROGRAM, **wanted})  # type: ignore[arg-type]
    with state_or_none(state) as used:
        told.code = Scan(asked, used, Lister(nursery, stop), told.tell, stop).run(
            engine or Pool(nursery, jobs, stop)
        )
    return told


@contextmanager
def state_or_none(state: State | None) -> Iterator[State]:
    if state is not None:
        yield state
        return
    with State.none() as empty:
        yield empty


def limits(**values: float) -> Limits:
    return Limits(**{"timeout": 60.0, **values})  # type: ignore[arg-type]
