"""planner.metadata.refcounts: how many clusters are in use, against refcounts read one by one."""

import random

import numpy as np
import pytest

from planner.metadata.refcounts import Reftable, StoredRefcounts
from planner.qcow2.layout import Layout
from planner.source import Source
from tests.images.builder import ImageBuilder
from tests.planner.sources import Sparse


def stored(source: Source) -> StoredRefcounts:
    layout = Layout.read(source)
    return StoredRefcounts(source, layout, Reftable(source, layout))


@pytest.mark.parametrize("seed", range(4))
def test_a_block_counts_for_every_entry_that_leads_to_it(seed: int) -> None:
    rng = random.Random(seed)
    image = ImageBuilder(cluster_bits=9, size=1 << 20).build()
    table = Layout.read(image.source).header.refcount_table_offset
    blocks = [len(image.data) + n * 512 for n in range(3)]
    values = [[rng.choice([0, 0, 1, 3]) for _ in range(256)] for _ in blocks]
    for block in values:
        image.data += np.array(block, dtype=">u2").tobytes()
    chosen = [rng.choice([0, 1, 2, None]) for _ in range(64)]
    words = [0 if which is None else blocks[which] for which in chosen]
    image.data[table : table + 512] = np.array(words, dtype=">u8").tobytes()
    every = [n for which in chosen for n in (values[which] if which is not None else [0] * 256)]
    for clusters in (0, 1, 255, 256, 257, rng.randrange(64 * 256), 64 * 256):
        assert stored(image.source).in_use(clusters) == np.count_nonzero(every[:clusters])


def test_blocks_in_holes_are_not_read() -> None:
    image = ImageBuilder(cluster_bits=9, size=1 << 20).build()
    table = Layout.read(image.source).header.refcount_table_offset
    words = (1 << 30) + np.arange(64, dtype=">u8") * 512
    image.data[table : table + 512] = words.tobytes()
    source = Sparse.of(bytes(image.data), 1 << 40)
    refcounts = stored(source)
    before = source.bytes_read
    assert refcounts.in_use(64 * 256) == 0
    assert source.bytes_read == before
