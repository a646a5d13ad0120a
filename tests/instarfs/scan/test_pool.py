"""Processes that check: what happens to one costs its image, and no other."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from instarfs.errors import ScanCrippled
from instarfs.scan.listing import Named, look
from instarfs.scan.pool import AHEAD, AHEAD_BYTES, Pool
from instarfs.scan.values import Candidate, Outcome, Row
from instarfs.scan.workers import Nursery, Stopped
from tests.instarfs.repair.test_run import healthy
from tests.instarfs.scan.scans import limits, never

IMAGES = 20


@pytest.fixture
def candidates(tmp_path: Path) -> list[Candidate]:
    for number in range(IMAGES):
        (tmp_path / f"{number:02}").write_bytes(healthy())
    return [found(path) for path in sorted(tmp_path.iterdir())]


def found(path: Path) -> Candidate:
    entry = look(os.fsencode(path))
    assert isinstance(entry, Named)
    return entry.file


def rows(outcomes: Iterator[Outcome]) -> dict[bytes, Row]:
    by_path: dict[bytes, Row] = {}
    for outcome in outcomes:
        assert isinstance(outcome, Row)
        assert outcome.path not in by_path, "told twice"
        by_path[outcome.path] = outcome
    return by_path


def children_of(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def data_of(pid: int) -> int:
    """Bytes that count against the limit on memory."""
    (line,) = re.findall(r"VmData:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(line) * 1024


def disturb(nursery: Nursery, number: int, candidates: list[Candidate]) -> Iterator[Candidate]:
    """The candidates; before the last of them every process that checks is sent a signal."""
    *first, last = candidates
    yield from first
    for child in children_of(nursery._process.pid):
        os.kill(child, number)
    yield last


@pytest.mark.parametrize(
    ("number", "reason"),
    [(signal.SIGKILL, "was killed by signal 9"), (signal.SIGSTOP, "took longer than 2 seconds")],
)
def test_what_happens_to_a_process_happens_to_one_image(
    number: int, reason: str, candidates: list[Candidate]
) -> None:
    with Nursery(2, limits(timeout=2.0)) as nursery:
        pool = Pool(nursery, 2, never)
        told = rows(pool.run(disturb(nursery, number, candidates)))
    assert len(told) == IMAGES
    errors = [row.error for row in told.values() if row.verdict == "error"]
    assert 1 <= len(errors) <= 2
    assert all(reason in error for error in errors)
    assert {row.verdict for row in told.values()} == {"clean", "error"}
    assert {row.exit_code for row in told.values()} == {0, 1}


def test_what_takes_too_much_memory_is_a_row(candidates: list[Candidate]) -> None:
    with Nursery(1, limits()) as nursery:
        nursery.fork(1)
        loaded = data_of(nursery._process.pid)
    with Nursery(1, limits(memory=loaded + (256 << 10))) as nursery:
        told = rows(Pool(nursery, 1, never).run(iter(candidates[:3])))
    assert {row.verdict for row in told.values()} == {"error"}
    assert all("more memory than instarfs may use" in row.error for row in told.values())


def test_no_more_is_taken_than_is_begun_soon(nursery: Nursery, candidates: list[Candidate]) -> None:
    taken = 0

    def counted() -> Iterator[Candidate]:
        nonlocal taken
        for candidate in candidates:
            taken += 1
            yield candidate

    outcomes = Pool(nursery, 1, never).run(counted())
    next(outcomes)
    assert taken <= AHEAD + 1
    assert len(list(outcomes)) == IMAGES - 1


def test_a_large_image_waits_for_nobody(nursery: Nursery, tmp_path: Path) -> None:
    """While another process has nothing to do, none is queued behind a large one."""
    candidate = Candidate(b"/missing", 0, found(tmp_path_file(tmp_path)).stamp, AHEAD_BYTES)
    taken: list[Candidate] = []

    def counted() -> Iterator[Candidate]:
        for _ in range(9):
            taken.append(candidate)
            yield candidate

    outcomes = Pool(nursery, 2, never).run(counted())
    next(outcomes)
    assert len(taken) <= 3
    assert len(list(outcomes)) == 8


def tmp_path_file(folder: Path) -> Path:
    path = folder / "file"
    path.touch()
    return path


def test_reading_keeps_to_the_rate(candidates: list[Candidate]) -> None:
    """Waiting for one's turn is no reason to be ended."""
    rate = 20_000
    with Nursery(1, limits(timeout=1.2, read_rate=rate)) as nursery:
        (row,) = rows(Pool(nursery, 1, never).run(iter(candidates[:1]))).values()
    assert row.verdict == "clean"
    assert rate * 1.5 < row.bytes_read < len(healthy())
    assert row.seconds > 0.99 * row.bytes_read / rate


def test_it_stops_when_it_is_told_to(nursery: Nursery, candidates: list[Candidate]) -> None:
    with pytest.raises(Stopped):
        list(Pool(nursery, 1, lambda: True).run(iter(candidates)))


def test_processes_end_with_whoever_started_them(candidates: list[Candidate]) -> None:
    with Nursery(2, limits()) as nursery:
        rows(Pool(nursery, 2, never).run(iter(candidates)))
        children = [nursery._process.pid, *children_of(nursery._process.pid)]
        assert len(children) == 3
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_where_no_process_can_be_started_it_is_said() -> None:
    with Nursery(1, limits()) as nursery:
        nursery._process.kill()
        nursery._process.wait()
        with pytest.raises(ScanCrippled):
            nursery.fork(1)
