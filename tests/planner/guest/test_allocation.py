"""How much is mapped: the sums of what a walk through every table gives, at a bounded price."""

import random

import numpy as np
import pytest

from planner.guest.allocation import Allocation, allocation, bytes_in_backing_file, disk_allocation
from planner.guest.mapping import RunKind
from planner.qcow2.geometry import Geometry
from planner.qcow2.layout import Layout
from planner.source import nonzero_words
from tests.images.builder import ImageBuilder
from tests.planner.guest.test_mapping import GEOMETRIES, L1_OFFSET, RandomImage
from tests.planner.sources import Sparse


def walked(image: RandomImage, low: int, high: int) -> Allocation:
    """By the runs of the mapping."""
    sums = np.zeros(len(RunKind), dtype=np.int64)
    for runs in image.mapping.walk(low, high):
        sums += np.bincount(runs.kind, runs.length, len(RunKind)).astype(np.int64)
    unallocated, zero, *mapped = sums.tolist()
    return Allocation(unallocated, zero, sum(mapped))


@pytest.mark.parametrize("name", [name for name in GEOMETRIES if "external" not in name])
def test_sums_are_those_of_the_runs(name: str) -> None:
    rng = random.Random(f"allocation {name}")
    geometry = GEOMETRIES[name][0]
    image = RandomImage(geometry, rng)
    end = (image.l1_size + 1) * geometry.l2_coverage
    l1 = nonzero_words(image.source, L1_OFFSET, image.l1_size)
    parts = [sorted(rng.sample(range(0, end, 512), 2)) for _ in range(5)]
    for low, high in [(0, end), (512, 1024), *parts]:
        found = allocation(image.source, geometry, l1, low, high)
        assert found == walked(image, low, high)
        assert found.unallocated + found.zero + found.mapped == high - low


def test_a_table_that_all_entries_lead_to_is_read_once() -> None:
    geometry = Geometry(3, 16, 4, 0)
    words = np.full(100_000, 1 << 16, dtype=np.uint64)
    table = np.arange(geometry.l2_entries, dtype=">u8") << 16
    source = Sparse.of(bytes(1 << 16) + table.tobytes(), 1 << 40)
    size = len(words) * geometry.l2_coverage
    found = allocation(source, geometry, (np.arange(len(words)), words), 0, size)
    assert found.unallocated == len(words) << 16
    assert found.mapped == size - found.unallocated
    assert source.bytes_read == 1 << 16


def test_tables_in_holes_are_not_read() -> None:
    geometry = Geometry(3, 16, 4, 0)
    words = np.arange(1, 100_001, dtype=np.uint64) << np.uint64(30)
    source = Sparse.of(bytes(1 << 16), 1 << 60)
    size = len(words) * geometry.l2_coverage
    found = allocation(source, geometry, (np.arange(len(words)), words), 0, size)
    assert found == Allocation(size, 0, 0)
    assert not source.bytes_read


def test_what_an_overlay_reads_from_its_backing_file() -> None:
    size = 5 << 20
    builder = ImageBuilder(size=size + 512, backing_file=b"base", backing_format=b"raw")
    builder.write(1, b"data")
    builder.write_zeros(2)
    builder.write_compressed(80, b"the last, of which 512 bytes are on the disk")
    image = builder.build()
    layout = Layout.read(image.source)
    assert bytes_in_backing_file(image.source, layout) == size - 2 * 65536
    assert disk_allocation(image.source, layout) == Allocation(size - 2 * 65536, 65536, 65536 + 512)
    alone = ImageBuilder(size=size).build()
    assert bytes_in_backing_file(alone.source, Layout.read(alone.source)) is None
