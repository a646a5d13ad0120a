"""Runs of leaked clusters: each by its offset, and what millions of them take."""

import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from instarfs.image.file import Image
from instarfs.inspect.leaked_runs import LostRun, LostRuns
from instarfs.inspect.shared_value import Edition
from planner.check.check import check_image
from planner.check.report import Report
from planner.findings.kinds import FindingKind, Findings
from tests.fuzz.holed import leaks_in_holes

RUN_BYTES, HELD_BYTES, ANY = 28, 6, 4 << 20
"""What a run may take while they are looked for, what is held of it, and what any number may."""


@dataclass
class Checked:
    report: Report


@pytest.mark.parametrize("fill", [b"\x55", b"\x66"], ids=["every other one", "pairs"])
async def test_of_scattered_runs_a_few_bytes_are_held(fill: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bomb.qcow2"
    leaks_in_holes(fill, 4).write(path)
    with Image.open(str(path)) as image:
        source = image.source()
        edition = Edition(Checked(check_image(source)))
        runs = LostRuns(lambda: edition, lambda: source)
        number = 4 << 16 << 3 >> (1 if fill == b"\x55" else 2)
        tracemalloc.start()
        try:
            first = await runs.offsets(3)
            held, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert held < HELD_BYTES * number + ANY
        assert peak < RUN_BYTES * edition.value.report.counters.leaks + ANY
        found = np.concatenate([each.host_offset for each in leaks_of(edition.value.report)])
        length = np.concatenate([each.length for each in leaks_of(edition.value.report)])
        assert number - 8 < len(found) <= number
        assert first == found[:3].tolist()
        assert await runs.offsets(number) == found.tolist()
        for at in (0, 1, len(found) // 2, -1):
            offset = int(found[at])
            assert await runs.find(offset) == LostRun(offset, int(length[at]))
            for beside in (offset - 1, offset + 1, offset + int(length[at]), offset + (1 << 63)):
                assert await runs.find(beside) is None


def leaks_of(report: Report) -> Iterator[Findings]:
    return report.batches(FindingKind.LEAK)
