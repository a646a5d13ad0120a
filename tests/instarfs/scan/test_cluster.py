"""A scan on a Dask cluster: scheduler and workers are processes of their own, and are killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from instarfs.errors import ClusterFailed
from instarfs.scan.cluster import AHEAD, PART, Cluster
from instarfs.scan.state import State
from instarfs.scan.values import Candidate
from instarfs.scan.workers import Nursery
from tests.instarfs.repair.test_run import damaged, healthy
from tests.instarfs.scan.scans import Recorded, limits, never, scan

IMAGES = 120


@dataclass
class Hosts:
    """A scheduler, and workers."""

    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def file(self) -> Path:
        return self.folder / "scheduler.json"

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "dask", *words, "--scheduler-file", str(self.file)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "30s"},
        )
        self.processes.append(process)
        return process

    def worker(self) -> subprocess.Popen[bytes]:
        return self.start("worker", "--nthreads=1", "--no-nanny", "--no-dashboard")

    def address(self) -> str:
        import json  # noqa: PLC0415

        until = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError, ValueError, KeyError):
                return str(json.loads(self.file.read_text())["address"])
            assert time.monotonic() < until
            time.sleep(0.05)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Hosts]:
    """A scheduler and a worker."""
    started = Hosts(folder)
    started.start("scheduler", "--port=0", "--no-dashboard", "--host=127.0.0.1")
    started.worker()
    started.address()
    try:
        yield started
    finally:
        for process in started.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """For all tests that leave them as they are."""
    with running(tmp_path_factory.mktemp("hosts")) as started:
        yield started


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    there = tmp_path / "images"
    there.mkdir()
    for number in range(IMAGES):
        content = damaged("leaked-clusters") if number % 50 == 7 else healthy()
        (there / f"{number}").write_bytes(content)
        os.utime(there / f"{number}", (1e9, 1e9 + 0.5))
    return there


class Disturbed(Recorded):
    """Does something when so many candidates were asked for."""

    def __init__(self, engine, after: int, do) -> None:
        super().__init__(engine)
        self._after, self._do = after, do

    def run(self, candidates: Iterator[Candidate]):
        def watched() -> Iterator[Candidate]:
            for number, candidate in enumerate(candidates):
                if number == self._after:
                    self._do()
                yield candidate

        return super().run(watched())


def test_the_rows_are_those_of_one_process_though_a_worker_is_killed(
    hosts: Hosts, folder: Path, nursery: Nursery
) -> None:
    first = hosts.worker()

    def lose_one() -> None:
        os.kill(first.pid, signal.SIGKILL)

    with contextlib.closing(Cluster(hosts.address(), limits(), never)) as cluster:
        cluster._client.wait_for_workers(2, timeout=60)
        engine = Disturbed(cluster, IMAGES - 10, lose_one)
        told = scan(nursery, [folder], engine=engine)
    alone = scan(nursery, [folder])
    assert first.wait() == -signal.SIGKILL
    assert told.code == alone.code == 3
    assert {path: (row.verdict, row.counters) for path, row in told.rows.items()} == {
        path: (row.verdict, row.counters) for path, row in alone.rows.items()
    }
    assert len(told.rows) == IMAGES


def test_no_more_is_handed_out_than_is_begun_soon(hosts: Hosts, folder: Path) -> None:
    from tests.instarfs.scan.test_pool import found  # noqa: PLC0415

    taken = 0

    def counted() -> Iterator[Candidate]:
        nonlocal taken
        for path in sorted(folder.iterdir()):
            taken += 1
            yield found(path)

    with contextlib.closing(Cluster(hosts.address(), limits(), never)) as cluster:
        cluster._client.wait_for_workers(1, timeout=60)
        outcomes = cluster.run(counted())
        next(outcomes)
        assert taken <= (AHEAD + 1) * PART + 1
        assert len(list(outcomes)) == IMAGES - 1


def test_where_the_scheduler_is_lost_nothing_that_was_recorded_is(
    folder: Path, nursery: Nursery, tmp_path: Path
) -> None:
    with running(tmp_path) as lost, State.open(str(tmp_path / "state")) as state:
        with contextlib.closing(Cluster(lost.address(), limits(), never)) as cluster:
            cluster._client.wait_for_workers(1, timeout=60)
            engine = Disturbed(cluster, IMAGES - 10, lost.processes[0].kill)
            with pytest.raises(ClusterFailed):
                scan(nursery, [folder], state, engine=engine)
        recorded = sum(state.counts().values())
        assert recorded < IMAGES
        again = scan(nursery, [folder], state)
        assert len(again.rows) == IMAGES
        assert len(again.unchanged) == recorded


def test_where_there_is_no_cluster_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instarfs.scan.cluster.CONNECT_SECONDS", 0.5)
    for address in ("tcp://127.0.0.1:1", "nonsense://x", "127.0.0.1"):
        with pytest.raises(ClusterFailed) as raised:
            Cluster(address, limits(), never)
        assert address in str(raised.value)
