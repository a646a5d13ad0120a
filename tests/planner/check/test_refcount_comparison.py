"""planner.check.refcount_comparison: stored refcounts against counted references."""

import numpy as np
import pytest

from planner.check import refcount_comparison
from planner.check.refcount_comparison import Mismatches
from planner.findings.kinds import FindingKind
from planner.metadata.cluster_counters import ClusterIndex, NearOne
from planner.qcow2.geometry import Geometry
from tests.images.corpus.rule import plain

LEAKED = (1, 2, 5, 6, 7, 10, 11, 15)


@pytest.fixture
def mismatches() -> Mismatches:
    geometry: Geometry = plain().geometry
    stored, counted = np.zeros(16, dtype=np.uint8), np.zeros(16, dtype=np.uint8)
    stored[list(LEAKED)] = 1
    return Mismatches(geometry, ClusterIndex(16), NearOne.of(stored), counted, ((0, 16),))


@pytest.mark.parametrize("chunk", [2, 4, 1 << 18])
@pytest.mark.parametrize("limit", [1, 3, 7, 8, 9, 10, 15, 1 << 20])
def test_the_first_clusters_of_a_kind_up_to_a_limit(
    mismatches: Mismatches, limit: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refcount_comparison, "CHUNK", chunk)
    found = mismatches.clusters(FindingKind.LEAK, limit)
    assert found.tolist() == list(LEAKED[:limit])
    assert not len(mismatches.clusters(FindingKind.REFCOUNT_LOW, limit))
