"""Whether leaked data may have been lost, where from, and how much: and where it cannot."""

import random
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from planner.check.check import check_image
from planner.errors import RepairError
from planner.findings.kinds import ACTIVE, FindingKind
from planner.qcow2 import entries
from planner.qcow2.header import Autoclear, Incompatible
from planner.repair.overlay import Overlay
from planner.repair.plan import DETERMINED, RepairTier
from planner.repair.tiers import Proposal, propose
from planner.source import Bytes, read_bytes
from planner.triage.impact import Harm, guest_impact
from planner.triage.l1_holes import PlaceKind
from planner.triage.losses import CauseKind
from planner.triage.triage import Triage, triage_leaks
from tests.images.builder import MIB, Image, ImageBuilder
from tests.images.luks_headers import luks_bytes
from tests.planner.sources import Sparse

CLUSTER = 4096
PER_TABLE = 5
WIDTH = CLUSTER // 8


def disk(**options: object) -> ImageBuilder:
    """Three L2 tables of four, with five clusters of noise in each."""
    builder = ImageBuilder(**{"size": 8 * MIB, "cluster_bits": 12, **options})  # type: ignore[arg-type]
    rng = random.Random(1)
    for l1_index in range(3):
        content = rng.randbytes(PER_TABLE * builder.geometry.cluster_size)
        builder.write(l1_index * builder.geometry.l2_entries, content)
    return builder


def wipe(image: Image, offset: int, length: int = 0) -> None:
    length = length or image.cluster_size
    image.data[offset : offset + length] = bytes(length)


def triage(image: Image) -> Triage:
    return triage_leaks(image.source, check_image(image.source))


def causes(image: Image) -> set[CauseKind]:
    return {cause.kind for cause in triage(image).losses.causes}


def proposal(image: Image, tier: RepairTier) -> Proposal:
    return propose(image.source, check_image(image.source), tier)


# ---- places that leaked data may have come from ----


def wiped_table() -> Image:
    image = disk().build()
    wipe(image, image.l2_table(1))
    return image


def wiped_page_of_a_table() -> Image:
    """The middle third of a table that maps everything."""
    builder = ImageBuilder(size=8 * MIB, cluster_bits=12)
    builder.write(0, random.Random(1).randbytes(300 * CLUSTER))
    image = builder.build()
    wipe(image, image.l2_table(0) + 1024, 512)
    return image


def wiped_beginning_of_a_table() -> Image:
    builder = ImageBuilder(size=8 * MIB, cluster_bits=12)
    builder.write(0, random.Random(1).randbytes(300 * CLUSTER))
    image = builder.build()
    wipe(image, image.l2_table(0), 1024)
    return image


def wiped_piece_of_a_table() -> Image:
    """A few entries amid others, at no border of anything."""
    image = disk().build()
    wipe(image, image.l2_at(2), 16)
    return image


def wiped_table_that_was_written_to() -> Image:
    builder = disk()
    builder.write(300, b"after the loss")
    image = builder.build()
    wipe(image, image.l2_table(0), PER_TABLE * 8)
    return image


def table_of_one_flag() -> Image:
    image = disk().build()
    wipe(image, image.l2_table(1))
    image.set_word(image.l2_table(1), entries.COPIED)
    return image


def wiped_l1_entry_and_overwritten_table() -> Image:
    """Other tables are newer: a machine that died would not have left that."""
    image = disk().build()
    start = image.l2_table(0)
    image.data[start : start + CLUSTER] = (b"somebody's log, line by line\n" * 200)[:CLUSTER]
    image.set_word(image.l1_at(0), 0)
    return image


def older_copy_of_a_table_in_its_place() -> Image:
    builder = disk()
    builder.take_snapshot("one")
    builder.write(40, random.Random(2).randbytes(CLUSTER))
    image = builder.build()
    image.set_word(image.l1_at(0), image.l2_table(0, 0))
    return image


def older_cluster_in_the_place_of_a_newer() -> Image:
    """One entry of a table that is the disk's own, as it was when the snapshot was taken."""
    builder = disk()
    builder.take_snapshot("one")
    builder.write(3, random.Random(2).randbytes(CLUSTER))
    image = builder.build()
    image.set_word(image.l2_at(3), image.word(image.l2_at(3, 0)))
    return image


def wiped_piece_of_a_table_of_compressed_clusters() -> Image:
    builder = ImageBuilder(size=8 * MIB, cluster_bits=12)
    rng = random.Random(1)
    for cluster in range(256):
        builder.write_compressed(cluster, rng.randbytes(1000))
    image = builder.build()
    wipe(image, image.l2_table(0), 512)
    return image


def wiped_l1_and_overwritten_tables() -> Image:
    image = disk().build()
    for l1_index in range(3):
        start = image.l2_table(l1_index)
        image.data[start : start + CLUSTER] = (b"somebody's log, line by line\n" * 200)[:CLUSTER]
    wipe(image, image.header.l1_table_offset, 32)
    return image


def wiped_l1_and_table_of_a_snapshot() -> Image:
    builder = ImageBuilder(size=2 * MIB, cluster_bits=12)
    builder.write(0, random.Random(1).randbytes(PER_TABLE * CLUSTER))
    builder.take_snapshot("one")
    builder.write(0, random.Random(2).randbytes(PER_TABLE * CLUSTER))
    image = builder.build()
    wipe(image, image.l2_table(0, 0))
    image.set_word(image.l1_at(0, 0), 0)
    return image


def data_like_refcounts() -> Image:
    """More of it than there could be refcount blocks."""
    builder = ImageBuilder(size=8 * MIB, cluster_bits=12)
    builder.write(0, b"\0\1" * (PER_TABLE * CLUSTER // 2))
    image = builder.build()
    wipe(image, image.l2_table(0))
    return image


def overwritten_table() -> Image:
    image = disk().build()
    start = image.l2_table(1)
    image.data[start : start + CLUSTER] = (b"somebody's log, line by line\n" * 200)[:CLUSTER]
    return image


def table_of_a_few_wrong_words() -> Image:
    """No entry is left of it, and too little else to say what lies there."""
    image = disk().build()
    wipe(image, image.l2_table(1))
    image.set_word(image.l2_table(1), 0x3E)
    return image


def wiped_l1_entry_and_table() -> Image:
    image = disk().build()
    wipe(image, image.l2_table(1))
    image.set_word(image.l1_at(1), 0)
    return image


def wiped_table_of_a_snapshot() -> Image:
    builder = disk()
    builder.take_snapshot("one")
    builder.write(builder.geometry.l2_entries, random.Random(2).randbytes(PER_TABLE * CLUSTER))
    image = builder.build()
    wipe(image, image.l2_table(1, 0))
    return image


def data_file_bit() -> Image:
    image = disk().build()
    bits = image.header.incompatible_features | Incompatible.DATA_FILE
    image.change_header(incompatible_features=bits)
    return image


def extended_l2_bit() -> Image:
    builder = ImageBuilder(size=1 << 28)
    builder.write(0, random.Random(1).randbytes(2 * PER_TABLE << 16))
    image = builder.build()
    bits = image.header.incompatible_features | Incompatible.EXTENDED_L2
    image.change_header(incompatible_features=bits)
    return image


def entry_past_the_end() -> Image:
    image = disk().build()
    past = (image.host_clusters + 9) * CLUSTER
    image.set_word(image.l2_at(1), past | entries.COPIED)
    return image


def luks_header_gone() -> Image:
    builder = disk(crypt_method=2, luks_header=luks_bytes())
    image = builder.build()
    wipe(image, image.data.index(b"LUKS\xba\xbe"), 512)
    image.set_word(image.l2_at(1), 0)
    return image


PLACES: dict[Callable[[], Image], CauseKind] = {
    wiped_table: CauseKind.EMPTY_TABLE,
    wiped_page_of_a_table: CauseKind.EMPTY_PART,
    wiped_beginning_of_a_table: CauseKind.EMPTY_PART,
    wiped_piece_of_a_table: CauseKind.EMPTY_PART,
    wiped_table_that_was_written_to: CauseKind.EMPTY_PART,
    wiped_piece_of_a_table_of_compressed_clusters: CauseKind.EMPTY_PART,
    table_of_one_flag: CauseKind.EMPTY_TABLE,
    wiped_l1_entry_and_overwritten_table: CauseKind.OLDER,
    wiped_l1_and_overwritten_tables: CauseKind.EMPTY_ENTRY,
    wiped_l1_and_table_of_a_snapshot: CauseKind.EMPTY_ENTRY,
    data_like_refcounts: CauseKind.EMPTY_TABLE,
    table_of_a_few_wrong_words: CauseKind.EMPTY_TABLE,
    overwritten_table: CauseKind.OVERWRITTEN_TABLE,
    wiped_l1_entry_and_table: CauseKind.EMPTY_ENTRY,
    wiped_table_of_a_snapshot: CauseKind.EMPTY_TABLE,
    data_file_bit: CauseKind.FEATURE_BIT,
    extended_l2_bit: CauseKind.FEATURE_BIT,
    entry_past_the_end: CauseKind.DAMAGED_ENTRY,
    older_cluster_in_the_place_of_a_newer: CauseKind.DAMAGED_ENTRY,
    luks_header_gone: CauseKind.LUKS_HEADER,
}


@pytest.mark.parametrize(("make", "cause"), PLACES.items(), ids=[f.__name__ for f in PLACES])
def test_leaked_data_that_has_a_place_is_not_freed_without_an_id(
    make: Callable[[], Image], cause: CauseKind
) -> None:
    image = make()
    assert cause in causes(image)
    leaks = proposal(image, RepairTier.LEAKS)
    assert leaks.needs_quote
    assert leaks.warnings
    assert all("hold" in line and " data, and " in line for line in leaks.warnings)


@pytest.mark.parametrize("make", PLACES, ids=lambda each: each.__name__)
def test_all_keeps_what_has_a_place_counted(make: Callable[[], Image]) -> None:
    image = make()
    before = check_image(image.source)
    assert before.mismatches is not None
    try:
        everything = proposal(image, RepairTier.ALL)
    except RepairError:
        return
    assert everything.needs_quote or PLACES[make] is CauseKind.DAMAGED_ENTRY
    after = everything.after.mismatches
    assert after is not None
    leaked = before.mismatches.clusters(FindingKind.LEAK, before.counters.leaks)
    assert (after.stored[after.index.slots_of(leaked)] > 0).all() or everything.gives_up


# ---- where nothing can have been lost ----


def discarded() -> Image:
    """The entries say zeros; the machine died before the refcounts were lowered."""
    image = disk().build()
    for cluster in range(PER_TABLE):
        image.set_word(image.l2_at(cluster), entries.ZERO)
    return image


def stale_bitmaps() -> Image:
    builder = disk()
    builder.add_bitmap("backup", granularity_bits=16, dirty={0, 5})
    image = builder.build()
    bits = image.header.autoclear_features & ~int(Autoclear.BITMAPS)
    image.change_header(autoclear_features=bits)
    return image


def counted_twice() -> Image:
    image = disk().build()
    for at in (image.host_offset(0), image.l2_table(0)):
        image.set_refcount(at // CLUSTER, 2)
    return image


def crashed_while_it_grew() -> Image:
    """Clusters were allocated behind the last entry, and the machine died before their entries."""
    builder = disk()
    for cluster in range(70, 75):
        builder.write(cluster, random.Random(cluster).randbytes(CLUSTER))
    image = builder.build()
    for cluster in range(71, 75):
        image.set_word(image.l2_at(cluster), 0)
    return image


def crashed_between_tables() -> Image:
    """New tables were made, and data after them, of which the entries were not written yet."""
    image = disk().build()
    for cluster in range(2, PER_TABLE):
        image.set_word(image.l2_at(2 * image.geometry.l2_entries + cluster), 0)
    return image


def crashed_where_it_filled_free_space() -> Image:
    """What was free is handed out before the file grows, and newer tables lie behind it."""
    builder = disk()
    first = builder.place(random.Random(3).randbytes(CLUSTER))
    builder.skip(2)
    builder.write(3 * builder.geometry.l2_entries, random.Random(4).randbytes(CLUSTER))
    image = builder.build()
    image.set_refcount(first // CLUSTER, 1)
    return image


def snapshot_deleted_half_way() -> Image:
    """The disk has written since to what only the older snapshot has, and is counted too high."""
    builder = disk()
    builder.take_snapshot("one")
    for cluster in range(PER_TABLE):
        builder.write(cluster, random.Random(cluster).randbytes(CLUSTER))
    image = builder.build()
    image.set_refcount(image.l2_table(0, 0) // CLUSTER, 2)
    for cluster in range(PER_TABLE):
        old = image.word(image.l2_at(cluster, 0)) & entries.L2_OFFSET
        image.set_refcount(old // CLUSTER, 2)
    return image


HARMLESS = (
    crashed_between_tables,
    crashed_where_it_filled_free_space,
    snapshot_deleted_half_way,
    crashed_while_it_grew,
    discarded,
    stale_bitmaps,
    counted_twice,
)


def test_a_newer_copy_of_a_table_in_use_looks_lost() -> None:
    found = triage(older_copy_of_a_table_in_its_place())
    assert len(found.suspects) == 1
    assert found.buried_count == 1


def suspect_ranges(image: Image, snapshot: int = ACTIVE) -> list[tuple[int, int]]:
    report = check_image(image.source)
    losses = triage_leaks(image.source, report).losses
    return list(guest_impact(report, snapshot, losses).ranges[Harm.SUSPECT].first(9))


def two_snapshots() -> Image:
    """Each with the first cluster of its own, and so with a table of its own: the disk, too."""
    builder = disk()
    builder.take_snapshot("one")
    builder.write(0, random.Random(2).randbytes(CLUSTER))
    builder.take_snapshot("two")
    return builder.build()


def table_of_another_snapshot() -> Image:
    """The disk still has the second one's table, until its L1 entry leads to the first one's."""
    image = two_snapshots()
    image.set_word(image.l1_at(0), image.l2_table(0, 0))
    return image


def cluster_of_another_snapshot() -> Image:
    builder = disk()
    builder.take_snapshot("one")
    builder.write(0, random.Random(2).randbytes(CLUSTER))
    builder.take_snapshot("two")
    builder.write(1, b"so that the disk has a table of its own")
    image = builder.build()
    image.set_word(image.l2_at(0), image.word(image.l2_at(0, 0)) & entries.L2_OFFSET)
    return image


@pytest.mark.parametrize(
    ("make", "start", "length"),
    [
        (older_copy_of_a_table_in_its_place, 0, 2 * MIB),
        (older_cluster_in_the_place_of_a_newer, 3 * CLUSTER, CLUSTER),
        (table_of_another_snapshot, 0, 2 * MIB),
        (cluster_of_another_snapshot, 0, CLUSTER),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_what_an_entry_leads_to_that_counts_others_alone_is_suspect_and_not_missing(
    make: Callable[[], Image], start: int, length: int
) -> None:
    image = make()
    assert suspect_ranges(image) == [(start, length)]
    report = check_image(image.source)
    assert list(guest_impact(report).ranges[Harm.SUSPECT].first(9)) == []
    gone = triage(image).losses.missing
    assert gone <= CLUSTER, "what leaks may have been in another place of the disk's, at most"


@pytest.mark.parametrize("tier", DETERMINED)
def test_the_table_of_another_snapshot_does_not_become_the_disks_unasked(tier: RepairTier) -> None:
    image = table_of_another_snapshot()
    found = proposal(image, tier)
    assert found.needs_quote
    assert {cause.kind for cause in found.triage.losses.causes} == {CauseKind.EXCHANGED}
    (warning,) = found.warnings
    assert warning.startswith(f"L1 entry 0 ({2 * MIB} bytes at guest offset 0) leads to a table")
    repaired = Bytes(read_bytes(Overlay(image.source, found.plan), 0, found.plan.size_after))
    assert propose(repaired, check_image(repaired), tier).plan.changes_nothing


def low(image: Image) -> None:
    image.set_refcount(image.l2_table(0, 1) // CLUSTER, 1)


def high(image: Image) -> None:
    image.set_refcount(image.l2_table(0, 0) // CLUSTER, 2)


# ---- what a second repair does ----


@pytest.mark.parametrize(
    "make",
    [*PLACES, *HARMLESS, table_of_another_snapshot, cluster_of_another_snapshot],
    ids=lambda make: make.__name__,
)
def test_all_does_nothing_a_second_time_that_it_did_not_the_first(
    make: Callable[[], Image],
) -> None:
    image = make()
    try:
        found = proposal(image, RepairTier.ALL)
    except RepairError:
        return
    repaired = Overlay(image.source, found.plan)
    assert propose(repaired, found.after, RepairTier.ALL).plan.changes_nothing
    leaks = propose(repaired, found.after, RepairTier.LEAKS)
    assert leaks.needs_quote or leaks.plan.changes_nothing


@pytest.mark.parametrize("flag", [0, entries.COPIED])
def test_what_nothing_would_speak_for_once_all_is_mended_is_freed_when_somebody_says_so(
    flag: int,
) -> None:
    image = older_cluster_in_the_place_of_a_newer()
    image.set_word(image.l2_at(3), image.word(image.l2_at(3)) | flag)
    everything, leaks = (proposal(image, tier) for tier in (RepairTier.ALL, RepairTier.LEAKS))
    assert everything.gives_up
    assert everything.needs_quote
    assert everything.after.verdict == "clean"
    assert everything.warnings[:-1] == leaks.warnings
    assert "nothing speaks for what leaks any more" in everything.warnings[-1]
    shared = image.word(image.l2_at(3)) & entries.L2_OFFSET
    after = everything.after.mismatches
    assert after is not None
    assert after.stored[after.index.slots_of(np.array([shared // CLUSTER]))] == 2


def test_what_something_else_speaks_for_is_kept_when_a_refcount_is_raised() -> None:
    image = older_cluster_in_the_place_of_a_newer()
    wipe(image, image.l2_table(1))
    everything = proposal(image, RepairTier.ALL)
    assert everything.needs_quote
    assert not everything.gives_up
    assert everything.after.counters.leaks == PER_TABLE + 1


@pytest.mark.parametrize("wrong", [low, high])
def test_a_table_with_a_wrong_refcount_alone_was_not_exchanged(
    wrong: Callable[[Image], None],
) -> None:
    image = two_snapshots()
    wrong(image)
    found = triage(image)
    assert found.leaked == (wrong is high)
    assert not found.is_evidence
    assert suspect_ranges(image) == []


def test_numbers_in_the_place_of_refcounts_cast_no_doubt_on_what_has_them() -> None:
    image = table_of_another_snapshot()
    wrong = image.refblock(0), image.host_offset(2 * image.geometry.l2_entries)
    image.data[wrong[1] : wrong[1] + CLUSTER] = image.data[wrong[0] : wrong[0] + CLUSTER]
    image.set_word(image.reftable_at(0), wrong[1])
    assert FindingKind.REFBLOCK_SHARED in check_image(image.source).counts()
    assert CauseKind.EXCHANGED not in causes(image)


def test_the_place_that_leads_to_an_older_table_is_named() -> None:
    (table,) = triage(older_copy_of_a_table_in_its_place()).suspects
    assert [(place.kind, place.l1_index) for place in table.places] == [
        (PlaceKind.DAMAGED, 0),
        (PlaceKind.EMPTY, 3),
    ]


def test_more_refcounts_that_are_too_low_than_clusters_leak_are_wrong_themselves() -> None:
    """An older copy of a refcount block lacks what was shared since, and has what was freed."""
    builder = disk()
    freed = [builder.place(random.Random(seed).randbytes(CLUSTER)) for seed in (5, 6)]
    builder.take_snapshot("one")
    builder.write(0, b"of its own")
    image = builder.build()
    for offset in freed:
        image.set_refcount(offset // CLUSTER, 1)
    for cluster in range(1, PER_TABLE):
        image.set_refcount(image.host_offset(cluster) // CLUSTER, 1)
    assert suspect_ranges(image) == []
    assert not proposal(image, RepairTier.LEAKS).needs_quote


def test_refcounts_that_are_out_of_date_do_not_say_that_entries_lead_elsewhere() -> None:
    image = older_cluster_in_the_place_of_a_newer()
    bits = image.header.incompatible_features | Incompatible.DIRTY
    image.change_header(incompatible_features=bits)
    assert suspect_ranges(image) == []


def test_a_lost_table_of_zeros_hid_what_the_backing_file_has() -> None:
    builder = disk(backing_file=b"base.qcow2")
    for cluster in range(7):
        builder.write_zeros(3 * builder.geometry.l2_entries + cluster)
    image = builder.build()
    image.set_word(image.l1_at(3), 0)
    assert "zeros that hide what the backing file has" in triage(image).warnings(1)[0]
    assert proposal(image, RepairTier.LEAKS).needs_quote


@pytest.mark.parametrize("make", HARMLESS, ids=lambda each: each.__name__)
def test_what_cannot_have_been_lost_is_freed_without_an_id(make: Callable[[], Image]) -> None:
    image = make()
    assert check_image(image.source).counters.leaks
    assert causes(image) == set()
    leaks = proposal(image, RepairTier.LEAKS)
    assert not leaks.needs_quote
    assert leaks.warnings == []
    assert leaks.left_count == 0 or leaks.after.counters.leaks == 0


# ---- how much is missing ----


def test_no_more_is_missing_than_a_wiped_table_mapped() -> None:
    assert triage(wiped_table()).losses.missing == PER_TABLE * CLUSTER


def test_no_more_is_missing_than_reads_as_nothing() -> None:
    image = disk().build()
    builder = disk(size=3 * image.geometry.l2_coverage)
    width = builder.geometry.l2_entries
    builder.write(0, random.Random(5).randbytes(3 * width * CLUSTER))
    image = builder.build()
    lost = image.host_offset(7)
    image.set_word(image.l2_at(7), 0)
    image.set_refcount(lost // CLUSTER, 60)
    assert triage(image).losses.missing == CLUSTER


def test_what_an_l1_table_has_behind_the_end_of_the_disk_is_no_room_on_it() -> None:
    builder = ImageBuilder(size=8 * MIB, cluster_bits=12)
    for cluster in (0, 1, 2 * builder.geometry.l2_entries):
        builder.write_compressed(cluster, bytes([7]) * 100)
    image = builder.build()
    image.set_word(image.l1_at(2), image.word(image.l1_at(0)))
    image.change_header(size=3 * CLUSTER)
    wipe(image, image.refblock(0))
    assert triage(image).losses.missing == CLUSTER


def test_what_a_lost_table_led_to_behind_the_end_of_the_file_is_missing_too() -> None:
    image = disk().build()
    wipe(image, image.l2_table(2))
    image.set_refcount(image.host_clusters + 3, 1)
    assert triage(image).losses.missing == (PER_TABLE + 1) * CLUSTER


def test_compressed_clusters_that_shared_a_cluster_are_all_missing() -> None:
    builder = disk()
    for cluster in range(20, 28):
        builder.write_compressed(cluster, bytes([cluster]) * 100)
    image = builder.build()
    wipe(image, image.l2_table(0))
    assert triage(image).losses.missing >= (PER_TABLE + 8) * CLUSTER


def test_what_a_snapshot_still_has_is_missing_from_the_disk_all_the_same() -> None:
    builder = disk()
    builder.take_snapshot("one")
    builder.write(40, b"of its own")  # the disk's first table is its own now
    image = builder.build()
    wipe(image, image.l2_table(0))
    assert triage(image).losses.missing == (PER_TABLE + 1) * CLUSTER


def test_a_counter_that_is_far_too_high_hides_one_cluster_at_most() -> None:
    builder = disk()
    builder.take_snapshot("one")
    builder.write(0, b"anew")
    image = builder.build()
    old = image.word(image.l2_at(0, 0)) & entries.L2_OFFSET
    image.set_refcount(old // CLUSTER, 7)
    assert triage(image).losses.missing == 0


def test_what_the_disk_has_nothing_in_the_place_of_may_be_missing() -> None:
    builder = disk()
    builder.take_snapshot("one")
    builder.write(0, b"anew")
    image = builder.build()
    old = image.word(image.l2_at(0, 0)) & entries.L2_OFFSET
    image.set_refcount(old // CLUSTER, 2)
    image.set_word(image.l2_at(0), 0)
    found = triage(image).losses
    assert found.missing == 2 * CLUSTER
    assert found.causes[0].kind is CauseKind.SHARED


def test_a_flag_alone_is_nothing_in_the_place_of_what_a_snapshot_has() -> None:
    builder = disk()
    builder.take_snapshot("one")
    builder.write(1, b"anew")
    image = builder.build()
    image.set_word(image.l2_at(0), entries.COPIED)
    found = triage(image).losses
    assert found.missing == CLUSTER
    assert found.causes[0].kind is CauseKind.SHARED


def test_what_the_disk_still_has_is_not_missing_from_it() -> None:
    builder = disk()
    builder.take_snapshot("one")
    image = builder.build()
    image.change_header(nb_snapshots=0)
    assert triage(image).losses.missing == 0


# ---- what a snapshot still has ----


def shared_with_a_snapshot() -> Image:
    builder = disk()
    builder.take_snapshot("one")
    image = builder.build()
    wipe(image, image.header.l1_table_offset, 32)
    return image


@pytest.mark.parametrize("tier", DETERMINED)
def test_the_sign_that_the_disk_lost_what_a_snapshot_has_stays(tier: RepairTier) -> None:
    found = proposal(shared_with_a_snapshot(), tier)
    assert found.needs_quote
    assert "a snapshot has what the disk may have lost" in " ".join(found.warnings)
    if tier is RepairTier.ALL:
        assert found.after.verdict == "leaks"


def test_refcounts_that_are_lost_too_leave_what_a_snapshot_has() -> None:
    image = without_refcounts(shared_with_a_snapshot())
    assert causes(image) == {CauseKind.SHARED}
    assert triage(image).losses.missing == 3 * PER_TABLE * CLUSTER
    assert proposal(image, RepairTier.ALL).needs_quote


@pytest.mark.parametrize("tier", DETERMINED)
@pytest.mark.parametrize("is_packed", [False, True])
def test_the_sign_that_a_snapshot_lost_what_the_disk_has_stays(
    tier: RepairTier, is_packed: bool
) -> None:
    builder = ImageBuilder(cluster_bits=9, size=1 << 20)
    for cluster in range(3):
        if is_packed:
            builder.write_compressed(cluster, b"%d" % cluster * 400)
        else:
            builder.write(cluster, b"%d" % cluster * 512)
    builder.take_snapshot("one")
    builder.write_zeros(3)
    image = builder.build()
    assert proposal(image, tier).plan.changes_nothing
    wipe(image, image.l2_table(0, 0))
    found = proposal(image, tier)
    assert found.needs_quote
    assert "L1 entry 0 of snapshot 0 (32768 bytes at guest offset 0)" in " ".join(found.warnings)
    if tier is RepairTier.ALL:
        assert found.after.verdict == "leaks"


def test_an_empty_table_of_a_snapshot_has_lost_nothing_that_is_counted_elsewhere() -> None:
    builder = ImageBuilder(cluster_bits=9, size=1 << 20)
    builder.write(0, b"a" * 512)
    builder.write(100, b"b" * 512)
    builder.take_snapshot("one")
    builder.write_zeros(1)
    image = builder.build()
    wipe(image, image.l2_table(0, 0))
    image.set_refcount(image.host_offset(0) // 512, 1)
    image.set_bits(image.l2_at(0), entries.COPIED)
    image.set_refcount(image.host_offset(100) // 512, 3)
    assert causes(image) == set()
    assert not proposal(image, RepairTier.LEAKS).needs_quote


# ---- refcounts that are lost too ----


def without_refcounts(image: Image) -> Image:
    wipe(image, image.refblock(0))
    return image


def test_clusters_without_refcounts_are_looked_at_like_leaks() -> None:
    image = without_refcounts(wiped_table())
    found = triage(image)
    assert len(found.uncounted) >= PER_TABLE
    assert {cause.kind for cause in found.losses.causes} == {CauseKind.EMPTY_TABLE}
    assert proposal(image, RepairTier.ALL).needs_quote


def test_a_rebuild_counts_what_may_be_lost_and_a_second_one_changes_nothing() -> None:
    image = without_refcounts(wiped_table())
    everything = proposal(image, RepairTier.ALL)
    assert everything.found == everything.planned + everything.left_count
    uncounted = everything.triage.uncounted
    repaired = Bytes(
        read_bytes(Overlay(image.source, everything.plan), 0, everything.plan.size_after)
    )
    after = check_image(repaired)
    assert after.verdict == "leaks"
    assert after.mismatches is not None
    leaked = after.mismatches.clusters(FindingKind.LEAK, after.counters.leaks)
    assert np.array_equal(leaked, uncounted)
    assert propose(repaired, after, RepairTier.ALL).plan.changes_nothing
    assert propose(repaired, after, RepairTier.LEAKS).needs_quote


@pytest.mark.parametrize("order", [3, 4, 5])
def test_a_rebuild_does_not_count_what_refcounts_were_in(order: int) -> None:
    builder = disk(refcount_order=order)
    builder.take_snapshot("one")
    image = builder.build()
    wipe(image, image.header.l1_table_offset, 32)
    image.set_word(image.reftable_at(0), 1 << 40)
    found = proposal(image, RepairTier.ALL)
    assert found.needs_quote
    assert found.after.verdict == "clean"
    repaired = Bytes(read_bytes(Overlay(image.source, found.plan), 0, found.plan.size_after))
    assert propose(repaired, found.after, RepairTier.ALL).plan.changes_nothing


def test_where_nothing_is_lost_but_refcounts_a_rebuild_leaves_nothing() -> None:
    everything = proposal(without_refcounts(disk().build()), RepairTier.ALL)
    assert everything.after.verdict == "clean"
    assert not everything.needs_quote
    assert everything.kept == 0


def test_one_refcount_of_zero_is_no_loss_of_refcounts() -> None:
    image = wiped_table()
    image.set_refcount(image.host_offset(0) // CLUSTER, 0)
    assert len(triage(image).uncounted) == 0


@pytest.mark.parametrize("beyond", [2, 4])
def test_a_lost_table_that_led_behind_the_end_of_a_cut_file_is_not_taken_for_data(
    beyond: int,
) -> None:
    image = disk().build()
    first = 2 * image.geometry.l2_entries
    for number in range(beyond):
        cluster, past = first + number, image.host_clusters + 3 + number
        image.set_refcount(image.host_offset(cluster) // CLUSTER, 0)
        image.set_word(image.l2_at(cluster), past * CLUSTER | entries.COPIED)
        image.set_refcount(past, 1)
    image.set_word(image.l1_at(2), 0)
    assert [suspect.looks_lost for suspect in triage(image).suspects] == [True]
    assert proposal(image, RepairTier.LEAKS).needs_quote


# ---- what was cut off ----


def wiped_table_of_what_was_cut_off() -> Image:
    image = disk().build()
    for number in range(PER_TABLE):
        cluster = image.host_offset(2 * image.geometry.l2_entries + number) // CLUSTER
        image.set_refcount(cluster, 0)
        image.set_refcount(image.host_clusters + number, 1)
    wipe(image, image.l2_table(2))
    return image


def test_what_a_lost_table_led_to_is_missing_where_all_of_it_was_behind_the_end() -> None:
    image = wiped_table_of_what_was_cut_off()
    report = check_image(image.source)
    assert not report.counters.leaks
    assert report.counts() == {FindingKind.LEAK_PAST_END: 1}
    assert (report.verdict, report.exit_code) == ("leaks", 3)
    losses = triage_leaks(image.source, report).losses
    assert (losses.missing, losses.behind) == (PER_TABLE * CLUSTER, PER_TABLE)


def test_refcounts_made_anew_tell_of_nothing_behind_the_end_which_asks_for_the_id() -> None:
    image = wiped_table_of_what_was_cut_off()
    image.set_word(image.l2_at(1), image.refblock(0) | entries.COPIED)
    found = proposal(image, RepairTier.ALL)
    assert FindingKind.LEAK_PAST_END not in found.after.counts()
    assert f"{PER_TABLE} clusters behind the end of the file are counted" in found.warnings[-2]


@pytest.mark.parametrize("word", [entries.ZERO, entries.COPIED])
def test_flags_alone_are_no_entries_that_led_behind_the_end(word) -> None:
    image = wiped_table_of_what_was_cut_off()
    image.set_word(image.l2_at(2 * image.geometry.l2_entries), word)
    assert check_image(image.source).verdict == "leaks"
    assert triage(image).losses.behind == PER_TABLE


def test_a_table_with_an_entry_is_not_lost_because_of_what_is_counted_behind_the_end() -> None:
    image = wiped_table_of_what_was_cut_off()
    first = 2 * image.geometry.l2_entries
    data = disk().build().host_offset(first)
    image.set_refcount(data // CLUSTER, 1)
    image.set_word(image.l2_at(first), data | entries.COPIED)
    assert check_image(image.source).verdict == "clean"
    assert triage(image).losses.missing == 0


def test_without_a_lost_table_what_is_counted_behind_the_end_is_not_missing() -> None:
    image = disk().build()
    image.set_refcount(image.host_clusters + 3, 1)
    assert triage(image).losses.missing == 0
    assert check_image(image.source).verdict == "clean"


@pytest.mark.parametrize(
    "words",
    [
        [1 << 46],  # where no cluster can be
        [1 << 30],  # behind the end
        [entries.COMPRESSED],  # the header, unpacked
        [1 << 60],  # reserved
        [entries.ZERO],  # as it is after a discard, too
        [1 << 14, 1 << 12],  # the refcounts, and the disk's own L1 table
        [entries.COPIED | 1 << 12, entries.ZERO],
    ],
)
def test_a_wiped_table_in_which_words_are_set_again_is_lost_all_the_same(words: list[int]) -> None:
    image = wiped_table_of_what_was_cut_off()
    for number, word in enumerate(words):
        image.set_word(image.l2_table(2) + 8 * (300 + number), word)
    assert triage(image).losses.behind == PER_TABLE
    assert triage(image).losses.missing == PER_TABLE * CLUSTER


def test_what_an_empty_l1_entry_led_to_behind_the_end_is_missing_if_its_table_may_leak() -> None:
    """The table is nothing but zeros by now, and so is known by nothing else."""
    image = wiped_table_of_what_was_cut_off()
    image.set_word(image.l1_at(2), 0)
    lost = image.host_offset(0)
    image.set_word(image.l2_at(0), 0)
    assert image.refcount(lost // CLUSTER) == 1
    assert CauseKind.EMPTY_ENTRY in causes(image)
    assert triage(image).losses.behind == PER_TABLE


def test_a_table_with_a_cluster_of_its_own_is_not_lost() -> None:
    image = wiped_table_of_what_was_cut_off()
    own = image.host_offset(0)
    image.set_word(image.l2_at(0), 0)
    image.set_word(image.l2_table(2), own | entries.COPIED)
    assert triage(image).losses.behind == 0


def test_an_entry_that_is_gone_led_behind_the_end_of_a_file_that_is_cut_off() -> None:
    image = disk().build()
    past = image.host_clusters
    for number, word in enumerate((past * CLUSTER | entries.COPIED, 0)):
        image.set_refcount(image.host_offset(number) // CLUSTER, 0)
        image.set_refcount(past + number, 1)
        image.set_word(image.l2_at(number), word)
    report = check_image(image.source)
    assert report.cut_off is not None
    assert not report.counters.leaks
    assert triage_leaks(image.source, report).losses.missing == CLUSTER


def test_a_table_that_is_cut_off_explains_what_is_counted_behind_the_end() -> None:
    image = disk().build()
    past = image.host_clusters
    for cluster in range(past, past + 3):
        image.set_refcount(cluster, 1)
    for offset in (image.l2_table(2), *map(image.host_offset, image.mapped(2))):
        image.set_refcount(offset // CLUSTER, 0)
    image.set_word(image.l1_at(2), past * CLUSTER | entries.COPIED)
    assert check_image(image.source).cut_off is not None
    assert triage(image).losses.behind == 0


def test_a_table_that_was_lost_behind_the_end_of_the_disk_had_nothing_of_it() -> None:
    image = wiped_table_of_what_was_cut_off()
    image.change_header(size=2 * image.geometry.l2_coverage)
    image.set_word(image.l2_at(0), (image.host_clusters + PER_TABLE) * CLUSTER | entries.COPIED)
    image.set_refcount(image.host_clusters + PER_TABLE, 1)
    assert check_image(image.source).cut_off is not None
    assert triage(image).losses.behind == 0


def test_an_l1_table_that_is_cut_off_is_not_missing_itself() -> None:
    image = wiped_table_of_what_was_cut_off()
    past = image.host_clusters + PER_TABLE
    image.data += image.data[image.header.l1_table_offset :][:8]
    image.change_header(l1_table_offset=len(image.data) - 8)
    assert len(image.data) % CLUSTER == 8
    image.set_refcount(past, 1)
    assert triage(image).losses.behind <= PER_TABLE


def test_what_is_known_to_lead_behind_the_end_is_not_missing_as_well() -> None:
    image = disk().build()
    wipe(image, image.l2_table(0))
    past = image.host_clusters + 3
    for cluster in range(past, past + 3):
        image.set_refcount(cluster, 1)
    image.set_word(image.l1_at(2), past * CLUSTER | entries.COPIED)
    image.set_word(image.l2_at(256), (past + 1) * CLUSTER | entries.COPIED)
    # The data of two tables leaks, and one cluster behind the end has nothing that leads to it.
    assert triage(image).losses.missing == (2 * PER_TABLE + 1) * CLUSTER


def test_a_block_that_the_table_leads_to_twice_counts_nothing_behind_the_end() -> None:
    image = disk().build()
    wipe(image, image.l2_table(0))
    alone = triage(image).losses.missing
    image.set_word(image.reftable_at(150), image.refblock(0))
    assert triage(image).losses.missing == alone == PER_TABLE * CLUSTER


def test_a_lost_table_has_lost_what_a_snapshot_has_too_where_that_is_counted_no_more() -> None:
    """Of a cluster without a refcount nothing leaks; the entry that led to it is there."""
    builder = disk()
    builder.take_snapshot("one")
    for cluster in (5, 600):
        builder.write(cluster, b"of its own")
    image = builder.build()
    shared = image.host_offset(0) // CLUSTER
    image.set_word(image.l1_at(0), 0)
    before = triage(image).losses.missing
    assert image.refcount(shared) == 2
    image.set_refcount(shared, 0)
    assert triage(image).losses.missing == before == (PER_TABLE + 1) * CLUSTER


# ---- what stray entries make up for ----


@pytest.mark.parametrize("length", [0, 2 * CLUSTER])
def test_what_a_stray_entry_leads_to_has_lost_its_reference(length: int) -> None:
    """One that is misaligned, or a compressed cluster of more than a cluster."""
    image = disk().build()
    lost = image.host_offset(image.geometry.l2_entries)
    wipe(image, image.l2_table(1))
    sectors = length // 512 - 1 << image.geometry.compressed_shift
    word = lost | entries.COMPRESSED | sectors if length else lost + 512 | entries.COPIED
    image.set_word(image.l2_table(1) + 8 * 300, word)
    assert check_image(image.source).counters.leaks < PER_TABLE
    assert triage(image).losses.missing == PER_TABLE * CLUSTER


def test_a_stray_entry_that_leads_past_the_end_makes_up_for_nothing_before_it() -> None:
    image = disk().build()
    wipe(image, image.l2_table(1))
    last = len(image.data) - CLUSTER
    word = last + 512 | entries.COMPRESSED | 15 << image.geometry.compressed_shift
    image.set_word(image.l2_table(1) + 8 * 300, word)
    assert FindingKind.PAST_END in check_image(image.source).counts()
    assert triage(image).losses.missing == PER_TABLE * CLUSTER


def shared_and_lost() -> Image:
    """The disk's own table is gone; a snapshot has what it led to, counted for both."""
    builder = disk()
    builder.take_snapshot("one")
    for cluster in (5, 600):
        builder.write(cluster, b"of its own")
    image = builder.build()
    wipe(image, image.l2_table(1))
    return image


def test_an_entry_elsewhere_makes_up_for_the_reference_that_is_lost() -> None:
    image = shared_and_lost()
    before = triage(image).losses.missing
    shared = image.word(image.l2_at(image.geometry.l2_entries, 0)) & entries.L2_OFFSET
    image.set_word(image.l2_at(100), shared)
    assert triage(image).losses.missing == before == (PER_TABLE + 1) * CLUSTER


def test_two_owners_that_both_are_counted_have_lost_nothing_where_no_table_is() -> None:
    """As a repair by QEMU leaves it."""
    image = disk().build()
    host = image.host_offset(0)
    image.set_refcount(host // CLUSTER, 2)
    for cluster in (0, 100):
        image.set_word(image.l2_at(cluster), host)
    lost = image.host_offset(1)
    image.set_word(image.l2_at(1), 0)
    assert image.refcount(lost // CLUSTER) == 1
    assert triage(image).losses.missing == CLUSTER


def test_what_one_bit_that_was_set_leads_to_is_suspect() -> None:
    image = wiped_table()
    free = next(bit for bit in range(12, 40) if image.refcount((1 << bit) // CLUSTER) == 1)
    image.set_word(image.l2_at(200), 1 << free)
    assert (200 * CLUSTER, CLUSTER) in suspect_ranges(image)
    assert 1 << free < len(image.data)


def test_flags_alone_in_a_table_of_many_l1_entries_are_told_a_table_not_a_cluster() -> None:
    """There may be millions of them; and of such a table everything is in doubt."""
    image = wiped_table()
    for cluster in range(200, 300, 2):
        image.set_word(image.l2_at(cluster), entries.COPIED)
    assert triage(image).losses.strays.shape == (2, 50)
    image.set_word(image.l1_at(3), image.word(image.l1_at(0)))
    start, end = triage(image).losses.strays
    covered = image.geometry.l2_coverage
    assert sorted(start.tolist()) == [0, 3 * covered]
    assert (end - start == covered).all()
    assert {(0, covered), (3 * covered, covered)} <= set(suspect_ranges(image))


def test_one_bit_is_an_entry_where_a_snapshot_has_the_cluster_too() -> None:
    builder = disk()
    builder.take_snapshot("one")
    builder.write(600, b"of its own")
    image = builder.build()
    words = [image.word(image.l2_at(cluster)) for cluster in range(PER_TABLE)]
    assert any(word.bit_count() == 1 for word in words)
    wipe(image, image.l2_table(1))
    assert suspect_ranges(image) == []


def packed_cluster(image: Image, cluster: int) -> int:
    """The host cluster that a compressed cluster lies in."""
    word = np.array([image.word(image.l2_at(cluster))], dtype=np.uint64)
    start, _ = entries.compressed_ranges(word, image.geometry)
    return int(start[0]) // CLUSTER


@pytest.mark.parametrize("is_wiped", [True, False])
def test_a_flag_alone_is_what_is_left_of_an_entry_where_no_refcount_can_tell(
    is_wiped: bool,
) -> None:
    """Of several compressed clusters in one, which is still in use: nothing leaks without it."""
    builder = disk()
    for cluster in range(20, 24):
        builder.write_compressed(cluster, bytes([cluster]) * 100)
    image = builder.build()
    image.set_word(image.l2_at(21), entries.COPIED)
    if is_wiped:
        wipe(image, image.refblock(0))
    else:
        image.set_refcount(packed_cluster(image, 20), 2)
    assert not triage(image).leaked
    assert suspect_ranges(image) == [(21 * CLUSTER, CLUSTER)]


def test_a_flag_alone_says_nothing_where_data_lies_in_another_file() -> None:
    image = disk(data_file=b"data.raw").build()
    image.set_word(image.l2_at(0), entries.COPIED)
    wipe(image, image.refblock(0))
    assert FindingKind.REFCOUNT_MISSING in check_image(image.source).counts()
    assert triage(image).losses.strays.size == 0


def test_a_flag_alone_says_nothing_where_every_reference_is_counted() -> None:
    image = disk().build()
    image.set_word(image.l2_at(200), entries.COPIED)
    assert suspect_ranges(image) == []


# ---- what a lost table led to, and no refcount counts ----


def l1_entry_elsewhere(image: Image, l1_index: int = 1) -> None:
    """Leads to a free cluster of zeros at the end of the file."""
    image.set_word(image.l1_at(l1_index), entries.COPIED | len(image.data))
    image.data += bytes(CLUSTER)


def test_what_a_lost_table_leads_to_is_missing_if_its_refcount_was_lowered_too() -> None:
    image = disk().build()
    host = image.host_offset(WIDTH + 2)
    l1_entry_elsewhere(image)
    image.set_refcount(host // CLUSTER, 0)
    assert triage(image).losses.missing == PER_TABLE * CLUSTER


@pytest.mark.parametrize("refcount", [0, 1, 3])
def test_all_that_a_lost_table_had_in_one_cluster_is_missing_whatever_it_counts(
    refcount: int,
) -> None:
    builder = disk()
    for cluster in range(20, 24):
        builder.write_compressed(WIDTH + cluster, bytes([cluster]) * 100)
    image = builder.build()
    packed = packed_cluster(image, WIDTH + 20)
    l1_entry_elsewhere(image)
    image.set_refcount(packed, refcount)
    assert triage(image).losses.missing == (PER_TABLE + 4) * CLUSTER


@pytest.mark.parametrize("refcount", [0, 1, 3, 4])
def test_all_that_two_lost_tables_had_in_one_cluster_is_missing_whatever_it_counts(
    refcount: int,
) -> None:
    builder = disk()
    for cluster in (WIDTH + 20, WIDTH + 21, 2 * WIDTH + 20, 2 * WIDTH + 21):
        builder.write_compressed(cluster, bytes([cluster % 256]) * 100)
    image = builder.build()
    packed = packed_cluster(image, WIDTH + 20)
    assert packed == packed_cluster(image, 2 * WIDTH + 21)
    for l1_index in (1, 2):
        l1_entry_elsewhere(image, l1_index)
    image.set_refcount(packed, refcount)
    assert triage(image).losses.missing == (2 * PER_TABLE + 4) * CLUSTER


def test_what_a_lost_table_led_to_and_something_else_has_by_now_is_not_missing() -> None:
    image = disk().build()
    host = image.host_offset(WIDTH + 2)
    l1_entry_elsewhere(image)
    image.set_word(image.l2_at(100), entries.COPIED | host)
    image.set_refcount(host // CLUSTER, 1)
    assert triage(image).losses.missing == (PER_TABLE - 1) * CLUSTER


def test_what_was_freed_and_is_a_hole_is_not_missing() -> None:
    image = disk().build()
    host = image.host_offset(WIDTH + 2)
    l1_entry_elsewhere(image)
    image.set_refcount(host // CLUSTER, 0)
    wipe(image, host)
    source = Sparse.of(bytes(image.data), len(image.data))
    found = triage_leaks(source, check_image(source))
    assert found.losses.missing == (PER_TABLE - 1) * CLUSTER


def test_an_older_table_of_which_most_was_freed_adds_nothing_to_what_leaks() -> None:
    image = disk().build()
    hosts = [image.host_offset(WIDTH + number) for number in range(PER_TABLE)]
    l1_entry_elsewhere(image)
    for host in hosts[1:]:
        image.set_refcount(host // CLUSTER, 0)
    assert triage(image).losses.missing == CLUSTER


# ---- what was not counted yet ----


@pytest.mark.parametrize("is_dirty", [True, False])
def test_what_lies_where_a_file_grew_was_not_counted_yet_if_it_is_dirty(is_dirty: bool) -> None:
    image = disk().build()
    if is_dirty:
        bits = image.header.incompatible_features | Incompatible.DIRTY
        image.change_header(incompatible_features=bits)
    wipe(image, image.l2_table(1))
    image.data += random.Random(7).randbytes(2 * CLUSTER) + bytes(CLUSTER)
    assert triage(image).losses.missing == (PER_TABLE + 2 * is_dirty) * CLUSTER


def test_an_entry_that_says_nothing_is_no_use_of_the_headers_cluster() -> None:
    builder = disk()
    builder.take_snapshot("one")
    builder.write(0, b"anew")
    image = builder.build()
    image.set_refcount(0, 2)
    assert CauseKind.SHARED not in causes(image)
    assert triage(image).losses.missing == 0


def test_what_an_l1_table_has_nothing_for_costs_no_memory_however_long_it_is() -> None:
    builder = ImageBuilder(size=1 << 60, cluster_bits=21)
    leaked = [builder.place(random.Random(at).randbytes(4096)) >> 21 for at in range(2)]
    image = builder.build()
    for cluster in leaked:
        image.set_refcount(cluster, 1)
    source, report = image.source, check_image(image.source)
    tracemalloc.start()
    found = triage_leaks(source, report)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.losses.missing == 2 << 21
    assert peak < 12 * MIB


@pytest.mark.parametrize("extended_l2", [False, True])
def test_of_tables_that_are_holes_for_the_most_what_is_there_is_read(extended_l2: bool) -> None:
    builder = ImageBuilder(size=6 << 39, cluster_bits=21, extended_l2=extended_l2)
    rng = random.Random(1)
    tables = builder.geometry.l1_entries_needed
    for number in range(tables):
        place = number * builder.geometry.l2_entries + 1000 * number
        builder.write(place, rng.randbytes(4096))
    leaked = builder.place(rng.randbytes(4096)) >> 21
    image = builder.build()
    image.set_refcount(leaked, 1)
    source = Sparse.of(bytes(image.data), len(image.data), 4096)
    report = check_image(source)
    before = source.bytes_read
    found = triage_leaks(source, report)
    # The leaked cluster, and refcounts two times.
    assert source.bytes_read - before < 4 * builder.geometry.cluster_size
    of_all = triage(image)
    assert found.losses == of_all.losses
    assert found.losses.missing == 1 << 21
