"""Rules about refcounts: stored against counted, the refcount table and its blocks, the width."""

from __future__ import annotations

from planner.findings.kinds import FindingKind as Kind
from planner.findings.kinds import Structure
from planner.source import READABLE_END
from tests.images.builder import Image
from tests.images.corpus.rule import (
    COPIED,
    SIZE,
    WIDTH,
    Rule,
    at_cluster,
    builder,
    contested,
    fill,
    finding,
    free_cluster,
    in_guest,
    leak,
    low,
    missing,
    of_l1,
    plain,
    rule,
    with_snapshot,
)


def of_reftable(index: int, image: Image) -> dict[str, int]:
    return {
        "structure": Structure.REFTABLE,
        "host_offset": image.reftable_at(index),
        "index": index,
    }


@rule
def leaked_cluster() -> Rule:
    """A refcount without a reference is a leak."""
    image = plain()
    cluster = free_cluster(image)
    image.set_refcount(cluster, 1)
    return Rule(
        image,
        [
            finding(
                Kind.LEAK,
                structure=Structure.CLUSTER,
                **at_cluster(cluster),
                found=1,
                expected=0,
            )
        ],
        leaks=1,
    )


@rule
def leak_of_many() -> Rule:
    """A refcount above the number of references is one leak, however far above."""
    image = plain()
    cluster = image.l2_table(1) // SIZE
    image.set_refcount(cluster, 500)
    return Rule(
        image,
        [
            finding(Kind.L1_COPIED, l1_index=1, found=1, expected=0),
            leak(cluster, found=500, expected=1),
        ],
        corruptions=1,
        leaks=1,
    )


@rule
def leaks_in_runs() -> Rule:
    """Neighbours with the same numbers are one finding, and each of them a leak."""
    made = fill(builder())
    made.skip(3)
    made.write(9, b"x")
    made.skip(2)
    image = made.build()
    free = [cluster for cluster, count in enumerate(image.refcounts()) if not count]
    for cluster in free:
        image.set_refcount(cluster, 1)
    image.set_refcount(free[-1], 2)
    return Rule(
        image,
        [
            leak(free[0], 4, found=1, expected=0),
            leak(free[4], found=1, expected=0),
            leak(free[5], found=2, expected=0),
        ],
        leaks=6,
    )


@rule
def leak_behind_the_end_of_the_file() -> Rule:
    """Refcounts of clusters that the file does not reach are not compared."""
    image = plain()
    image.set_refcount(image.host_clusters + 1, 1)
    return Rule(image, [])


@rule
def leak_behind_the_end_that_a_lost_table_led_to() -> Rule:
    """Behind the end nothing leaks to QEMU; a table without entries may have led there."""
    image = plain()
    data = image.host_offset(image.geometry.l2_entries)
    image.set_word(image.l2_at(image.geometry.l2_entries), 0)
    image.set_refcount(data // SIZE, 0)
    for number in range(3):
        image.set_refcount(image.host_clusters + number, 1)
    return Rule(
        image,
        [
            finding(
                Kind.LEAK_PAST_END,
                structure=Structure.CLUSTER,
                host_offset=len(image.data),
                length=3 * SIZE,
                found=3,
            )
        ],
    )


@rule
def refcount_low() -> Rule:
    """A refcount below the number of references; its COPIED flag was right before."""
    image = with_snapshot()
    cluster = image.host_offset(1) // SIZE
    image.set_refcount(cluster, 1)
    return Rule(
        image,
        [
            low(cluster),
            finding(Kind.L2_COPIED, **in_guest(1, image), found=0, expected=1),
        ],
        corruptions=2,
    )


@rule
def refcount_missing() -> Rule:
    """A used cluster with refcount 0: the refcount structure needs a rebuild."""
    image = plain()
    cluster = image.host_offset(1) // SIZE
    image.set_refcount(cluster, 0)
    return Rule(
        image,
        [
            missing(cluster),
            finding(Kind.L2_COPIED, **in_guest(1, image), found=1, expected=0),
        ],
        corruptions=2,
        needs_rebuild=True,
    )


@rule
def refcount_of_the_header_missing() -> Rule:
    """The header counts as one cluster at 0."""
    image = plain()
    image.set_refcount(0, 0)
    return Rule(
        image,
        [missing(0)],
        corruptions=1,
        needs_rebuild=True,
    )


@rule
def refcount_of_the_reftable_missing() -> Rule:
    """The clusters of the refcount table are counted."""
    image = plain()
    cluster = image.header.refcount_table_offset // SIZE
    image.set_refcount(cluster, 0)
    return Rule(
        image,
        [missing(cluster)],
        corruptions=1,
        needs_rebuild=True,
    )


@rule
def refcount_of_a_refblock_missing() -> Rule:
    """A refcount block is counted, in itself where it lies so."""
    image = plain()
    cluster = image.refblock(0) // SIZE
    image.set_refcount(cluster, 0)
    return Rule(
        image,
        [missing(cluster)],
        corruptions=1,
        needs_rebuild=True,
    )


@rule
def refcount_of_the_l1_table_high() -> Rule:
    """The active L1 table is counted."""
    image = plain()
    cluster = image.header.l1_table_offset // SIZE
    image.set_refcount(cluster, 3)
    return Rule(image, [leak(cluster, found=3, expected=1)], leaks=1)


@rule
def no_refcounts_at_all() -> Rule:
    """Without a refcount table everything counts as free; what refers to nothing is nothing."""
    image = plain()
    assert image.header.l1_table_offset == 9 * SIZE
    image.change_header(refcount_table_clusters=0)
    return Rule(
        image,
        [
            missing(0, 8),
            missing(9),
            *(finding(Kind.L1_COPIED, **of_l1(index, image), found=1) for index in (0, 1)),
            *(finding(Kind.L2_COPIED, **in_guest(at, image), found=1) for at in (5, WIDTH)),
            finding(Kind.L2_COPIED, l1_index=0, l2_index=0, guest_length=3 * SIZE, count=3),
        ],
        corruptions=9 + 2 + 5,
        needs_rebuild=True,
    )


# The refcount table


def two_blocks() -> Image:
    """An image with refcount blocks for 512 clusters each, and data behind the first 512."""
    made = fill(builder(refcount_order=6))
    made.skip(520)
    made.write(9, b"x")
    return made.build()


@rule
def reftable_entry_reserved() -> Rule:
    """Reserved bits in a refcount table entry; the block is not counted, so its cluster leaks."""
    image = plain()
    sound = image.word(image.reftable_at(0))
    image.set_bits(image.reftable_at(0), 3)
    return Rule(
        image,
        [
            finding(
                Kind.REFTABLE_ENTRY_RESERVED,
                **of_reftable(0, image),
                found=sound | 3,
                expected=sound,
            ),
            leak(sound // SIZE, found=1, expected=0),
        ],
        corruptions=1,
        leaks=1,
        needs_rebuild=True,
    )


@rule
def refblock_misaligned() -> Rule:
    """A misaligned refcount block: every lookup in it is a check error."""
    image = plain()
    clusters = image.host_clusters
    word = image.word(image.reftable_at(0)) + 512
    image.set_word(image.reftable_at(0), word)
    return Rule(
        image,
        [
            finding(
                Kind.REFCOUNT_UNREADABLE,
                **of_reftable(0, image),
                count=clusters,
                found=word,
            ),
            finding(Kind.REFBLOCK_MISALIGNED, **of_reftable(0, image), found=word),
        ],
        check_errors=clusters,
        corruptions=1,
        needs_rebuild=True,
    )


@rule
def second_refblock_misaligned() -> Rule:
    """Only the lookups in the misaligned block fail; the others are compared."""
    image = two_blocks()
    block = image.refblock(1)
    leaked = free_cluster(image)
    image.set_refcount(leaked, 1)
    image.set_word(image.reftable_at(1), block + 512)
    return Rule(
        image,
        [
            finding(
                Kind.REFCOUNT_UNREADABLE,
                **of_reftable(1, image),
                count=image.host_clusters - 512,
                found=block + 512,
            ),
            finding(Kind.REFBLOCK_MISALIGNED, **of_reftable(1, image), found=block + 512),
            leak(leaked, found=1, expected=0),
        ],
        check_errors=image.host_clusters - 512,
        corruptions=1,
        leaks=1,
        needs_rebuild=True,
    )


@rule
def refblock_past_end() -> Rule:
    """A refcount block past the end holds no refcounts."""
    image = two_blocks()
    old = image.refblock(1)
    behind = [
        cluster for cluster, count in enumerate(image.refcounts()) if count and cluster >= 512
    ]
    beyond = len(image.data) + 3 * SIZE
    image.set_word(image.reftable_at(1), beyond)
    behind.remove(old // SIZE)
    first, last = behind[0], behind[-1]
    assert behind == list(range(first, last + 1))
    return Rule(
        image,
        [
            finding(Kind.REFBLOCK_PAST_END, **of_reftable(1, image), found=beyond),
            finding(
                Kind.REFCOUNT_MISSING,
                **at_cluster(first, last - first + 1),
                found=0,
                expected=1,
            ),
            finding(Kind.L2_COPIED, **in_guest(9, image), found=1, expected=0),
        ],
        corruptions=1 + len(behind) + 1,
        needs_rebuild=True,
    )


def refblock_at(offset: int) -> Image:
    """An image of which the second refcount block would be at *offset*."""
    image = two_blocks()
    image.set_word(image.reftable_at(1), offset)
    return image


@rule
def refblock_at_the_end_of_any_file() -> Rule:
    """Where the last block of the longest file would be, zeros are read."""
    image = refblock_at(READABLE_END - SIZE)
    return Rule(
        image,
        [
            finding(Kind.REFBLOCK_PAST_END, **of_reftable(1, image), found=READABLE_END - SIZE),
            missing(529, 4),
            finding(Kind.L2_COPIED, **in_guest(9, image), found=1, expected=0),
        ],
        corruptions=6,
        needs_rebuild=True,
    )


@rule
def refblock_past_the_end_of_any_file() -> Rule:
    """No file reaches there: every lookup in the block is a check error."""
    image = refblock_at(READABLE_END)
    return Rule(
        image,
        [
            finding(
                Kind.REFCOUNT_UNREADABLE,
                **of_reftable(1, image),
                count=image.host_clusters - 512,
                found=READABLE_END,
            ),
            finding(Kind.REFBLOCK_PAST_END, **of_reftable(1, image), found=READABLE_END),
        ],
        check_errors=image.host_clusters - 512,
        corruptions=1,
        needs_rebuild=True,
    )


@rule
def refblock_right_behind_the_end() -> Rule:
    """A refcount block that begins where the file ends is past it as any other."""
    image = two_blocks()
    made = image.header.refcount_table_clusters
    assert made == 1
    image.set_word(image.reftable_at(2), len(image.data))
    return Rule(
        image,
        [finding(Kind.REFBLOCK_PAST_END, **of_reftable(2, image), found=len(image.data))],
        corruptions=1,
    )


@rule
def refblock_shared_with_data() -> Rule:
    """A refcount block's cluster that is counted for something else too needs a rebuild."""
    image = plain()
    block, lost = image.refblock(0), image.host_offset(5)
    image.set_word(image.l2_at(5), block | COPIED)
    return Rule(
        image,
        [
            finding(Kind.REFBLOCK_SHARED, **of_reftable(0, image), found=2, expected=1),
            low(block // SIZE),
            leak(lost // SIZE, found=1, expected=0),
            contested(block // SIZE, guest_offset=5 * SIZE),
        ],
        corruptions=2,
        leaks=1,
        needs_rebuild=True,
    )


@rule
def refblock_listed_twice() -> Rule:
    """A refcount block that two entries lead to is shared."""
    image = plain()
    block = image.refblock(0)
    image.set_word(image.reftable_at(1), block)
    return Rule(
        image,
        [
            finding(Kind.REFBLOCK_SHARED, **of_reftable(1, image), found=2, expected=1),
            low(block // SIZE),
            contested(block // SIZE),
        ],
        corruptions=2,
        needs_rebuild=True,
    )


@rule
def reftable_past_end() -> Rule:
    """A refcount table past the end reads as zeros: no refcounts."""
    made = builder()
    image = made.build()
    beyond = len(image.data) + 4 * SIZE
    image.change_header(refcount_table_offset=beyond)
    return Rule(
        image,
        [
            finding(
                Kind.PAST_END,
                structure=Structure.REFTABLE,
                host_offset=beyond,
                length=SIZE,
                found=beyond,
            ),
            missing(0, 2),
        ],
        corruptions=3,
        needs_rebuild=True,
        complete=False,
    )


# Width


@rule
def overflow_of_one_bit() -> Rule:
    """With one-bit refcounts a second reference overflows and is not counted."""
    image = plain(refcount_order=0)
    lost, kept = image.host_offset(5), image.host_offset(1)
    image.set_word(image.l2_at(5), kept | COPIED)
    return Rule(
        image,
        [
            finding(Kind.REFCOUNT_OVERFLOW, **at_cluster(kept // SIZE), found=2, expected=1),
            leak(lost // SIZE, found=1, expected=0),
            contested(kept // SIZE),
        ],
        corruptions=1,
        leaks=1,
    )


@rule
def overflow_by_two() -> Rule:
    """Each reference beyond what two bits hold is a corruption."""
    made = builder(refcount_order=1)
    for cluster in range(3):
        made.write_compressed(cluster, bytes([cluster]) * SIZE)
    image = made.build()
    word = image.word(image.l2_at(0))
    offset = word & (1 << made.geometry.compressed_shift) - 1
    image.set_word(image.l2_at(3), word)
    image.set_word(image.l2_at(4), word)
    found = finding(
        Kind.REFCOUNT_OVERFLOW,
        host_offset=offset // SIZE * SIZE,
        length=SIZE,
        count=2,
        found=5,
        expected=3,
    )
    return Rule(image, [found], corruptions=2)
