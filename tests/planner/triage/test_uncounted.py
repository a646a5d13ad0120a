"""planner.triage.uncounted: what is asked of a file that is nearly all holes."""

from planner.check.check import check_image
from planner.triage.uncounted import uncounted_clusters
from tests.images.builder import ImageBuilder
from tests.planner.sources import Sparse


def test_clusters_without_a_refcount_block_are_looked_for_together() -> None:
    builder = ImageBuilder(cluster_bits=9, size=64 << 9, refcount_order=6)
    builder.write(0, b"guest")
    image = builder.build()
    far = 1 << 42
    image.set_word(image.l2_at(0), far | 1 << 63)
    source = Sparse.of(bytes(image.data), far + 512)
    source.blocks[far // 512 - 7] = b"lost".ljust(512, b"\0")
    report = check_image(source)
    asked = len(source.asked)
    assert (far >> 9) - 7 in uncounted_clusters(source, report).tolist()
    assert len(source.asked) - asked < 10
