"""Rules about L1 and L2 tables: their entries, COPIED, compressed clusters and subclusters."""

from __future__ import annotations

from planner.findings.kinds import ACTIVE, NONE, Structure
from planner.findings.kinds import FindingKind as Kind
from planner.qcow2 import entries
from tests.images.builder import Image
from tests.images.corpus.rule import (
    COMPRESSED,
    COPIED,
    COVERAGE,
    SIZE,
    WIDTH,
    Expected,
    Rule,
    at_cluster,
    builder,
    contested,
    extended,
    fill,
    finding,
    in_guest,
    leak,
    low,
    missing,
    of_l1,
    plain,
    rule,
    with_snapshot,
)


def past_end(image: Image) -> int:
    return len(image.data) + 7 * SIZE


# L1 entries


@rule
def l1_reserved_bits() -> Rule:
    """Reserved bits in an L1 entry are one corruption, and the L2 table is walked even so."""
    image = plain()
    at = image.l1_at(1)
    sound = image.word(at)
    image.set_bits(at, 1 << 60 | 1 << 8)
    return Rule(
        image,
        [
            finding(
                Kind.L1_ENTRY_RESERVED,
                structure=Structure.L1_TABLE,
                **of_l1(1, image),
                found=sound | 1 << 60 | 1 << 8,
                expected=sound,
            )
        ],
        corruptions=1,
    )


@rule
def l1_every_reserved_bit() -> Rule:
    """However many reserved bits an entry has set, it is one corruption."""
    image = plain()
    image.set_bits(image.l1_at(0), entries.L1_RESERVED)
    return Rule(image, [finding(Kind.L1_ENTRY_RESERVED, l1_index=0)], corruptions=1)


@rule
def l1_misaligned() -> Rule:
    """A misaligned L2 table is a corruption; its clusters are counted, and it is walked even so."""
    image = plain()
    table, data = image.l2_table(1), image.host_offset(WIDTH)
    image.set_word(image.l1_at(1), (table + 512) | COPIED)
    return Rule(
        image,
        [
            finding(
                Kind.L2_TABLE_MISALIGNED,
                structure=Structure.L1_TABLE,
                **of_l1(1, image),
                found=table + 512,
            ),
            missing(table // SIZE + 1),
            leak(data // SIZE),
        ],
        corruptions=2,
        leaks=1,
        needs_rebuild=True,
        complete=False,
    )


@rule
def l1_past_end() -> Rule:
    """An L2 table past the end counts nothing and reads as zeros: what it mapped is leaked."""
    image = plain()
    table, data = image.l2_table(1), image.host_offset(WIDTH)
    beyond = past_end(image)
    image.set_word(image.l1_at(1), beyond | COPIED)
    return Rule(
        image,
        [
            finding(
                Kind.PAST_END,
                structure=Structure.L2_TABLE,
                host_offset=beyond,
                length=SIZE,
                snapshot=ACTIVE,
                l1_index=1,
                guest_offset=COVERAGE,
                guest_length=COVERAGE,
                found=beyond,
            ),
            finding(Kind.L1_COPIED, **of_l1(1, image), found=1, expected=0),
            leak(min(table, data) // SIZE, 2),
        ],
        corruptions=2,
        leaks=2,
        complete=False,
    )


@rule
def l1_entry_zeroed() -> Rule:
    """A lost L2 table shows as leaks: the table, and all that it maps."""
    image = plain()
    first = min(image.l2_table(1), image.host_offset(WIDTH)) // SIZE
    image.set_word(image.l1_at(1), 0)
    return Rule(image, [leak(first, 2)], leaks=2)


@rule
def l1_two_entries_on_one_table() -> Rule:
    """An L2 table with two L1 entries is counted twice, and so is all that it maps."""
    image = plain()
    image.set_word(image.l1_at(1), image.word(image.l1_at(0)))
    assert sorted([image.l2_table(0), *map(image.host_offset, (0, 1, 2, 5))]) == [
        cluster * SIZE for cluster in range(1, 6)
    ]
    return Rule(
        image,
        [low(1, 5), leak(6, 2), *(contested(cluster) for cluster in range(1, 6))],
        corruptions=5,
        leaks=2,
    )


# L2 entries


@rule
def l2_reserved_bits() -> Rule:
    """Reserved bits in an L2 entry are one corruption; the cluster counts."""
    image = plain()
    at = image.l2_at(1)
    sound = image.word(at)
    image.set_bits(at, entries.L2_RESERVED)
    return Rule(
        image,
        [
            finding(
                Kind.L2_ENTRY_RESERVED,
                structure=Structure.L2_TABLE,
                **in_guest(1, image),
                found=sound | entries.L2_RESERVED,
                expected=sound,
            )
        ],
        corruptions=1,
    )


@rule
def l2_reserved_bits_of_an_unallocated_entry() -> Rule:
    """Reserved bits count where there is no cluster, too."""
    image = plain()
    image.set_word(image.l2_at(100), 1 << 61)
    return Rule(
        image,
        [finding(Kind.L2_ENTRY_RESERVED, **in_guest(100, image), found=1 << 61, expected=0)],
        corruptions=1,
    )


@rule
def l2_reserved_bits_of_a_zero_entry() -> Rule:
    """A cluster of zeros may have no other low bit."""
    made = fill(builder())
    made.write_zeros(9)
    image = made.build()
    image.set_bits(image.l2_at(9), 2)
    return Rule(
        image,
        [finding(Kind.L2_ENTRY_RESERVED, **in_guest(9, image), found=3, expected=1)],
        corruptions=1,
    )


@rule
def l2_zero_bit_with_extended_entries() -> Rule:
    """With extended L2 entries bit 0 is ignored."""
    image = fill(extended()).build()
    image.set_bits(image.l2_at(1), 1)
    return Rule(image, [])


@rule
def l2_reserved_bits_of_a_compressed_entry() -> Rule:
    """In a compressed entry these bits are its length: one sector more, in the same cluster."""
    made = builder()
    made.write_compressed(3, b"x")
    image = made.build()
    image.set_bits(image.l2_at(3), 1 << made.geometry.compressed_shift)
    return Rule(image, [])


@rule
def l2_data_misaligned() -> Rule:
    """A misaligned data cluster is a corruption; every cluster that it touches is counted."""
    image = plain()
    at, data = image.l2_at(1), image.host_offset(1)
    image.set_bits(at, 512)
    third = data // SIZE + 1
    return Rule(
        image,
        [
            finding(
                Kind.DATA_MISALIGNED,
                structure=Structure.L2_TABLE,
                **in_guest(1, image),
                found=data + 512,
            ),
            low(third),
            contested(third),
        ],
        corruptions=2,
    )


@rule
def l2_zero_misaligned() -> Rule:
    """A misaligned preallocated cluster of zeros is a kind of its own: `all` mends it."""
    made = fill(builder())
    made.write_zeros(9, allocated=True)
    made.skip()
    image = made.build()
    at, offset = image.l2_at(9), image.host_offset(9)
    image.set_bits(at, 1024)
    return Rule(
        image,
        [
            finding(Kind.ZERO_MISALIGNED, **in_guest(9, image), found=offset + 1024),
            missing(offset // SIZE + 1),
        ],
        corruptions=2,
        needs_rebuild=True,
    )


@rule
def l2_misaligned_without_allocated_subclusters() -> Rule:
    """With extended entries a cluster without allocated subclusters holds no data."""
    made = fill(extended())
    made.write_zeros(9, allocated=True)
    made.skip()
    image = made.build()
    offset = image.host_offset(9)
    image.set_bits(image.l2_at(9), 512)
    return Rule(
        image,
        [
            finding(Kind.ZERO_MISALIGNED, **in_guest(9, image), found=offset + 512),
            finding(Kind.REFCOUNT_MISSING, host_offset=offset + (1 << 14), found=0, expected=1),
        ],
        corruptions=2,
        needs_rebuild=True,
    )


@rule
def l2_data_past_end() -> Rule:
    """A data cluster past the end counts nothing; its refcount is 0, so COPIED is wrong too."""
    image = plain()
    old, beyond = image.host_offset(1), past_end(image)
    image.set_word(image.l2_at(1), beyond | COPIED)
    return Rule(
        image,
        [
            finding(Kind.PAST_END, structure=Structure.DATA, **in_guest(1, image), found=beyond),
            finding(Kind.L2_COPIED, **in_guest(1, image), found=1, expected=0),
            leak(old // SIZE),
        ],
        corruptions=2,
        leaks=1,
    )


@rule
def l2_data_past_end_that_is_counted_as_used() -> Rule:
    """COPIED is judged by the stored refcount even where the file does not reach."""
    image = plain()
    old, beyond = image.host_offset(1), past_end(image)
    image.set_refcount(beyond // SIZE, 1)
    image.set_word(image.l2_at(1), beyond | COPIED)
    return Rule(
        image,
        [
            finding(Kind.PAST_END, structure=Structure.DATA, **in_guest(1, image), found=beyond),
            leak(old // SIZE),
        ],
        corruptions=1,
        leaks=1,
    )


@rule
def l2_data_right_behind_the_end() -> Rule:
    """A cluster that begins at the end of the file reaches one whole cluster past it."""
    image = plain()
    old, beyond = image.host_offset(1), len(image.data)
    image.set_word(image.l2_at(1), beyond)
    return Rule(
        image,
        [
            finding(Kind.PAST_END, structure=Structure.DATA, **in_guest(1, image), found=beyond),
            leak(old // SIZE),
        ],
        corruptions=1,
        leaks=1,
    )


@rule
def l2_data_at_the_highest_offset() -> Rule:
    """The highest offset that an entry can hold is past the end as any other."""
    image = plain()
    old, beyond = image.host_offset(1), entries.L2_OFFSET & ~(SIZE - 1)
    image.set_word(image.l2_at(1), beyond)
    return Rule(
        image,
        [
            finding(Kind.PAST_END, structure=Structure.DATA, **in_guest(1, image), found=beyond),
            leak(old // SIZE),
        ],
        corruptions=1,
        leaks=1,
    )


@rule
def file_cut_inside_a_cluster() -> Rule:
    """A region that reaches less than a cluster past the end is whole."""
    image = plain()
    del image.data[-512:]
    return Rule(image, [])


@rule
def file_cut_inside_a_sector() -> Rule:
    """QEMU counts a file in whole sectors."""
    image = plain()
    del image.data[-1:]
    return Rule(image, [])


@rule
def two_entries_on_one_cluster() -> Rule:
    """Two guest clusters on one host cluster: its refcount is too low, the other is leaked."""
    image = plain()
    lost, kept = image.host_offset(5), image.host_offset(1)
    image.set_word(image.l2_at(5), image.word(image.l2_at(1)))
    return Rule(
        image,
        [
            low(kept // SIZE),
            leak(lost // SIZE),
            contested(kept // SIZE, guest_offset=SIZE, guest_length=SIZE),
        ],
        corruptions=1,
        leaks=1,
    )


@rule
def two_entries_on_one_cluster_counted_right() -> Rule:
    """A right refcount does not make two guest clusters on one host cluster right."""
    image = plain()
    lost, kept = image.host_offset(5), image.host_offset(1)
    image.set_word(image.l2_at(1), kept)
    image.set_word(image.l2_at(5), kept)
    image.set_refcount(kept // SIZE, 2)
    image.set_refcount(lost // SIZE, 0)
    return Rule(image, [contested(kept // SIZE)])


@rule
def entry_on_its_own_l2_table() -> Rule:
    """A guest cluster on a live L2 table."""
    image = plain()
    lost, table = image.host_offset(5), image.l2_table(0)
    image.set_word(image.l2_at(5), table | COPIED)
    return Rule(
        image,
        [
            low(table // SIZE),
            leak(lost // SIZE),
            contested(table // SIZE, guest_offset=5 * SIZE),
        ],
        corruptions=1,
        leaks=1,
    )


# Compressed entries


@rule
def compressed_copied() -> Rule:
    """A compressed entry must not have COPIED set; its range is counted."""
    made = fill(builder())
    made.write_compressed(9, b"x")
    image = made.build()
    sound = image.word(image.l2_at(9))
    image.set_bits(image.l2_at(9), COPIED)
    return Rule(
        image,
        [
            finding(
                Kind.COMPRESSED_COPIED,
                structure=Structure.L2_TABLE,
                **in_guest(9, image),
                found=sound | COPIED,
                expected=sound,
            )
        ],
        corruptions=1,
    )


@rule
def compressed_past_end() -> Rule:
    """A compressed range past the end counts nothing, and has no part in the file."""
    made = fill(builder())
    made.write_compressed(9, b"x")
    image = made.build()
    old = image.word(image.l2_at(9)) & entries.compressed_offset_mask(made.geometry)
    beyond = past_end(image) + 77
    image.set_word(image.l2_at(9), COMPRESSED | beyond)
    return Rule(
        image,
        [
            finding(
                Kind.PAST_END, structure=Structure.COMPRESSED, **in_guest(9, image), found=beyond
            ),
            leak(old // SIZE),
        ],
        corruptions=1,
        leaks=1,
    )


@rule
def compressed_range_over_two_clusters() -> Rule:
    """A compressed range counts in every cluster from its first byte to its last."""
    made = fill(builder())
    made.write_compressed(9, b"x")
    made.write(10, b"e" * SIZE)
    image = made.build()
    shift = made.geometry.compressed_shift
    start = image.word(image.l2_at(9)) & entries.compressed_offset_mask(made.geometry)
    image.set_word(image.l2_at(9), COMPRESSED | 8 << shift | start)
    behind = image.host_offset(10)
    assert behind == start + SIZE
    return Rule(
        image,
        [
            low(behind // SIZE),
            contested(behind // SIZE, guest_offset=10 * SIZE),
        ],
        corruptions=1,
    )


@rule
def compressed_clusters_in_one_host_cluster() -> Rule:
    """Compressed clusters may share a host cluster: each counts, and none contests another."""
    made = builder()
    for cluster in range(4):
        made.write_compressed(cluster, bytes([cluster]) * SIZE)
    image = made.build()
    start = image.word(image.l2_at(0)) & entries.compressed_offset_mask(made.geometry)
    image.set_refcount(start // SIZE, 3)
    return Rule(
        image,
        [finding(Kind.REFCOUNT_LOW, **at_cluster(start // SIZE), found=3, expected=4)],
        corruptions=1,
    )


@rule
def compressed_with_data_file() -> Rule:
    """A compressed entry in an image with an external data file: nothing is counted."""
    image = plain(data_file=b"data.raw")
    image.set_word(image.l2_at(9), COMPRESSED | 5 * SIZE)
    return Rule(
        image,
        [
            finding(
                Kind.COMPRESSED_WITH_DATA_FILE,
                structure=Structure.L2_TABLE,
                **in_guest(9, image),
                found=COMPRESSED | 5 * SIZE,
            )
        ],
        corruptions=1,
    )


@rule
def compressed_subclusters() -> Rule:
    """A compressed entry with a subcluster bitmap: nothing is counted."""
    made = fill(extended())
    made.write_compressed(9, b"x")
    image = made.build()
    start = image.word(image.l2_at(9)) & entries.compressed_offset_mask(made.geometry)
    image.set_word(image.l2_at(9) + 8, 1 << 40 | 1)
    return Rule(
        image,
        [
            finding(Kind.COMPRESSED_SUBCLUSTERS, **in_guest(9, image), found=1 << 40 | 1),
            finding(Kind.LEAK, host_offset=start >> 14 << 14, count=1, found=1, expected=0),
        ],
        corruptions=1,
        leaks=1,
    )


# Subclusters


@rule
def subcluster_conflict() -> Rule:
    """A subcluster both allocated and zero; the cluster counts."""
    image = fill(extended()).build()
    image.set_word(image.l2_at(1) + 8, 0b110 << 32 | 0b011)
    return Rule(
        image,
        [finding(Kind.SUBCLUSTER_CONFLICT, **in_guest(1, image), found=0b110 << 32 | 0b011)],
        corruptions=1,
    )


@rule
def subclusters_of_an_unallocated_cluster() -> Rule:
    """Allocated subclusters without a cluster."""
    image = fill(extended()).build()
    image.set_word(image.l2_at(9) + 8, 1 << 33 | 1 << 31)
    return Rule(
        image,
        [finding(Kind.UNALLOCATED_SUBCLUSTERS, **in_guest(9, image), found=1 << 33 | 1 << 31)],
        corruptions=1,
    )


@rule
def zero_subclusters_of_an_unallocated_cluster() -> Rule:
    """Subclusters that read as zeros need no cluster."""
    image = fill(extended()).build()
    image.set_word(image.l2_at(9) + 8, 0xFFFF_FFFF << 32)
    return Rule(image, [])


# COPIED


def full() -> Image:
    """The first L2 table is full: guest cluster 0 in host cluster 1, the others from 3 on."""
    made = builder()
    made.write(0, b"f" * COVERAGE)
    return made.build()


@rule
def full_table_of_adjacent_clusters() -> Rule:
    """Adjacent clusters are counted as one run, and come to the same."""
    image = full()
    counted = {"allocated_clusters": WIDTH, "fragmented_clusters": 1, "compressed_clusters": 0}
    return Rule(image, [], counters=counted)


@rule
def full_table_with_a_leak_and_a_missing_flag() -> Rule:
    """What is wrong inside a run of adjacent clusters is found where it is."""
    image = full()
    image.set_refcount(100, 2)
    image.clear_bits(image.l2_at(200), COPIED)
    counted = {"allocated_clusters": WIDTH, "fragmented_clusters": 1}
    return Rule(
        image,
        [
            finding(Kind.L2_COPIED, **in_guest(98, image), found=1, expected=0),
            finding(Kind.L2_COPIED, **in_guest(200, image), found=0, expected=1),
            leak(100, found=2, expected=1),
        ],
        corruptions=2,
        leaks=1,
        counters=counted,
    )


@rule
def full_table_that_two_l1_entries_lead_to() -> Rule:
    """A run counts as often as its table does."""
    image = full()
    image.set_word(image.l1_at(1), image.word(image.l1_at(0)))
    return Rule(
        image,
        [low(1, WIDTH + 1), *(contested(cluster) for cluster in range(1, WIDTH + 2))],
        corruptions=WIDTH + 1,
        counters={"allocated_clusters": 2 * WIDTH, "fragmented_clusters": 2},
    )


@rule
def full_table_that_runs_past_the_end() -> Rule:
    """Only the clusters of a run that the file does not reach are lost."""
    image = full()
    word = image.word(image.l2_at(WIDTH - 1))
    beyond = len(image.data) - SIZE
    for number in range(8):
        image.set_word(image.l2_at(WIDTH - 8 + number), (beyond + number * SIZE) | COPIED)
    assert word == (WIDTH + 1) * SIZE | COPIED
    last = beyond // SIZE
    return Rule(
        image,
        [
            *(finding(Kind.PAST_END, **in_guest(WIDTH - 7 + number, image)) for number in range(7)),
            finding(Kind.L2_COPIED, l2_index=WIDTH - 7, count=7, found=1, expected=0),
            finding(Kind.REFBLOCK_SHARED, index=0, found=2, expected=1),
            low(last),
            contested(last),
            leak(WIDTH - 6, 8),
        ],
        corruptions=7 + 7 + 1 + 1,
        leaks=8,
        needs_rebuild=True,
    )


@rule
def l1_copied_missing() -> Rule:
    """An L2 table with refcount 1 needs COPIED in its L1 entry."""
    image = plain()
    image.clear_bits(image.l1_at(1), COPIED)
    return Rule(
        image,
        [
            finding(
                Kind.L1_COPIED,
                structure=Structure.L1_TABLE,
                **of_l1(1, image),
                found=0,
                expected=1,
            )
        ],
        corruptions=1,
    )


@rule
def l1_copied_of_a_shared_table() -> Rule:
    """An L2 table that a snapshot shares must not have COPIED in the active L1 entry."""
    image = with_snapshot()
    image.set_bits(image.l1_at(1), COPIED)
    return Rule(
        image, [finding(Kind.L1_COPIED, **of_l1(1, image), found=1, expected=0)], corruptions=1
    )


@rule
def l2_copied_missing() -> Rule:
    """A cluster with refcount 1 needs COPIED in its L2 entry."""
    image = plain()
    image.clear_bits(image.l2_at(1), COPIED)
    return Rule(
        image,
        [
            finding(
                Kind.L2_COPIED,
                structure=Structure.L2_TABLE,
                **in_guest(1, image),
                found=0,
                expected=1,
            )
        ],
        corruptions=1,
    )


@rule
def l2_copied_of_a_shared_cluster() -> Rule:
    """A cluster that a snapshot shares must not have COPIED in the active L2 entry."""
    image = with_snapshot()
    image.set_bits(image.l2_at(1), COPIED)
    return Rule(
        image,
        [finding(Kind.L2_COPIED, **in_guest(1, image), found=1, expected=0)],
        corruptions=1,
    )


@rule
def l2_copied_of_a_preallocated_zero_cluster() -> Rule:
    """COPIED is judged for preallocated clusters of zeros, too."""
    made = fill(builder())
    made.write_zeros(9, allocated=True)
    image = made.build()
    image.clear_bits(image.l2_at(9), COPIED)
    return Rule(
        image,
        [finding(Kind.L2_COPIED, **in_guest(9, image), found=0, expected=1)],
        corruptions=1,
    )


@rule
def l2_copied_of_nothing() -> Rule:
    """COPIED is not judged where there is no cluster."""
    made = fill(builder())
    made.write_zeros(9)
    image = made.build()
    image.set_bits(image.l2_at(9), COPIED)
    image.set_bits(image.l2_at(10), COPIED)
    return Rule(image, [])


@rule
def l2_copied_missing_with_data_file() -> Rule:
    """With an external data file COPIED is always set."""
    image = plain(data_file=b"data.raw")
    image.clear_bits(image.l2_at(1), COPIED)
    return Rule(
        image,
        [finding(Kind.L2_COPIED, **in_guest(1, image), found=0, expected=1)],
        corruptions=1,
    )


@rule
def l2_data_anywhere_in_a_data_file() -> Rule:
    """Offsets into an external data file count nothing and may lie anywhere."""
    image = plain(data_file=b"data.raw")
    image.set_word(image.l2_at(1), 1 << 50 | COPIED)
    return Rule(image, [])


@rule
def l2_data_misaligned_in_a_data_file() -> Rule:
    """Offsets into an external data file are aligned, too."""
    image = plain(data_file=b"data.raw")
    image.set_word(image.l2_at(1), 1 << 50 | 512 | COPIED)
    return Rule(
        image,
        [finding(Kind.DATA_MISALIGNED, **in_guest(1, image), found=1 << 50 | 512)],
        corruptions=1,
    )


@rule
def copied_follows_the_stored_refcount() -> Rule:
    """COPIED is judged by the refcount that is stored, not by the one that would be right."""
    image = plain()
    cluster = image.host_offset(1) // SIZE
    image.set_refcount(cluster, 2)
    return Rule(
        image,
        [
            finding(Kind.L2_COPIED, **in_guest(1, image), found=1, expected=0),
            leak(cluster, found=2, expected=1),
        ],
        corruptions=1,
        leaks=1,
    )


# Beyond the end of the disk


def beyond_disk_end(mapped: int) -> Expected:
    """The note that so many bytes are mapped there."""
    return finding(
        Kind.BEYOND_DISK_END,
        structure=Structure.HEADER,
        host_offset=24,
        guest_offset=NONE,
        found=mapped,
    )


@rule
def beyond_disk_end_within_a_table() -> Rule:
    """A disk that ends before some of the clusters that its last L2 table maps."""
    image = plain()
    image.change_header(size=2 * image.cluster_size - 512)
    return Rule(image, [beyond_disk_end(3 * SIZE)])


@rule
def beyond_disk_end_in_further_tables() -> Rule:
    """An L2 table that lies wholly beyond the end of the disk."""
    image = plain()
    image.change_header(size=COVERAGE)
    return Rule(image, [beyond_disk_end(SIZE)])


@rule
def beyond_disk_end_of_subclusters() -> Rule:
    """With extended L2 entries only the subclusters count that hold data."""
    made = extended()
    size = made.geometry.cluster_size
    made.write(0, b"x" * size)
    made.write_subclusters(1, b"y" * size, 0b1011, 0)
    image = made.build()
    image.change_header(size=size)
    return Rule(image, [beyond_disk_end(3 * size // 32)])


@rule
def beyond_disk_end_saved_by_a_snapshot() -> Rule:
    """What a snapshot keeps of a machine's state there is no matter of the disk's."""
    made = fill(builder())
    made.take_snapshot("running", extra_data=(1).to_bytes(8, "big") + COVERAGE.to_bytes(8, "big"))
    image = made.build()
    image.change_header(size=COVERAGE)
    return Rule(image, [])


@rule
def beyond_disk_end_shared_with_a_snapshot() -> Rule:
    """A snapshot without a machine's state explains nothing."""
    made = fill(builder())
    made.take_snapshot("off")
    image = made.build()
    image.change_header(size=COVERAGE)
    return Rule(image, [beyond_disk_end(SIZE)])


# Tables that something else was written over


@rule
def l2_table_overwritten() -> Rule:
    """Where no word could have been an entry the table is gone, and what it mapped with it."""
    image = plain()
    wild = 0x3E
    for cluster in (0, 1, 2, 5):
        image.set_word(image.l2_at(cluster), wild)
    reserved = [
        finding(Kind.L2_ENTRY_RESERVED, **in_guest(cluster, image), found=wild, expected=0)
        for cluster in (0, 1, 2, 5)
    ]
    window = {**of_l1(0, image), "host_offset": image.l2_table(0), "length": SIZE}
    gone = finding(Kind.TABLE_OVERWRITTEN, structure=Structure.L2_TABLE, **window)
    return Rule(image, [*reserved, gone, leak(1), leak(3, 3)], corruptions=4, leaks=4)


@rule
def l2_table_overwritten_in_part() -> Rule:
    """The rest of the table is still one."""
    made = builder()
    for cluster in (0, 64, 128, 192):  # a sector of the table each
        made.write(cluster, b"d" * SIZE)
    image = made.build()
    wild = [0x3E] * 4
    for number, word in enumerate(wild, 64):
        image.set_word(image.l2_at(number), word)
    reserved = [
        finding(Kind.L2_ENTRY_RESERVED, **in_guest(number, image), found=0x3E, expected=0)
        for number in range(64, 68)
    ]
    part = {**in_guest(64, image), "length": 512, "guest_length": 64 * SIZE}
    gone = finding(Kind.TABLE_OVERWRITTEN, structure=Structure.L2_TABLE, **part)
    return Rule(image, [*reserved, gone, leak(3)], corruptions=4, leaks=1)


@rule
def l1_table_overwritten() -> Rule:
    """An L1 table of which nothing could have been an entry is gone with the whole disk."""
    image = builder(size=8 * COVERAGE).build()
    words = [(1 << 50) + number * SIZE for number in range(4)]
    for number, word in enumerate(words):
        image.set_word(image.l1_at(number), word)
    beyond = [
        finding(
            Kind.PAST_END,
            structure=Structure.L2_TABLE,
            snapshot=ACTIVE,
            l1_index=number,
            host_offset=word,
            length=SIZE,
            found=word,
        )
        for number, word in enumerate(words)
    ]
    gone = finding(
        Kind.TABLE_OVERWRITTEN,
        structure=Structure.L1_TABLE,
        host_offset=image.header.l1_table_offset,
        length=64,
        snapshot=ACTIVE,
        guest_offset=0,
        guest_length=8 * COVERAGE,
    )
    return Rule(image, [*beyond, gone], corruptions=4, complete=False)


@rule
def zero_flag_in_version_2() -> Rule:
    """Version 2 knows no zero flag: QEMU counts nothing, and gives the guest an error."""
    image = plain(version=2)
    word = image.word(image.l2_at(1)) | entries.ZERO
    image.set_word(image.l2_at(1), word)
    flag = finding(Kind.ZERO_IN_VERSION_2, **in_guest(1, image), found=word)
    return Rule(image, [flag])
