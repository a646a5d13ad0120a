"""Rules about snapshots: the table that lists them, and what they hold."""

from __future__ import annotations

from planner.findings.kinds import ACTIVE, Structure
from planner.findings.kinds import FindingKind as Kind
from tests.images.builder import Image
from tests.images.corpus.rule import (
    COPIED,
    SIZE,
    Expected,
    Rule,
    builder,
    contested,
    fill,
    finding,
    leak,
    low,
    missing,
    plain,
    rule,
    with_snapshot,
)


def empty_snapshot(**options: object) -> Image:
    """A snapshot of a disk on which nothing had been written: an L1 table of zeros."""
    made = builder(**options)
    made.take_snapshot("empty")
    made.write(0, b"a" * SIZE)
    return made.build()


def of_entry(index: int, image: Image) -> dict[str, int]:
    """The columns of a finding about an entry of the snapshot table."""
    return {
        "structure": Structure.SNAPSHOT_TABLE,
        "host_offset": image.snapshots[index].offset,
        "index": index,
    }


def set_field(image: Image, index: int, offset: int, size: int, value: int) -> None:
    at = image.snapshots[index].offset + offset
    image.data[at : at + size] = value.to_bytes(size, "big")


# Reading the table


def stopped_at_table(image: Image) -> Expected:
    place = image.header.snapshots_offset
    return finding(Kind.CHECK_STOPPED, structure=Structure.SNAPSHOT_TABLE, host_offset=place)


@rule
def snapshot_table_too_long() -> Rule:
    """More than 65536 snapshots stop the check; the first, which is whole, is counted."""
    image = empty_snapshot()
    image.change_header(nb_snapshots=65537)
    return Rule(image, [stopped_at_table(image)], check_errors=1, complete=False)


@rule
def snapshot_table_misaligned() -> Rule:
    """A snapshot table that is not cluster aligned stops the check."""
    image = empty_snapshot()
    l1 = image.snapshots[0].l1_table_offset
    image.change_header(snapshots_offset=image.header.snapshots_offset + 8)
    return Rule(
        image,
        [finding(Kind.CHECK_STOPPED, structure=Structure.SNAPSHOT_TABLE), leak(l1 // SIZE, 2)],
        check_errors=1,
        leaks=2,
        complete=False,
    )


@rule
def snapshot_extra_data_too_long() -> Rule:
    """More than 1024 bytes of extra data stop the check; the snapshot is there all the same."""
    image = empty_snapshot()
    set_field(image, 0, 36, 4, 1025)
    return Rule(image, [stopped_at_table(image)], check_errors=1, complete=False)


@rule
def snapshot_entry_is_garbage() -> Rule:
    """What the second entry and those behind it listed is not known; the first is counted."""
    made = builder()
    for name in ("first", "second"):
        made.take_snapshot(name)
    image = made.build()
    first, second = image.snapshots
    image.data[second.offset : second.offset + 40] = b"\xff" * 40
    assert second.l1_table_offset == first.l1_table_offset + SIZE
    return Rule(
        image,
        [stopped_at_table(image), leak(second.l1_table_offset // SIZE)],
        check_errors=1,
        leaks=1,
        complete=False,
    )


@rule
def snapshot_extra_data_too_short() -> Rule:
    """Version 3 requires 16 bytes of extra data in every entry."""
    made = builder()
    made.take_snapshot("short", extra_data=bytes(15))
    made.take_snapshot("none", extra_data=b"")
    made.take_snapshot("enough")
    image = made.build()
    return Rule(
        image,
        [
            finding(Kind.SNAPSHOT_EXTRA_DATA, **of_entry(0, image), found=15, expected=16),
            finding(Kind.SNAPSHOT_EXTRA_DATA, **of_entry(1, image), found=0, expected=16),
        ],
        corruptions=2,
    )


@rule
def snapshot_extra_data_of_version_2() -> Rule:
    """Version 2 requires none."""
    made = builder(version=2)
    made.take_snapshot("none", extra_data=b"")
    return Rule(made.build(), [])


# What snapshots hold


@rule
def snapshot_lost() -> Rule:
    """A snapshot that the header does not count: what it holds shows as leaks."""
    image = with_snapshot()
    l1 = image.snapshots[0].l1_table_offset // SIZE
    image.change_header(nb_snapshots=0)
    return Rule(
        image,
        [
            leak(1, found=2, expected=1),  # Guest data that it shared,
            leak(2),  # its own L2 table,
            leak(3, 2, found=2, expected=1),
            leak(5),  # the old guest cluster 5,
            leak(6, 2, found=2, expected=1),  # the L2 table that it shared, with its data,
            leak(l1, 2),  # its L1 table and the snapshot table.
        ],
        leaks=9,
    )


@rule
def snapshot_refcount_of_the_table() -> Rule:
    """The snapshot table itself is counted."""
    image = empty_snapshot()
    cluster = image.header.snapshots_offset // SIZE
    image.set_refcount(cluster, 2)
    return Rule(image, [leak(cluster, found=2, expected=1)], leaks=1)


@rule
def snapshot_refcount_of_its_l1_table() -> Rule:
    """A snapshot's L1 table is counted."""
    image = empty_snapshot()
    cluster = image.snapshots[0].l1_table_offset // SIZE
    image.set_refcount(cluster, 0)
    return Rule(
        image,
        [missing(cluster)],
        corruptions=1,
        needs_rebuild=True,
    )


@rule
def snapshot_with_data_file() -> Rule:
    """Any snapshot in an image with an external data file is one corruption, for all of them."""
    made = builder(data_file=b"data.raw")
    made.take_snapshot("one")
    made.take_snapshot("two")
    image = made.build()
    return Rule(
        image,
        [
            finding(
                Kind.SNAPSHOTS_WITH_DATA_FILE,
                structure=Structure.SNAPSHOT_TABLE,
                host_offset=image.header.snapshots_offset,
                found=2,
                expected=0,
            )
        ],
        corruptions=1,
    )


@rule
def snapshot_l1_misaligned() -> Rule:
    """A snapshot whose L1 table is not cluster aligned is skipped."""
    image = empty_snapshot()
    l1 = image.snapshots[0].l1_table_offset
    set_field(image, 0, 0, 8, l1 + 8)
    return Rule(
        image,
        [
            finding(Kind.SNAPSHOT_L1_MISALIGNED, **of_entry(0, image), found=l1 + 8),
            leak(l1 // SIZE),
        ],
        corruptions=1,
        leaks=1,
        complete=False,
    )


@rule
def snapshot_l1_too_large() -> Rule:
    """A snapshot whose L1 table is over 32 MiB is skipped."""
    image = empty_snapshot()
    l1 = image.snapshots[0].l1_table_offset
    set_field(image, 0, 8, 4, (4 << 20) + 1)
    return Rule(
        image,
        [
            finding(
                Kind.SNAPSHOT_L1_TOO_LARGE,
                **of_entry(0, image),
                found=(4 << 20) + 1,
                expected=4 << 20,
            ),
            leak(l1 // SIZE),
        ],
        corruptions=1,
        leaks=1,
        complete=False,
    )


@rule
def snapshot_l1_past_end() -> Rule:
    """A snapshot's L1 table past the end counts nothing and reads as zeros."""
    image = empty_snapshot()
    l1, beyond = image.snapshots[0].l1_table_offset, len(image.data) + 5 * SIZE
    set_field(image, 0, 0, 8, beyond)
    return Rule(
        image,
        [
            finding(
                Kind.PAST_END,
                structure=Structure.L1_TABLE,
                host_offset=beyond,
                snapshot=0,
                found=beyond,
            ),
            leak(l1 // SIZE),
        ],
        corruptions=1,
        leaks=1,
        complete=False,
    )


@rule
def snapshot_l1_entry_reserved() -> Rule:
    """L1 entries of snapshots are judged, too, and told under the snapshot's index."""
    image = with_snapshot()
    at = image.l1_at(1, snapshot=0)
    sound = image.word(at)
    image.set_bits(at, 1 << 57)
    return Rule(
        image,
        [
            finding(
                Kind.L1_ENTRY_RESERVED,
                structure=Structure.L1_TABLE,
                snapshot=0,
                l1_index=1,
                host_offset=at,
                found=sound | 1 << 57,
                expected=sound,
            )
        ],
        corruptions=1,
    )


@rule
def snapshot_l2_entry_reserved() -> Rule:
    """L2 entries that only a snapshot has are judged, too."""
    image = with_snapshot()
    at = image.l2_at(5, snapshot=0)
    sound = image.word(at)
    image.set_bits(at, 4)
    return Rule(
        image,
        [
            finding(
                Kind.L2_ENTRY_RESERVED,
                structure=Structure.L2_TABLE,
                snapshot=0,
                l1_index=0,
                l2_index=5,
                host_offset=at,
                guest_offset=5 * SIZE,
                count=1,
                found=sound | 4,
                expected=sound,
            )
        ],
        corruptions=1,
    )


@rule
def damage_in_a_shared_l2_table() -> Rule:
    """An entry of an L2 table that the active disk and a snapshot share counts for both."""
    made = fill(builder())
    made.take_snapshot("same")
    image = made.build()
    at = image.l2_at(1)
    assert at == image.l2_at(1, snapshot=0)
    image.set_bits(at, 2)
    return Rule(
        image,
        [finding(Kind.L2_ENTRY_RESERVED, host_offset=at, snapshot=ACTIVE, l2_index=1, count=2)],
        corruptions=2,
    )


@rule
def snapshot_copied_is_not_judged() -> Rule:
    """COPIED means nothing in the tables of a snapshot."""
    image = with_snapshot()
    image.set_bits(image.l1_at(0, snapshot=0), COPIED)
    image.set_bits(image.l2_at(5, snapshot=0), COPIED)
    image.set_bits(image.l2_at(1, snapshot=0), COPIED)
    return Rule(image, [])


@rule
def snapshot_and_active_disk_contest_a_cluster() -> Rule:
    """The same host cluster for different guest clusters of a snapshot and the active disk."""
    image = with_snapshot()
    kept = image.host_offset(5)
    old = image.word(image.l2_at(5, snapshot=0)) & 0x00FF_FFFF_FFFF_FE00
    lost = image.word(image.l2_at(2, snapshot=0)) & 0x00FF_FFFF_FFFF_FE00
    image.set_word(image.l2_at(2, snapshot=0), kept)
    assert old != kept
    return Rule(
        image,
        [
            low(kept // SIZE),
            leak(lost // SIZE, found=2, expected=1),
            contested(kept // SIZE),
        ],
        corruptions=1,
        leaks=1,
    )


@rule
def snapshots_of_nothing_past_end() -> Rule:
    """Snapshot table entries past the end are zeros: snapshots of nothing."""
    image = plain()
    beyond = len(image.data) + SIZE
    image.change_header(nb_snapshots=2, snapshots_offset=beyond)
    lacking = [
        finding(Kind.SNAPSHOT_EXTRA_DATA, index=index, found=0, expected=16) for index in (0, 1)
    ]
    return Rule(
        image,
        [
            finding(
                Kind.PAST_END,
                structure=Structure.SNAPSHOT_TABLE,
                host_offset=beyond,
                length=80,
                found=beyond,
            ),
            *lacking,
        ],
        corruptions=3,
        complete=False,
    )


@rule
def snapshot_l1_on_the_active_l1_table() -> Rule:
    """Metadata that two structures lay claim to is counted twice, too."""
    made = builder()
    made.take_snapshot("empty")
    image = made.build()
    old, active = image.snapshots[0].l1_table_offset, image.header.l1_table_offset
    set_field(image, 0, 0, 8, active)
    return Rule(
        image,
        [low(active // SIZE), leak(old // SIZE), contested(active // SIZE, guest_offset=-1)],
        corruptions=1,
        leaks=1,
    )
