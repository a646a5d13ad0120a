"""The map of a disk whose metadata was preallocated: against what is true byte by byte."""

import random
import tracemalloc

import numpy as np
import pytest

from planner.guest import extents as extents_module
from planner.guest.extents import Extents, Stratum, extents
from planner.guest.mapping import Mapping
from planner.qcow2 import entries
from planner.source import Bytes
from tests.images.builder import ImageBuilder
from tests.planner.sources import Sparse

CLUSTER = 4096
BLOCK = 512


def disk(rng: random.Random) -> tuple[Mapping, int]:
    """A disk whose clusters lie in disorder, some at two places."""
    made = ImageBuilder(cluster_bits=12, size=256 * CLUSTER)
    for cluster in rng.sample(range(256), 180):
        made.write(cluster, b"x" * CLUSTER)
    for cluster in rng.sample(range(256), 10):
        made.write_zeros(cluster)
    image = made.build()
    mapped = image.mapped(0)
    for _ in range(20):
        image.set_word(image.l2_at(rng.choice(mapped)), image.word(image.l2_at(rng.choice(mapped))))
    source, header = Bytes(bytes(image.data)), image.header
    mapping = Mapping(source, image.geometry, header.l1_table_offset, header.l1_size)
    return mapping, 256 * CLUSTER


def zeros_of(rows: Extents, data: Sparse) -> list[bool]:
    """Of each block whether it is to be shown as zeros, as the blocks that are there say."""
    known = []
    for row in range(len(rows)):
        for at in range(0, int(rows.length[row]), BLOCK):
            is_hole = (int(rows.offset[row]) + at) // BLOCK not in data.blocks
            known.append(bool(rows.zero[row]) or (bool(rows.data[row]) and is_hole))
    return known


@pytest.mark.parametrize("most", [1, 7, 1 << 16])
@pytest.mark.parametrize("seed", range(12))
def test_data_in_holes_is_zero_and_all_else_is_as_without_looking(
    monkeypatch, seed: int, most: int
) -> None:
    monkeypatch.setattr(extents_module, "MAX_PIECES", most)
    rng = random.Random(f"extents {seed}")
    mapping, size = disk(rng)
    share = rng.choice([0, 0.02, 0.5, 0.98, 1])
    there = {number: b"x" for number in range(400 * CLUSTER // BLOCK) if rng.random() < share}
    data = Sparse(there, 400 * CLUSTER)
    low, high = sorted(rng.sample(range(0, size, BLOCK), 2))
    plain = Extents.concatenate(list(extents(Stratum(mapping, data, size), low, high)))
    looked = list(extents(Stratum(mapping, data, size, sparse=True), low, high))
    broken = Extents.concatenate(looked)
    assert int(broken.start[0]) == low
    assert (broken.start[1:] == (broken.start + broken.length)[:-1]).all()
    assert int(broken.start[-1] + broken.length[-1]) == high
    shown = np.repeat(broken.zero, broken.length // BLOCK).tolist()
    assert shown == zeros_of(plain, data)
    at = plain.split(broken.start, high)
    assert (at.offset == broken.offset).all()
    assert (at.data == broken.data).all()
    assert len(data.asked) <= len(there) + 1


def test_a_hole_is_asked_about_once_however_much_is_mapped_to_it() -> None:
    mapping, size = disk(random.Random("holes"))
    data = Sparse({0: b"x"}, 400 * CLUSTER)
    assert len(Extents.concatenate(list(extents(Stratum(mapping, data, size), 0, size)))) > 100
    assert all(rows.zero.all() for rows in extents(Stratum(mapping, data, size, True), 0, size))
    assert len(data.asked) == 1


def test_thousands_of_places_of_the_same_holes_are_broken_some_at_a_time() -> None:
    made = ImageBuilder(cluster_bits=16, size=1 << 29)
    made.write(0, b"x")
    image = made.build()
    table, word = image.l2_table(0), image.word(image.l2_at(0))
    image.data[table : table + (1 << 16)] = word.to_bytes(8, "big") * (1 << 13)
    header = image.header
    mapping = Mapping(
        Bytes(bytes(image.data)), image.geometry, header.l1_table_offset, header.l1_size
    )
    offset = word & entries.L2_OFFSET
    there = {offset // BLOCK + at: b"x" for at in range(0, 128, 2)}
    stratum = Stratum(mapping, Sparse(there, 1 << 20), 1 << 29, sparse=True)
    tracemalloc.start()
    rows = sum(len(batch) for batch in extents(stratum, 0, 1 << 29))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows == 128 << 13
    assert peak < 40 << 20
