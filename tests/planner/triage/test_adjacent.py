"""Runs of neighbouring clusters."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.triage import triage as module
from planner.triage.triage import adjacent


@given(st.sets(st.integers(0, 40)), st.integers(1, 6))
def test_runs_are_the_same_however_many_clusters_are_looked_at_together(
    clusters: set[int], chunk: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        first, count = adjacent(np.array(sorted(clusters), dtype=np.int64))
    begins = sorted(each for each in clusters if each - 1 not in clusters)
    assert first.tolist() == begins
    runs = [range(*bounds) for bounds in zip(first, first + count, strict=True)]
    assert sorted(clusters) == [each for run in runs for each in run]
    assert all(run.stop not in clusters for run in runs)


def test_a_run_of_millions_takes_a_byte_for_each() -> None:
    clusters = np.arange(1 << 22, dtype=np.int64)
    tracemalloc.start()
    try:
        first, count = adjacent(clusters)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (first.tolist(), count.tolist()) == ([0], [1 << 22])
    assert peak < 2 * len(clusters)
