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
from planner.arrays import I64, distinct
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


class LostRuns(Generic[C]):
    """Looks runs up in the check that *peek* returns, and reads them from what *source* returns."""

    def __init__(self, peek: Callable[[], Edition[C] | None], source: Callable[[], Source]) -> None:
        self._peek, self._source = peek, source
        self._known: weakref.WeakKeyDictionary[Edition[C], tuple[I64, I64]]
        self._known = weakref.WeakKeyDictionary()

    async def offsets(self, limit: int) -> list[int]:
        """Of the first runs, at most *limit*, ascending."""
        offset, _ = await self._runs()
        listed: list[int] = offset[:limit].tolist()
        return listed

    async def find(self, offset: int) -> LostRun | None:
        """The run that begins at *offset*."""
        offsets, lengths = await self._runs()
        at = int(np.searchsorted(offsets, offset)) if offset < 1 << 63 else len(offsets)
        if at == len(offsets) or offsets[at] != offset:
            return None
        return LostRun(offset, int(lengths[at]))

    async def read(self, run: LostRun, offset: int, size: int) -> bytes:
        """Bytes of a run from *offset* on, fewer than *size* only at its end."""
        size = max(0, min(size, run.length - offset))
        return await trio.to_thread.run_sync(
            read_bytes, self._source(), run.offset + offset, size, abandon_on_cancel=True
        )

    async def _runs(self) -> tuple[I64, I64]:
        edition = self._peek()
        if edition is None:
            return _no_runs()
        if edition not in self._known:
            # Millions of clusters take a while.
            self._known[edition] = await trio.to_thread.run_sync(
                _runs_of, edition.value.report, self._source(), abandon_on_cancel=True
            )
        return self._known[edition]


def _no_runs() -> tuple[I64, I64]:
    return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)


def _runs_of(report: Report, source: Source) -> tuple[I64, I64]:
    """Offset and length of every run, bytes, ascending."""
    from planner.findings.kinds import FindingKind  # noqa: PLC0415 - after a check, which has it
    from planner.triage.triage import adjacent  # noqa: PLC0415
    from planner.triage.uncounted import uncounted_clusters  # noqa: PLC0415

    if report.layout is None or report.mismatches is None:
        return _no_runs()
    bits, end = report.geometry.cluster_bits, report.layout.file_size
    leaked = report.mismatches.clusters(FindingKind.LEAK, report.counters.leaks)
    every = distinct(np.concatenate((leaked, uncounted_clusters(source, report))))
    first, count = adjacent(every)
    return first << bits, np.clip(end - (first << bits), 0, count << bits)
