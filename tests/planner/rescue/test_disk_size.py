"""planner.rescue.disk_size: what a disk says of its size, and how much is done to hear it."""

from __future__ import annotations

import random
from functools import partial

import pytest

from planner.guest.mapping import Mapping
from planner.guestfs.work import Work
from planner.rescue.disk_size import GuestBytes, disk_size
from planner.rescue.headers import mapping_all
from planner.source import Bytes
from tests.images.builder import ImageBuilder
from tests.planner.rescue.placing.test_place import header_of, image


def test_a_disk_that_takes_too_much_work_to_read_is_as_large_as_what_is_mapped() -> None:
    data = image("xfs", "none")
    header = mapping_all(header_of(data))
    told = disk_size(Bytes(data), header, Work(len(data)))
    assert (told.evidence, told.is_exact) == ("the xfs on it has that", True)
    work = Work(0, 100.0)
    mapped = disk_size(Bytes(data), header, work)
    assert (mapped.evidence, mapped.is_exact) == ("nothing is mapped behind it", False)
    assert mapped.size <= told.size


@pytest.mark.parametrize("last", [0, 1, 63, 64, 1000, 2047, 3999])
def test_a_disk_is_mapped_up_to_its_last_cluster_that_is_or_reads_as_zeros(last, seed) -> None:
    rng = random.Random(seed)
    builder = ImageBuilder(cluster_bits=9, size=4000 << 9)
    for cluster in rng.sample(range(last), min(last, 5)):
        builder.write(cluster, b"data")
    (builder.write_zeros if rng.random() < 0.5 else partial(builder.write, content=b"x"))(last)
    built = builder.build()
    guest = GuestBytes(built.source, built.header, built.header.size)
    assert guest.mapped_end() == (last + 1) << 9


def test_of_a_disk_of_many_tables_no_more_are_walked_than_tell_where_the_last_ends(
    monkeypatch,
) -> None:
    builder, walked = ImageBuilder(cluster_bits=9, size=4000 << 9), []
    for cluster in range(0, 4000, 10):
        builder.write(cluster, b"data")
    built, walk = builder.build(), Mapping.walk

    def noted(mapping, offset, end, **more):
        walked.append(end - offset)
        return walk(mapping, offset, end, **more)

    monkeypatch.setattr(Mapping, "walk", noted)
    guest = GuestBytes(built.source, built.header, built.header.size)
    assert guest.mapped_end() == 3991 << 9
    assert sum(walked) <= 64 << 9


def test_nothing_is_mapped_of_an_empty_disk() -> None:
    built = ImageBuilder(cluster_bits=9, size=4000 << 9).build()
    assert GuestBytes(built.source, built.header, built.header.size).mapped_end() == 0
