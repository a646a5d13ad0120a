"""Checks images on the hosts of a Dask cluster that is there already, which see the same files.

A task is a few images. The scheduler gives what a lost worker had to another; what came of a task
is taken once, when it is whole, so that no row is lost and none is told twice. In a worker the
images are checked as on one machine, by processes that can be killed (`instarfs.scan.pool`).
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from instarfs.errors import ClusterFailed, ClusterLibraryMissing
from instarfs.scan.pool import Pool
from instarfs.scan.values import Candidate, Limits, Outcome, failed
from instarfs.scan.workers import POLL_SECONDS, Nursery, Stopped

PART = 16
PART_BYTES = 64 << 20
"""Images of a task, at most: so many small ones, and of large ones one."""

AHEAD = 3
"""Tasks for each thread of the cluster that are under way: what a scheduler holds is bounded."""

RETRIES = 3
CONNECT_SECONDS = 30.0


def examine_part(candidates: list[Candidate], limits: Limits) -> list[Outcome]:
    """What becomes of each, in the thread of a worker. Its processes are kept for the next part."""
    nursery = getattr(_OF_THREAD, "nursery", None)
    if nursery is None or nursery.limits != limits:
        nursery = _OF_THREAD.nursery = Nursery(1, limits)
    pool = Pool(nursery, 1, lambda: False)
    try:
        return list(pool.run(iter(candidates)))
    except BaseException:
        del _OF_THREAD.nursery
        nursery.close()
        raise
    finally:
        pool.close()


_OF_THREAD = threading.local()


@dataclass(slots=True)
class _Part:
    """A task that is under way."""

    candidates: list[Candidate]
    future: Any


class Cluster:
    """The engine of a cluster: of the scheduler at ``address``."""

    def __init__(self, address: str, limits: Limits, stop: Callable[[], bool]) -> None:
        """Raises `ClusterLibraryMissing`, `ClusterFailed`."""
        try:
            import distributed  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise ClusterLibraryMissing from error
        _be_quiet()
        self._address, self._stop = address, stop
        try:
            self._client = distributed.Client(  # type: ignore[no-untyped-call]
                address, timeout=CONNECT_SECONDS, set_as_default=False
            )
        except (OSError, ValueError, TimeoutError) as error:
            raise ClusterFailed(address, str(error) or type(error).__name__) from error
        # Nobody knows who reads just now: each has its part of what all may read.
        share = limits.read_rate / max(1, self._threads())
        self._limits = replace(limits, read_rate=share)

    def run(self, candidates: Iterator[Candidate]) -> Iterator[Outcome]:
        """As `Pool.run`. Raises `ClusterFailed` where the scheduler is gone."""
        parts = _parts(candidates)
        under_way: list[_Part] = []
        while True:
            most = AHEAD * max(1, self._threads())
            new = itertools.islice(parts, max(0, most - len(under_way)))
            under_way.extend(_Part(part, self._submit(part)) for part in new)
            if not under_way:
                return
            done = [part for part in under_way if part.future.done()]
            under_way = [part for part in under_way if part not in done]
            for part in done:
                yield from self._outcomes(part)
            if self._stop():
                raise Stopped
            if not done:
                time.sleep(POLL_SECONDS / 10)

    def _threads(self) -> int:
        """How many the cluster has just now. Raises `ClusterFailed`."""
        if self._client.status != "running":
            raise ClusterFailed(self._address, "the scheduler does not answer any more")
        workers = self._client.scheduler_info(n_workers=-1)["workers"]
        return sum(worker["nthreads"] for worker in workers.values())

    def _submit(self, part: list[Candidate]) -> Any:
        return self._client.submit(examine_part, part, self._limits, pure=False, retries=RETRIES)

    def _outcomes(self, part: _Part) -> Iterator[Outcome]:
        future = part.future
        if future.status == "finished":
            yield from future.result()
        elif future.status == "error":
            reason = f"its worker: {type(future.exception()).__name__}"
            for candidate in part.candidates:
                yield failed(candidate, reason, as_of=time.time())
        else:  # cancelled, or lost: the scheduler is gone, or another
            raise ClusterFailed(self._address, "the scheduler has lost what it was to do")
        future.release()

    def close(self) -> None:
        """Leave the cluster; what it has not begun is not done."""
        self._client.close(timeout=CONNECT_SECONDS)  # type: ignore[no-untyped-call]


def _be_quiet() -> None:
    """What is wrong is said once, by whoever asked for the scan."""
    for name in list(logging.root.manager.loggerDict):
        if name.split(".")[0] in ("distributed", "tornado", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def _parts(candidates: Iterator[Candidate]) -> Iterator[list[Candidate]]:
    part: list[Candidate] = []
    stored = 0
    for candidate in candidates:
        if part and (len(part) == PART or stored + candidate.stored > PART_BYTES):
            yield part
            part, stored = [], 0
        part.append(candidate)
        stored += candidate.stored
    if part:
        yield part
