"""What refcounts count behind the end of a file, and nothing leads to: counted one by one here."""

from collections import Counter

import numpy as np
import pytest

from planner.arrays import I64
from planner.check.check import check_image
from planner.check.past_end import _Known, references_past_end
from planner.qcow2.refcounts import pack_refcounts
from tests.images.builder import Image, ImageBuilder

BITS = 9
FILLED = 6
"""Refcount blocks."""


def cut_off(order: int, leading_to: list[int]) -> tuple[Image, Counter[int]]:
    """An image with numbers in all its refcount blocks, and entries that lead to clusters; and the
    numbers that are of clusters behind its end.
    """
    builder = ImageBuilder(cluster_bits=BITS, refcount_order=order, size=1 << 20)
    builder.write(0, b"content")
    image = builder.build()
    for number, cluster in enumerate(leading_to):
        image.set_word(image.l2_at(1 + number), cluster << BITS)
    per_block, rng = image.geometry.refblock_entries, np.random.default_rng(order)
    top = min(image.geometry.refcount_max, 3)
    end, first = image.host_clusters + FILLED, image.host_clusters
    for number in range(FILLED):
        image.set_word(image.reftable_at(1 + number), (first + number) << BITS)
        numbers = rng.integers(0, top + 1, per_block).astype(np.uint64)
        numbers[rng.random(per_block) < 0.5] = 1
        image.data += pack_refcounts(numbers, order).tobytes()
    blocks = range((1 + FILLED) * per_block)
    return image, Counter({at: image.refcount(at) for at in blocks if at >= end})


@pytest.mark.parametrize("order", range(7))
def test_each_reference_behind_the_end_is_one_that_is_known_or_lost(order: int) -> None:
    per_block = 8 << BITS >> order
    known = [2 * per_block, 2 * per_block + 1, 2 * per_block + 1, 3 * per_block - 1, 5 * per_block]
    image, counted = cut_off(order, known)
    for cluster in known:
        assert cluster in counted
    lost = counted - Counter(known)
    report = check_image(image.source)
    assert references_past_end(image.source, report) == lost.total()


def test_clusters_of_a_piece_that_nothing_leads_into_are_not_looked_up_one_by_one(
    monkeypatch,
) -> None:
    looked_up, times = [0], _Known.times

    def of(known: _Known, clusters: I64) -> I64:
        looked_up[0] += len(clusters)
        return times(known, clusters)

    per_block = 8 << BITS
    image, counted = cut_off(0, [2 * per_block + 1])
    monkeypatch.setattr(_Known, "times", of)
    report = check_image(image.source)
    looked_up[0] = 0
    assert references_past_end(image.source, report) == counted.total() - counted[per_block * 2 + 1]
    assert looked_up[0] < 3 * per_block < counted.total()
