"""The runs of leaked clusters that a check has found, and their bytes as they lie in the file.

Also those of clusters that only look free, since their refcounts are lost. Never checks anything:
without a check that still holds there are no runs. How they are named and where they appear is up
to the tree.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import numpy as np
import trio

from instarfs.inspect.shared_value import Edition
from planner.arrays import I64, Counts, distinct
from planner.source import Source, read_bytes

if TYPE_CHECKING:
    from planner.check.report import Report


@dataclass(frozen=True, slots=True)
class LostRun:
    """Neighbouring leaked clusters. ``offset`` and ``length`` in bytes; they end with the file."""

    offset: int
    length: int


class _Checked(Protocol):
    @property
    def report(self) -> Report: ...


C = TypeVar("C", bound=_Checked)


@dataclass(frozen=True, slots=True)
class _Runs:
    """All runs, ascending. Of millions each takes as few bytes as its numbers do.

    ``first``, ``count``: its first cluster, and how many they are. ``end``: of the file, bytes.
    """

    first: Counts
    count: Counts
    cluster_bits: int
    end: int

    @classmethod
    def of(cls, report: Report, source: Source) -> _Runs:
        """Those that *report* is about."""
        from planner.findings.kinds import FindingKind  # noqa: PLC0415 - a check has it by then
        from planner.triage.triage import adjacent  # noqa: PLC0415
        from planner.triage.uncounted import uncounted_clusters  # noqa: PLC0415

        if report.layout is None or report.mismatches is None:
            return _NO_RUNS
        clusters = report.mismatches.clusters(FindingKind.LEAK, report.counters.leaks)
        uncounted = uncounted_clusters(source, report)
        if len(uncounted):
            clusters = distinct(np.concatenate((clusters, uncounted)))
        first, count = map(_narrowed, adjacent(clusters))
        return cls(first, count, report.geometry.cluster_bits, report.layout.file_size)

    def offsets(self, limit: int) -> list[int]:
        """Of the first runs, at most *limit*."""
        listed: list[int] = (self.first[:limit].astype(np.int64) << self.cluster_bits).tolist()
        return listed

    def find(self, offset: int) -> LostRun | None:
        """The run that begins at *offset*."""
        cluster = offset >> self.cluster_bits
        if not len(self.first) or cluster > int(self.first[-1]):
            return None
        at = int(np.searchsorted(self.first, self.first.dtype.type(cluster)))
        if int(self.first[at]) << self.cluster_bits != offset:
            return None
        length = int(self.count[at]) << self.cluster_bits
        return LostRun(offset, max(0, min(length, self.end - offset)))


_NO_RUNS = _Runs(np.zeros(0, dtype=np.uint8), np.zeros(0, dtype=np.uint8), 0, 0)


def _narrowed(numbers: I64) -> Counts:
    """*numbers*, none below 0, in the narrowest dtype that holds them."""
    narrow: Counts = numbers.astype(np.min_scalar_type(int(numbers.max(initial=0))))
    return narrow


class LostRuns(Generic[C]):
    """Looks runs up in the check that *peek* returns, and reads them from what *source* returns."""

    def __init__(self, peek: Callable[[], Edition[C] | None], source: Callable[[], Source]) -> None:
        self._peek, self._source = peek, source
        self._known: weakref.WeakKeyDictionary[Edition[C], _Runs]
        self._known = weakref.WeakKeyDictionary()

    async def offsets(self, limit: int) -> list[int]:
        """Of the first runs, at most *limit*, ascending."""
        return (await self._runs()).offsets(limit)

    async def find(self, offset: int) -> LostRun | None:
        """The run that begins at *offset*."""
        return (await self._runs()).find(offset)

    async def read(self, run: LostRun, offset: int, size: int) -> bytes:
        """Bytes of a run from *offset* on, fewer than *size* only at its end."""
        size = max(0, min(size, run.length - offset))
        return await trio.to_thread.run_sync(
            read_bytes, self._source(), run.offset + offset, size, abandon_on_cancel=True
        )

    async def _runs(self) -> _Runs:
        edition = self._peek()
        if edition is None:
            return _NO_RUNS
        if edition not in self._known:
            # Millions of clusters take a while.
            self._known[edition] = await trio.to_thread.run_sync(
                _Runs.of, edition.value.report, self._source(), abandon_on_cancel=True
            )
        return self._known[edition]
