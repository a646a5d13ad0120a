"""Every compressed cluster of an image read and unpacked: whether the guest can have them.

Side by side, by as many threads as there are processors, each of which reads what it unpacks.
Which there are, and what follows from those that are not sound, is `planner.check.compressed`.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from instarfs.errors import ImageReadFailed
from instarfs.guest.unpack import NotUnpacked, unpack
from planner.check.compressed import Packed, find_packed, report_unreadable
from planner.check.report import Report
from planner.progress import Meter, Progress, tell_nobody
from planner.source import Source

STAGE = "compressed clusters"

WAITING = 4
"""Spans that wait for a thread, for each that is being unpacked."""


def look_at_packed(
    source: Source,
    report: Report,
    *,
    progress: Progress = tell_nobody,
) -> Report:
    """*report*, which a check of *source* gave, with what the compressed clusters show.

    *progress*: clusters unpacked.
    """
    if report.error is not None:
        return report
    every, layout = find_packed(source, report, Meter(progress, STAGE)), report.layout
    kind = layout.header.compression_type if layout else 0
    packed, nothing, left = every.sorted_out(source, kind)
    bad, done = [np.zeros(0, dtype=np.int64)], 0
    for part, failed in _unpacked(source, packed, kind):
        bad.append(part.start + np.array(failed, dtype=np.int64))
        done += part.stop - part.start
        progress(STAGE, done, len(packed))
    keys = np.concatenate((packed.keys[np.concatenate(bad)], nothing))
    return report_unreadable(source, report, keys, packed, left)


def _unpacked(source: Source, packed: Packed, kind: int) -> Iterator[tuple[slice, list[int]]]:
    """Each span of *packed*, and which of its clusters, counted from its first, are not sound.

    *kind*: the compression type of the header.
    """
    processors = os.cpu_count() or 1
    waiting: deque[tuple[slice, Future[list[int]]]] = deque()
    pool = ThreadPoolExecutor(processors, "unpack")
    try:
        for part in packed.spans():
            waiting.append((part, pool.submit(_failed, source, packed, part, kind)))
            if len(waiting) >= WAITING * processors:
                oldest, future = waiting.popleft()
                yield oldest, future.result()
        for oldest, future in waiting:
            yield oldest, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _failed(source: Source, packed: Packed, part: slice, kind: int) -> list[int]:
    """Which of the clusters in *part* cannot be read or unpacked."""
    offset, length = packed.ranges(part)
    start = int(offset[0])
    span = memoryview(bytearray(int((offset + length).max()) - start))
    try:
        source.read_into(start, span)
    except ImageReadFailed:
        if len(offset) == 1:
            return [0]
        # Which of them it is only shows when they are read one by one.
        numbers = range(part.start, part.stop)
        alone = (_failed(source, packed, slice(at, at + 1), kind) for at in numbers)
        return [number for number, failed in enumerate(alone) if failed]
    bad, size = [], packed.geometry.cluster_size
    for number, (low, stored) in enumerate(
        zip((offset - start).tolist(), length.tolist(), strict=True)
    ):
        try:
            unpack(span[low : low + stored], size, kind)
        except NotUnpacked:
            bad.append(number)
    return bad
