"""Damage where one correction stands in the way of another: what is mended, what stays."""

import gc
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from planner.check.check import check_image
from planner.check.report import Report
from planner.errors import AmbiguousCorruption, ParseFailed, UnsupportedRepair
from planner.findings.kinds import FindingKind as Kind
from planner.findings.kinds import Structure
from planner.metadata.cluster_counters import ClusterIndex
from planner.qcow2 import entries
from planner.qcow2.header import Autoclear, read_header
from planner.repair import choices, rebuild, scope, tiers
from planner.repair.draft import Draft
from planner.repair.overlay import Overlay
from planner.repair.plan import DETERMINED, RepairTier, StageKind
from planner.repair.scope import Scope
from planner.repair.split import part_owners
from planner.repair.tiers import Proposal, propose
from planner.source import SECTOR, Bytes, read_bytes
from tests.images.builder import Image, ImageBuilder
from tests.images.corpus.rule import COPIED, SIZE, builder, fill, plain, with_snapshot

RESERVED = 1 << 60


def settled(image: Image, tier: RepairTier = RepairTier.ALL) -> Proposal:
    """The repair of an image; a second one must have nothing to do."""
    source = Bytes(bytes(image.data))
    first = propose(source, check_image(source), tier)
    repaired = Bytes(read_bytes(Overlay(source, first.plan), 0, first.plan.size_after))
    again = propose(repaired, check_image(repaired), tier)
    assert again.plan.changes_nothing
    return first


def counts(proposal: Proposal) -> dict[Kind, int]:
    return proposal.after.counts()


def checks_of(
    image: Image, monkeypatch: pytest.MonkeyPatch, tier: RepairTier = RepairTier.ALL
) -> tuple[int, Proposal]:
    """How many checks it takes to plan the repair of an image, and the proposal."""
    source = Bytes(bytes(image.data))
    report, checked = check_image(source), []

    def check(image, **options):
        checked.append(read_bytes(image, 0, image.size))
        return check_image(image, **options)

    monkeypatch.setattr(tiers, "check_image", check)
    proposal = propose(source, report, tier)
    # Whatever was checked before: the last check, the proof, is of all that the plan writes.
    outcome = Overlay(source, proposal.plan)
    assert checked[-1] == read_bytes(outcome, 0, outcome.size)
    return len(checked), proposal


def test_refcounts_that_are_all_take_one_check_which_is_the_proof(monkeypatch) -> None:
    image = plain()
    image.set_refcount(image.host_offset(1) // SIZE, 0)
    image.set_word(72, 1)
    number, proposal = checks_of(image, monkeypatch)
    assert number == 1
    assert counts(proposal) == {}


def test_what_nothing_mends_is_known_to_stay_and_costs_no_further_check(monkeypatch) -> None:
    """Of the COPIED flag that follows the refcounts one is, which is the proof."""
    image = plain()
    image.set_refcount(image.host_offset(1) // SIZE, 0)
    image.set_word(72, 1)
    image.set_word(image.l2_at(2), image.host_offset(2) + 512 | COPIED)
    number, proposal = checks_of(image, monkeypatch)
    assert number == 1
    assert Kind.DIRTY_BIT in counts(proposal)
    assert counts(proposal)[Kind.DATA_MISALIGNED] == 1


def test_bits_are_drafted_anew_where_the_outcome_is_not_clean_after_all(monkeypatch) -> None:
    image = plain()
    image.set_refcount(image.host_offset(1) // SIZE, 0)
    image.set_word(72, 1)
    image.set_word(image.l2_at(3), RESERVED)  # of which nobody knows what it was
    number, proposal = checks_of(image, monkeypatch)
    assert number > 1
    assert counts(proposal).keys() == {Kind.DIRTY_BIT, Kind.L2_ENTRY_RESERVED}


def test_reserved_bits_go_with_the_first_repair_where_the_refcount_is_wrong_too() -> None:
    image = plain()
    image.set_bits(image.l2_at(1), RESERVED)
    image.set_refcount(image.host_offset(1) // SIZE, 0)
    assert counts(settled(image)) == {}


def test_reserved_bits_go_with_the_first_repair_where_the_copied_flag_is_wrong_too() -> None:
    image = plain()
    image.set_word(image.l2_at(1), image.host_offset(1) | RESERVED)
    assert counts(settled(image)) == {}


def test_reserved_bits_of_an_l1_entry_go_where_its_copied_flag_is_wrong_too() -> None:
    image = plain()
    sound = image.word(image.l1_at(0))
    image.set_word(image.l1_at(0), sound & ~COPIED | RESERVED)
    proposal = settled(image)
    assert counts(proposal) == {}
    outcome = Overlay(Bytes(bytes(image.data)), proposal.plan)
    assert int.from_bytes(read_bytes(outcome, image.l1_at(0), 8), "big") == sound


def test_flags_and_reserved_bits_are_proven_by_one_check(monkeypatch) -> None:
    image = plain()
    image.set_refcount(image.host_offset(1) // SIZE, 2)
    image.set_word(image.l2_at(1), image.host_offset(1))
    image.set_bits(image.l2_at(2), RESERVED)
    number, proposal = checks_of(image, monkeypatch)
    assert number == 2
    assert counts(proposal) == {}


def test_a_split_is_proven_by_the_check_of_the_flags_that_follow(monkeypatch) -> None:
    """One check of the copies, one of the refcounts, one of the flags: the third is the proof."""
    image = plain()
    image.set_word(72, 1)
    image.set_word(image.l2_at(5), image.host_offset(1) | COPIED)
    number, proposal = checks_of(image, monkeypatch, RepairTier.SPLIT)
    assert number == 3
    assert counts(proposal).keys() <= {Kind.LEAK}


def test_a_choice_whose_refcounts_are_drafted_twice_begins_once(monkeypatch) -> None:
    """The copies of a split do not depend on which refcounts have to stay. Of the second draft they
    are checked again, since their report was not held meanwhile.
    """
    image = plain()
    image.set_word(image.l2_at(5), image.host_offset(1) | COPIED)
    stays = iter((np.array([image.host_offset(2) // SIZE]), np.zeros(0, dtype=np.int64)))
    monkeypatch.setattr(tiers, "unfollowed_targets", lambda *_: next(stays))
    parted = []

    def part(scope, structure, room):
        parted.append(structure)
        return part_owners(scope, structure, room)

    monkeypatch.setattr(choices, "part_owners", part)
    number, proposal = checks_of(image, monkeypatch, RepairTier.SPLIT)
    assert not list(stays)
    assert parted == [Structure.L1_TABLE, Structure.L2_TABLE, Structure.DATA]
    assert number == 2 * (1 + 2)
    assert counts(proposal).keys() <= {Kind.LEAK}


def unknown_autoclear_bit(image: Image) -> None:
    image.set_word(88, 1 << 40)


def another_table_twice(image: Image) -> None:
    image.set_word(image.l1_at(1), image.word(image.l1_at(0)))


@pytest.mark.parametrize("more", [lambda image: None, unknown_autoclear_bit, another_table_twice])
def test_a_split_holds_no_report_that_a_check_replaces(more, monkeypatch) -> None:
    """Each may be of millions of findings: there are those of the image alone."""
    image = plain()
    image.set_word(image.l2_at(5), image.host_offset(1) | COPIED)
    more(image)
    report, alive = check_image(image.source), []

    def check(source, **options):
        gc.collect()
        alive.append(sum(isinstance(each, Report) for each in gc.get_objects()) - others)
        return check_image(source, **options)

    monkeypatch.setattr(tiers, "check_image", check)
    others = sum(isinstance(each, Report) for each in gc.get_objects()) - 1
    propose(image.source, report, RepairTier.SPLIT)
    assert len(alive) > 2
    assert set(alive) == {1}


def test_what_was_drafted_until_a_fork_is_held_once_however_each_goes_on() -> None:
    source = Bytes(bytes(SECTOR))
    offsets = np.arange(1 << 14) * SECTOR
    rows = np.random.default_rng(1).integers(0, 256, (len(offsets), SECTOR), dtype=np.uint8)
    first, alone = Draft(source), Draft(source)
    for draft in (first, alone):
        draft.size = 2 * rows.size
        for half in (slice(None, None, 2), slice(1, None, 2)):
            draft.write_tables(StageKind.PREPARE, offsets[half], rows[half])
    first.overlay()
    tracemalloc.start()
    try:
        twin = first.fork()
        for draft in (twin, alone):
            draft.write_tables(StageKind.PREPARE, offsets[-1:] + SECTOR, rows[:1])
            draft.write(StageKind.PREPARE, SECTOR, b"over it")
            draft.write_tables(StageKind.REPOINT, offsets[:1], rows[1:2])
            if draft is twin:
                outcome = read_bytes(twin.overlay(), 0, 3 * SECTOR)
                _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < rows.size // 4
    assert outcome == rows[1].tobytes() + b"over it" + rows[1].tobytes()[7:] + rows[2].tobytes()
    assert twin.plan(RepairTier.SPLIT) == alone.plan(RepairTier.SPLIT)
    assert read_bytes(twin.overlay(), 0, twin.size) == read_bytes(alone.overlay(), 0, alone.size)
    untouched = read_bytes(first.overlay(), 0, rows.size)
    assert untouched == rows.tobytes()
    twin.withdraw(StageKind.PREPARE)
    assert not twin.has(StageKind.PREPARE)
    twin.write_tables(StageKind.PREPARE, offsets[:1], rows[:1])
    assert [len(stage.sectors) for stage in twin.plan(RepairTier.SPLIT).stages] == [1, 1]


def test_what_is_asked_of_a_scope_is_known_to_all_of_the_same_image_and_report(monkeypatch) -> None:
    image, asked = plain(), []

    def shared(source, report):
        asked.append(report)
        return np.zeros(0, dtype=np.int64)

    monkeypatch.setattr(scope, "shared_refcounts", shared)
    source, report = image.source, check_image(image.source)
    first = Scope(Draft(source), source, report)
    twin = first.forked()
    for each in (replace(twin, refcounts_alone=True), twin, first):
        assert not each.refcounts_are_shared
    assert asked == [report]
    other = replace(report)
    assert not replace(first, report=other).refcounts_are_shared
    assert asked[1] is other


def test_new_refcounts_are_filled_many_blocks_at_a_time(monkeypatch) -> None:
    asked = []

    class Index(ClusterIndex):
        def count_before(self, clusters):
            asked.append(len(clusters))
            return super().count_before(clusters)

    image = plain()
    source, used = image.source, check_image(image.source)
    first = Scope(Draft(source), source, used)
    wanted = np.arange(1 << 12, dtype=np.uint16)
    per_block = used.geometry.refblock_entries
    clusters = np.arange(len(wanted)) * per_block // 2 + 3
    blocks = np.arange(len(wanted) // 2)
    index = Index(int(clusters[-1]) + 1, clusters)
    monkeypatch.setattr(Scope, "mismatches", SimpleNamespace(index=index))
    first.make_room((1 + len(blocks)) * SIZE)
    offsets, kept = (1 + blocks) * SIZE, np.array([2 * per_block + 1])
    new = range(5 * per_block - 1, 5 * per_block + 1)
    rebuild._draft_blocks(first, wanted, kept, blocks, offsets, new=new)
    assert len(asked) == len(blocks) * per_block // rebuild.FILLED
    drafted = read_bytes(first.draft.overlay(), SIZE, len(blocks) * SIZE)
    expected = np.zeros(len(blocks) * per_block, dtype=">u2")
    expected[clusters] = wanted
    expected[[*kept, *new]] = 1
    assert drafted == expected.tobytes()


def test_a_new_block_of_very_many_refcounts_is_filled_some_at_a_time(monkeypatch) -> None:
    image = ImageBuilder(size=1 << 21, cluster_bits=21, refcount_order=0).build()
    source = image.source
    first = Scope(Draft(source), source, check_image(source))
    wanted = np.ones(1 << 22, dtype=np.uint8)
    index = ClusterIndex(len(wanted))
    monkeypatch.setattr(Scope, "mismatches", SimpleNamespace(index=index))
    size, end = image.cluster_size, image.host_clusters * image.cluster_size
    first.make_room(end + size)
    nothing, block = np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64)
    tracemalloc.start()
    try:
        new = range(len(wanted), len(wanted) + 1)
        rebuild._draft_blocks(first, wanted, nothing, block, np.array([end]), new=new)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    drafted = read_bytes(first.draft.overlay(), end, size)
    assert drafted == (b"\xff" * (len(wanted) // 8) + b"\x01").ljust(size, b"\0")
    # A byte for each of sixteen million, twice.
    assert peak < 5 * first.geometry.refblock_entries // 2


def with_bitmap() -> Image:
    made = fill(builder())
    made.add_bitmap("one", {0, 1})
    return made.build()


def test_dropped_bitmaps_are_proven_by_the_check_of_what_is_freed(monkeypatch) -> None:
    image = with_bitmap()
    image.set_word(72, 1)
    image.set_bits(image.bitmaps[0].bitmap_table_offset, RESERVED)
    number, proposal = checks_of(image, monkeypatch, RepairTier.BITMAPS)
    assert number == 2
    assert counts(proposal).keys() <= {Kind.LEAK}


def test_a_choice_that_leaves_damage_behind_foresees_it(monkeypatch) -> None:
    image = with_bitmap()
    image.set_word(72, 1)
    image.set_bits(image.bitmaps[0].bitmap_table_offset, RESERVED)
    image.set_word(image.l2_at(2), image.host_offset(2) + 512 | COPIED)
    number, proposal = checks_of(image, monkeypatch, RepairTier.BITMAPS)
    assert number == 2
    assert Kind.DIRTY_BIT in counts(proposal)


def test_where_flags_follow_refcounts_the_only_whole_check_is_the_proof(monkeypatch) -> None:
    """Of two entries that lead to one cluster both flags have to go, once it is counted twice."""
    image = plain()
    image.set_word(72, 1)
    image.set_word(image.l2_at(5), image.host_offset(1) | COPIED)
    number, proposal = checks_of(image, monkeypatch)
    assert number == 1
    assert {StageKind.PREPARE, StageKind.CORRECT} <= {each.kind for each in proposal.plan.stages}
    assert counts(proposal).keys() == {Kind.MULTIPLE_OWNERS, Kind.DIRTY_BIT, Kind.LEAK}


def test_where_flags_alone_are_wrong_one_check_is_the_proof(monkeypatch) -> None:
    """The bits of the header are foreseen with the flags: of refcounts nothing is drafted."""
    image = plain()
    image.clear_bits(image.l2_at(1), COPIED)
    number, proposal = checks_of(image, monkeypatch)
    assert number == 1
    assert proposal.plan.stages[0].kind is StageKind.GUARD
    assert counts(proposal) == {}


def test_a_flag_of_a_compressed_entry_is_proven_with_the_refcounts(monkeypatch) -> None:
    made = fill(builder())
    made.write_compressed(3, b"x")
    image = made.build()
    image.set_bits(image.l2_at(3), COPIED)
    image.set_refcount(image.host_offset(1) // SIZE, 0)
    number, proposal = checks_of(image, monkeypatch)
    assert number == 1
    assert Kind.COMPRESSED_COPIED in {edit.kind for edit in proposal.plan.edits}
    assert counts(proposal) == {}


def test_reserved_bits_stay_where_the_target_is_lost() -> None:
    image = plain()
    image.set_word(image.l1_at(1), len(image.data) + 9 * SIZE | RESERVED)
    assert counts(settled(image))[Kind.L1_ENTRY_RESERVED] == 1


def misaligned_zero(image: Image) -> None:
    """Guest cluster 1 reads as zeros, from between two host clusters."""
    image.set_word(image.l2_at(1), image.host_offset(1) + 512 | COPIED | entries.ZERO)


def test_reserved_bits_go_where_no_refcount_at_all_can_be_looked_up() -> None:
    """The refcount table is said to lie where the L1 table is, which is no refcount table."""
    image = plain()
    for index in range(2):
        image.set_bits(image.l1_at(index), 1 << 1)
    image.change_header(refcount_table_offset=image.header.l1_table_offset)
    assert counts(settled(image)) == {}


def claimed_as_refblock(image: Image, offset: int) -> Image:
    image.set_word(image.reftable_at(0), offset)
    return image


@pytest.mark.parametrize("what", ["L2 table", "L1 table", "data", "header", "zeros"])
def test_a_refcount_table_entry_that_leads_to_something_else_is_wrong(what) -> None:
    made = fill(builder())
    made.write(9, bytes(SIZE - 1) + b"x")
    image = made.build()
    places = {
        "L2 table": image.l2_table(1),
        "L1 table": image.header.l1_table_offset,
        "data": image.host_offset(1),
        "header": 0,
        "zeros": image.host_offset(9),
    }
    image.data[image.host_offset(9) + SIZE - 1] = 0
    guest = image.data[places[what] : places[what] + SIZE]
    proposal = settled(claimed_as_refblock(image, places[what]))
    # The old block is no more than a cluster that nothing refers to.
    assert set(counts(proposal)) <= {Kind.LEAK}
    assert read_bytes(Overlay(image.source, proposal.plan), places[what], SIZE)[104:] == guest[104:]


@pytest.mark.parametrize(
    "content",
    [b"", b"text " * (SIZE // 5), b"\x80\0\0\0\0\7\0\0" * (SIZE // 8)],
    ids=["zeros", "text", "table"],
)
def test_what_is_lost_stays_counted_where_something_else_lies_in_the_place_of_refcounts(
    content,
) -> None:
    image = plain()
    lost = image.l2_table(1)
    data = [image.word(lost + 8 * index) % COPIED for index in range(SIZE // 8)]
    evidence = {lost, *filter(None, data)}
    image.data[image.host_offset(1) : image.host_offset(2)] = content.ljust(SIZE, b"\0")
    image.set_word(image.reftable_at(0), image.host_offset(1))
    image.set_word(image.l1_at(1), 0)
    proposal = settled(image)
    assert proposal.after.mismatches is not None
    still = proposal.after.mismatches.clusters(Kind.LEAK, 1 << 20)
    assert evidence <= {cluster * SIZE for cluster in still.tolist()}


def test_what_leads_to_refcounts_keeps_the_place_where_they_are_made_anew() -> None:
    """Nothing shows afterwards that it reads them in place of its own, so that its id is asked."""
    image = plain()
    block = image.refblock(0)
    image.set_word(image.l2_at(1), block | COPIED)
    proposal = settled(image)
    assert counts(proposal) == {Kind.LEAK: 1}
    assert proposal.needs_quote
    assert "1 cluster of refcounts is something else's too" in " ".join(proposal.warnings)
    assert proposal.shares.clusters.tolist() == [block // SIZE]
    after = Overlay(image.source, proposal.plan)
    assert read_bytes(after, block, SIZE) == image.data[block : block + SIZE]
    assert read_bytes(after, image.l2_at(1), 8) == image.data[image.l2_at(1) :][:8]


@pytest.mark.parametrize("what", ["L1 entry", "data"])
def test_what_leads_to_refcounts_stays_named_where_none_can_be_made_anew(what) -> None:
    image = plain()
    image.set_word(image.l2_at(7), len(image.data) + 8 * SIZE | COPIED)
    block = image.refblock(0)
    image.set_word(image.l1_at(1) if what == "L1 entry" else image.l2_at(1), block | COPIED)
    proposal = settled(image)
    assert Kind.MULTIPLE_OWNERS in counts(proposal)
    assert not proposal.notes


def test_tables_alike_that_share_a_cluster_are_corrected_and_stay_named() -> None:
    """Two L1 entries lead to one L2 table: a guest that writes to one must copy it first."""
    image = plain()
    image.set_word(image.l1_at(1), image.word(image.l1_at(0)))
    proposal = settled(image)
    assert Kind.MULTIPLE_OWNERS in counts(proposal)
    assert counts(proposal).keys() <= {Kind.MULTIPLE_OWNERS, Kind.LEAK}
    after = Overlay(image.source, proposal.plan)
    for at in (image.l1_at(0), image.l1_at(1), image.l2_at(1)):
        assert read_bytes(after, at, 1)[0] & 0x80 == 0


def test_a_refcount_table_that_is_said_to_be_the_header_is_made_anew() -> None:
    image = plain()
    image.change_header(refcount_table_offset=0)
    assert counts(settled(image)) == {}


def test_a_refcount_table_that_seems_to_go_on_over_zeros_and_text_ends_where_it_did() -> None:
    image = plain()
    old, new = image.header.refcount_table_offset // SIZE, image.host_clusters
    image.data += image.data[old * SIZE : (old + 1) * SIZE] + bytes(SIZE) + b"text" * (SIZE // 4)
    image.set_refcount(old, 0)
    for cluster in range(new, new + 3):
        image.set_refcount(cluster, 1)
    image.set_word(image.l2_at(7), (new + 1) * SIZE | COPIED)
    image.set_word(image.l2_at(8), (new + 2) * SIZE | COPIED)
    image.change_header(refcount_table_offset=new * SIZE)
    assert check_image(image.source).counts() == {}
    image.change_header(refcount_table_clusters=3)
    assert Kind.MULTIPLE_OWNERS in check_image(image.source).counts()
    assert counts(settled(image)) == {}


@pytest.mark.parametrize("shared", [False, True], ids=["active", "with a snapshot"])
def test_an_entry_that_reads_as_zeros_does_not_make_the_header_shared(shared) -> None:
    made = fill(builder())
    made.write_zeros(9, allocated=True)
    if shared:
        made.take_snapshot("snapshot")
    image = made.build()
    image.set_word(image.l2_at(9), 0x200 | COPIED | entries.ZERO)
    assert Kind.MULTIPLE_OWNERS in check_image(image.source).counts()
    assert counts(settled(image)) == {}


def test_where_something_leads_to_the_header_refcounts_are_corrected_without_it() -> None:
    image = plain()
    image.set_word(image.l2_at(7), entries.COMPRESSED | 1)
    proposal = settled(image)
    assert set(counts(proposal)) == {Kind.MULTIPLE_OWNERS}
    assert all(stage.sectors[0] > 0 for stage in proposal.plan.stages)
    image.set_word(image.reftable_at(0), 0)
    with pytest.raises(AmbiguousCorruption, match="header"):
        propose(image.source, check_image(image.source), RepairTier.ALL)


def test_two_kinds_of_damage_in_one_table_go_with_one_repair() -> None:
    made = fill(builder())
    made.write_zeros(9, allocated=True)
    made.write_compressed(3, b"x")
    image = made.build()
    image.set_bits(image.l2_at(9), 1024)
    image.set_bits(image.l2_at(3), COPIED)
    assert {Kind.ZERO_MISALIGNED, Kind.COMPRESSED_COPIED} <= settled(image).before.counts().keys()


def test_l1_entries_are_mended_in_sectors_that_they_share() -> None:
    image = plain()
    image.set_bits(image.l1_at(0), RESERVED)
    image.set_word(image.l1_at(1), image.word(image.l1_at(1)) ^ COPIED)
    proposal = settled(image)
    (stage,) = (each for each in proposal.plan.stages if each.kind is StageKind.CORRECT)
    assert [patch.offset for patch in stage.patches()] == [image.l1_at(0), image.l1_at(1)]
    assert [(edit.offset, edit.length) for edit in proposal.plan.edits] == [
        (image.l1_at(1), 8),
        (image.l1_at(0), 8),
    ]


def test_what_a_cluster_of_zeros_reached_into_is_mended_with_it() -> None:
    """It reaches over two clusters, the second of them an L2 table in which a flag is wrong."""
    image = plain()
    table = image.l2_table(1)
    image.set_word(image.l2_at(1), table - SIZE + 512 | COPIED | entries.ZERO)
    image.clear_bits(image.l1_at(1), COPIED)
    for at in (table + 8 * index for index in range(SIZE // 8)):
        image.clear_bits(at, COPIED)
    assert Kind.MULTIPLE_OWNERS in check_image(image.source).counts()
    assert counts(settled(image)) == {}


def test_an_entry_that_reads_as_zeros_is_mended_also_in_a_table_that_it_overlaps_itself() -> None:
    image = plain()
    image.set_word(image.l2_at(3), image.l2_table(0) - 512 | entries.ZERO | RESERVED)
    proposal = settled(image)
    assert counts(proposal) == {}


def test_an_entry_that_reads_as_zeros_stays_in_a_table_that_is_another_ones_data() -> None:
    image = plain()
    image.set_word(image.l2_at(3), image.l2_table(0) - 512 | entries.ZERO)
    image.set_word(image.l2_at(1), image.l2_table(0) | COPIED)
    assert counts(settled(image))[Kind.ZERO_MISALIGNED] == 1


def test_what_the_repair_frees_is_no_leak_where_leaks_are_kept_for_what_may_be_lost() -> None:
    image = plain()
    misaligned_zero(image)
    image.set_word(image.l1_at(1), 0)
    proposal = settled(image)
    assert proposal.suspects
    assert proposal.before.counters.leaks == proposal.after.counters.leaks == 2
    assert counts(proposal) == {Kind.LEAK: 2}


def test_what_the_repair_frees_is_no_leak_where_the_census_is_not_complete() -> None:
    image = plain()
    misaligned_zero(image)
    image.set_word(image.l1_at(1), len(image.data) + 9 * SIZE | COPIED)
    proposal = settled(image)
    assert not proposal.after.complete
    assert proposal.before.counters.leaks == proposal.after.counters.leaks
    assert Kind.ZERO_MISALIGNED not in counts(proposal)


def test_a_refcount_stays_where_the_flag_that_tells_of_it_must_not_be_written() -> None:
    """The L2 table is also the guest's data: the flag of that entry cannot be cleared."""
    image = plain()
    image.set_word(image.l2_at(1), image.l2_table(0) | COPIED)
    proposal = settled(image)
    table = image.l2_table(0) // SIZE
    # What the guest had there leaks, and may yet be wanted.
    assert counts(proposal) == {Kind.MULTIPLE_OWNERS: 1, Kind.REFCOUNT_LOW: 1, Kind.LEAK: 1}
    assert proposal.after.mismatches is not None
    assert proposal.after.mismatches.between(table, table + 1)[2].tolist() == [1]
    assert proposal.before.counters.leaks == 1


def test_a_leak_stays_where_the_flag_that_tells_of_it_must_not_be_written() -> None:
    image = plain()
    image.set_word(image.l2_at(1), image.l2_table(0))
    image.set_refcount(image.l2_table(0) // SIZE, 2)
    image.set_word(image.l1_at(0), image.l2_table(0))
    data = image.host_offset(2)
    image.set_word(image.l2_at(2), data)
    image.set_refcount(data // SIZE, 2)
    proposal = settled(image, RepairTier.LEAKS)
    assert Kind.L2_COPIED not in counts(proposal)
    assert counts(proposal)[Kind.LEAK] == 1


def test_flags_follow_their_refcounts_under_leaks_whatever_else_is_wrong() -> None:
    """Entry 1 alone has a flag that is only missing; 0 and 2 follow what is lowered."""
    image = plain()
    image.set_bits(image.l2_at(3), RESERVED)
    image.clear_bits(image.l1_at(0), COPIED)
    for entry in (0, 1, 2):
        image.set_word(image.l2_at(entry), image.host_offset(entry))
    for entry in (0, 2):
        image.set_refcount(image.host_offset(entry) // SIZE, 2)
    assert counts(settled(image, RepairTier.LEAKS)) == {Kind.L2_ENTRY_RESERVED: 1}


def test_a_flag_that_tells_of_two_references_goes_under_leaks() -> None:
    image = with_snapshot()
    image.set_bits(image.l2_at(3), RESERVED)
    image.set_bits(image.l2_at(1), COPIED)
    assert Kind.L2_COPIED in check_image(Bytes(bytes(image.data))).counts()
    assert Kind.L2_COPIED not in counts(settled(image, RepairTier.LEAKS))


def test_a_flag_stays_under_leaks_where_its_refcount_is_wrong() -> None:
    """Counted too low, and not at all: what the flag must be is what `all` makes of it."""
    image = with_snapshot()
    image.set_refcount(image.host_offset(1) // SIZE, 1)
    proposal = settled(image, RepairTier.LEAKS)
    assert proposal.plan.changes_nothing
    assert Kind.L2_COPIED in counts(proposal)
    image = plain()
    image.set_refcount(image.host_offset(1) // SIZE, 0)
    proposal = settled(image, RepairTier.LEAKS)
    assert proposal.plan.changes_nothing
    assert counts(proposal)[Kind.L2_COPIED] == 1


def test_a_flag_stays_under_leaks_where_a_reference_may_be_hidden() -> None:
    """A snapshot table that cannot be read may have, to the cluster whose refcount says one."""
    image = plain()
    image.change_header(nb_snapshots=1, snapshots_offset=image.l2_table(0) + 512)
    image.clear_bits(image.l2_at(1), COPIED)
    proposal = settled(image, RepairTier.LEAKS)
    assert not proposal.before.complete
    assert proposal.plan.changes_nothing
    assert counts(proposal)[Kind.L2_COPIED] == 1


@pytest.mark.parametrize("number", [1, 2, 16])
@pytest.mark.parametrize("misaligned", [False, True])
def test_snapshots_whose_table_would_be_the_header_are_none(number, misaligned) -> None:
    image = plain()
    if misaligned:
        misaligned_zero(image)
    image.change_header(nb_snapshots=number, snapshots_offset=0)
    proposal = settled(image)
    assert counts(proposal) == {}
    assert proposal.after.layout is not None
    assert proposal.after.layout.header.nb_snapshots == 0


def test_one_refcount_that_is_lost_hides_no_snapshots() -> None:
    image = plain()
    image.change_header(nb_snapshots=1 << 17, snapshots_offset=0)
    image.set_refcount(0, 0)
    assert counts(settled(image)) == {}


def test_a_snapshot_table_on_the_header_is_refused_where_refcounts_are_lost_with_it() -> None:
    """The L1 table of the snapshot does not leak then: it looks free."""
    image = with_snapshot()
    image.change_header(snapshots_offset=0)
    start = image.refblock(0)
    image.data[start : start + SIZE] = bytes(SIZE)
    source = Bytes(bytes(image.data))
    assert check_image(source).counters.leaks == 0
    with pytest.raises(AmbiguousCorruption) as refused:
        propose(source, check_image(source), RepairTier.ALL)
    assert "snapshot table" in refused.value.reason


def test_a_snapshot_table_on_the_header_is_refused_where_something_leaks() -> None:
    image = with_snapshot()
    image.change_header(snapshots_offset=0)
    source = Bytes(bytes(image.data))
    with pytest.raises(AmbiguousCorruption) as refused:
        propose(source, check_image(source), RepairTier.ALL)
    assert "snapshot table" in refused.value.reason


def test_new_refcounts_go_behind_data_that_reaches_over_the_end() -> None:
    """No refcount can be looked up, and a misaligned cluster is cut by the end of the file."""
    image = plain()
    image.data += bytes(SIZE)
    image.set_word(image.reftable_at(0), image.refblock(0) + 512)
    image.set_word(image.l2_at(1), len(image.data) - 512 | COPIED)
    end = len(image.data) // SIZE
    proposal = settled(image)
    assert proposal.after.counters.check_errors == 0
    assert proposal.plan.size_after == (end + 1 + 2) * SIZE
    assert proposal.plan.size_before == end * SIZE


def test_new_refcounts_go_behind_what_an_entry_reached_over_the_end_before_it_was_mended() -> None:
    """The entry becomes plain zero, but only in a later stage than the new blocks are written."""
    image = plain()
    image.data += bytes(SIZE)
    image.set_word(image.reftable_at(0), image.refblock(0) + 512)
    image.set_word(image.l2_at(1), len(image.data) - 512 | COPIED | entries.ZERO)
    end = len(image.data) // SIZE
    proposal = settled(image)
    assert Kind.ZERO_MISALIGNED not in counts(proposal)
    assert proposal.plan.size_after == (end + 1 + 2) * SIZE


def test_a_new_snapshot_table_goes_behind_data_that_reaches_over_the_end() -> None:
    image = with_snapshot()
    image.data += bytes(SIZE)
    image.set_word(image.l2_at(1), len(image.data) - 512 | COPIED)
    at = image.snapshots[0].offset + 36
    image.data[at : at + 4] = (8).to_bytes(4, "big")
    proposal = settled(image)
    assert Kind.SNAPSHOT_EXTRA_DATA not in counts(proposal)
    assert proposal.plan.size_after > proposal.plan.size_before + SIZE


def test_a_new_snapshot_table_does_not_become_the_refcount_block_that_is_lost_past_the_end() -> (
    None
):
    image = with_snapshot()
    image.set_word(image.reftable_at(0), len(image.data))
    at = image.snapshots[0].offset + 36
    image.data[at : at + 4] = (8).to_bytes(4, "big")
    assert Kind.REFBLOCK_PAST_END in check_image(image.source).counts()
    assert counts(settled(image)) == {}


def test_of_a_snapshot_table_past_the_end_nothing_is_left_and_what_it_listed_stays_counted() -> (
    None
):
    image = with_snapshot()
    image.change_header(snapshots_offset=len(image.data))
    before = settled(image)
    assert before.plan.size_before == before.plan.size_after
    assert counts(before) == {Kind.LEAK: before.before.counters.leaks}
    assert before.suspects
    image.set_word(image.reftable_at(0), 0)
    source = Bytes(bytes(image.data))
    with pytest.raises(UnsupportedRepair) as refused:
        propose(source, check_image(source), RepairTier.ALL)
    assert refused.value.finding == Kind.SNAPSHOT_EXTRA_DATA.label


def test_nothing_is_written_in_a_table_that_runs_over_others_and_past_the_end() -> None:
    """With its size raised, the L1 table claims all that lies behind it: none of it is touched."""
    image = with_snapshot()
    image.set_refcount(image.host_offset(1) // SIZE, 1)
    image.change_header(l1_size=1 << 16)
    after_l1 = image.header.l1_table_offset
    proposal = settled(image)
    assert Kind.PAST_END in counts(proposal)
    for stage in proposal.plan.stages:
        assert (stage.sectors * 512 < after_l1).all()


def test_tables_of_a_snapshot_are_mended_once_the_snapshot_table_can_be_read() -> None:
    image = with_snapshot()
    at, l1 = image.snapshots[0].offset + 36, image.snapshots[0].l1_table_offset
    image.data[at : at + 4] = (1025).to_bytes(4, "big")
    image.set_bits(l1, RESERVED)
    proposal = settled(image)
    assert counts(proposal) == {}
    assert proposal.before.counters.check_errors == 1


def test_the_place_of_no_snapshot_table_becomes_0() -> None:
    image = plain()
    image.change_header(snapshots_offset=(1 << 64) - 1)
    proposal = settled(image)
    assert counts(proposal) == {}
    assert proposal.after.layout is not None
    assert proposal.after.layout.header.snapshots_offset == 0


def test_the_place_of_a_snapshot_table_stays_where_one_may_be_lost() -> None:
    image = with_snapshot()
    image.change_header(nb_snapshots=0, snapshots_offset=image.header.snapshots_offset + 8)
    proposal = settled(image)
    assert proposal.after.layout is not None
    assert proposal.after.layout.header.snapshots_offset == image.header.snapshots_offset


def test_what_would_free_clusters_waits_where_no_refcount_may_be_written() -> None:
    """The guest's data lies on a refcount block, and the file must not grow: neither is written."""
    image = with_snapshot()
    image.set_word(image.l2_at(7), len(image.data) + 8 * SIZE | COPIED)
    image.set_word(image.l2_at(2), image.refblock(0) | COPIED)
    misaligned_zero(image)
    at = image.snapshots[0].offset + 36
    image.data[at : at + 4] = (8).to_bytes(4, "big")
    left = counts(settled(image))
    assert {Kind.ZERO_MISALIGNED, Kind.SNAPSHOT_EXTRA_DATA} <= left.keys()


@pytest.mark.parametrize("hidden", [Kind.SNAPSHOT_L1_MISALIGNED, Kind.L2_TABLE_MISALIGNED])
def test_leaks_are_not_freed_where_a_table_that_could_refer_to_them_cannot_be_read(
    hidden: Kind,
) -> None:
    image = with_snapshot()
    free = image.refcounts().index(0)
    image.set_refcount(free, 1)
    at = image.snapshots[0].offset if hidden is Kind.SNAPSHOT_L1_MISALIGNED else image.l1_at(1)
    image.set_bits(at, 512)
    source = Bytes(bytes(image.data))
    with pytest.raises(AmbiguousCorruption, match="not proven to be free") as refused:
        propose(source, check_image(source), RepairTier.LEAKS)
    assert refused.value.finding == hidden.label


@pytest.mark.parametrize("tier", DETERMINED)
def test_no_plan_leaves_without_its_proof(
    tier: RepairTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a planner drafts: here, one that writes where the guest has its data."""
    image = plain()
    image.set_refcount(image.refcounts().index(0), 1)

    def overwrite(scope: Scope, **_options: object) -> None:
        scope.draft.write(StageKind.CORRECT, image.host_offset(1), b"not to be")

    monkeypatch.setattr(tiers, "update_copied_flags_for_l1", overwrite)
    source = Bytes(bytes(image.data))
    with pytest.raises(AmbiguousCorruption, match="not proven: it would write where no metadata"):
        propose(source, check_image(source), tier)


# ---- on a block device, which does not grow ----


def on_device(image: Image, size: int) -> Proposal:
    """The repair of an image on a device of so many bytes."""
    source = Bytes(bytes(image.data).ljust(size, b"\0"))
    proposal = propose(source, check_image(source), RepairTier.ALL, can_grow=False)
    assert proposal.plan.size_after == proposal.plan.size_before == size
    return proposal


def written(proposal: Proposal) -> set[int]:
    """The clusters that a plan writes to."""
    return {int(s) * 512 // SIZE for stage in proposal.plan.stages for s in stage.sectors}


def test_new_refcounts_go_behind_all_that_is_used() -> None:
    image = plain()
    image.set_word(image.reftable_at(0), 0)
    used = image.host_clusters
    proposal = on_device(image, (used + 9) * SIZE)
    assert counts(proposal) == {}
    assert written(proposal) == {0, used, used + 1}


def test_new_refcounts_go_behind_what_may_be_evidence() -> None:
    image = plain()
    image.set_word(image.reftable_at(0), 0)
    image.data += bytes(SIZE) + b"something old".ljust(SIZE, b"\0")
    proposal = on_device(image, len(image.data) + 9 * SIZE)
    assert written(proposal) == {0, image.host_clusters, image.host_clusters + 1}


def test_a_device_that_is_full_of_old_data_is_repaired_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scope, "LOOKED_AHEAD", 4 * SIZE)
    image = plain()
    image.set_word(image.reftable_at(0), 0)
    lost_refblock = image.host_clusters - 1
    image.data += b"old" * (3 * SIZE)
    proposal = on_device(image, len(image.data))
    assert written(proposal) == {0, lost_refblock, lost_refblock + 1}


def test_without_room_new_refcounts_are_refused() -> None:
    image = plain()
    image.set_word(image.reftable_at(0), 0)
    with pytest.raises(UnsupportedRepair, match="does not grow; make the device larger"):
        on_device(image, len(image.data) + SIZE)


def test_what_lies_behind_the_image_is_named_where_it_takes_the_room() -> None:
    image = plain()
    image.set_word(image.reftable_at(0), 0)
    used = image.host_clusters - 1  # The last cluster is the refcount block that is lost.
    image.data += b"old" * SIZE
    with pytest.raises(UnsupportedRepair) as refused:
        on_device(image, len(image.data))
    assert f"lies behind the image from {used * SIZE} on" in refused.value.reason
    assert f"larger, by {2 * SIZE} bytes or more; or save" in refused.value.wayout
    assert f"zero it (blkdiscard -z -o {used * SIZE})" in refused.value.wayout
    on_device(image, len(image.data) + 2 * SIZE)
    image.data[used * SIZE :] = bytes(4 * SIZE)
    on_device(image, len(image.data))


def test_without_room_the_snapshot_table_stays_as_it_is() -> None:
    image = with_snapshot()
    at = image.snapshots[0].offset + 36
    image.data[at : at + 4] = (8).to_bytes(4, "big")
    assert Kind.SNAPSHOT_EXTRA_DATA in counts(on_device(image, len(image.data)))
    assert counts(on_device(image, len(image.data) + SIZE)) == {}


def test_an_unreadable_header_is_refused_with_a_way_out() -> None:
    image = plain()
    image.data[4:8] = (9).to_bytes(4, "big")
    source = Bytes(bytes(image.data))
    report = check_image(source)
    for tier in DETERMINED:
        with pytest.raises(ParseFailed) as refused:
            propose(source, report, tier)
        assert "version" in refused.value.reason
        assert refused.value.wayout


def leak_with_autoclear(bits: int) -> Image:
    image = plain()
    image.set_refcount(len(image.data) // SIZE - 1, 2)
    image.change_header(autoclear_features=bits)
    return image


@pytest.mark.parametrize("tier", DETERMINED)
def test_autoclear_bits_that_are_not_known_go_before_anything_else_is_written(tier) -> None:
    image = leak_with_autoclear(1 << 63 | 1 << 5 | Autoclear.BITMAPS)
    proposal = settled(image, tier)
    assert counts(proposal) == {}
    outcome = Overlay(image.source, proposal.plan)
    assert read_header(outcome).autoclear_features == Autoclear.BITMAPS
    first = proposal.plan.stages[0]
    assert first.kind is StageKind.GUARD
    assert first.bytes_at(88, 8)[1] == int(Autoclear.BITMAPS).to_bytes(8, "big")
    assert Kind.UNKNOWN_AUTOCLEAR in {edit.kind for edit in proposal.plan.edits}


def test_a_header_that_may_not_be_written_to_stops_a_repair_that_would_have_to() -> None:
    image = leak_with_autoclear(1 << 63)
    image.set_word(image.l2_at(7), entries.COMPRESSED | 1)
    with pytest.raises(AmbiguousCorruption, match="autoclear bits"):
        propose(image.source, check_image(image.source), RepairTier.LEAKS)


# --- the snapshot table -----------------------------------------------------------------------


def snapshots_of(proposal: Proposal) -> list[bytes]:
    return [snapshot.name for snapshot in proposal.after.snapshots]


def three_snapshots() -> Image:
    made = builder()
    for number, name in enumerate(("one", "two", "three")):
        made.write(number, bytes([number + 1]) * SIZE)
        made.take_snapshot(name)
    made.write(0, b"now" * (SIZE // 3))
    return made.build()


def test_entries_of_zeros_behind_the_snapshots_are_none_and_nothing_is_moved() -> None:
    image = three_snapshots()
    image.change_header(nb_snapshots=9)
    proposal = settled(image)
    assert counts(proposal) == {}
    assert snapshots_of(proposal) == [b"one", b"two", b"three"]
    assert proposal.plan.size_after == proposal.plan.size_before


def test_entries_of_zeros_are_none_also_where_they_are_all_and_what_they_listed_stays_counted() -> (
    None
):
    image = three_snapshots()
    first, last = image.snapshots[0].offset, image.snapshots[-1].offset
    image.data[first : last + 80] = bytes(last + 80 - first)
    leaked = check_image(image.source).counters.leaks
    proposal = settled(image)
    assert snapshots_of(proposal) == []
    assert counts(proposal) == {Kind.LEAK: leaked}


def test_a_snapshot_that_is_cut_off_stays_counted() -> None:
    image = three_snapshots()
    second = image.snapshots[1].offset
    image.data[second : second + 40] = b"\xff" * 40
    leaked = check_image(image.source).counters.leaks
    proposal = settled(image)
    assert snapshots_of(proposal) == [b"one", b"three"]
    assert counts(proposal) == {Kind.LEAK: leaked}
    assert [table.offset for table in proposal.suspects if table.is_l1]


def test_a_snapshot_is_not_cut_off_where_nothing_would_show_what_its_data_was() -> None:
    """Its tables are overwritten too, so that what it had seems to be waste."""
    image = three_snapshots()
    snapshot = image.snapshots[2]
    table = image.word(snapshot.l1_table_offset) & ~COPIED
    image.data[snapshot.offset : snapshot.offset + 40] = b"\xff" * 40
    for at in (table, snapshot.l1_table_offset):
        image.data[at : at + SIZE] = b"?" * SIZE
    with pytest.raises(AmbiguousCorruption, match="snapshot table"):
        propose(image.source, check_image(image.source), RepairTier.ALL)


def test_nothing_is_cut_off_where_refcounts_would_not_show_what_that_lost() -> None:
    image = three_snapshots()
    second = image.snapshots[1].offset
    image.data[second : second + 40] = b"\xff" * 40
    image.set_word(image.reftable_at(0), 0)
    with pytest.raises(UnsupportedRepair, match="snapshot table"):
        propose(image.source, check_image(image.source), RepairTier.ALL)


def test_extra_data_that_would_reach_past_the_end_of_the_file_hides_no_snapshot() -> None:
    image = three_snapshots()
    at = image.snapshots[1].offset + 36
    image.data[at : at + 4] = (1 << 16).to_bytes(4, "big")
    proposal = settled(image)
    assert counts(proposal) == {}
    assert snapshots_of(proposal) == [b"one", b"two", b"three"]


def test_a_block_that_many_entries_lead_to_in_refcounts_of_a_bit_is_taken_apart() -> None:
    """More references than its width holds, and a leak: no other finding says so."""
    made = ImageBuilder(cluster_bits=12, size=1 << 20, refcount_order=0)
    made.write(0, b"data")
    image = made.build()
    table = read_header(image.source).refcount_table_offset
    block = image.word(table)
    for entry in range(64):
        image.set_word(table + entry * 8, block)
    image.data[block] |= 1 << (len(image.data) >> 12)
    image.data += bytes(1 << 12)
    before = check_image(image.source).counts()
    assert before == {Kind.MULTIPLE_OWNERS: 1, Kind.REFCOUNT_OVERFLOW: 63, Kind.LEAK: 1}
    proposal = settled(image)
    assert counts(proposal) == {}
    assert {edit.kind for edit in proposal.plan.edits} == {Kind.REFCOUNT_OVERFLOW}


def test_a_proposal_in_brief_says_the_same_and_holds_no_number_for_each_cluster() -> None:
    image = fill(builder()).build()
    image.set_refcount(image.host_offset(2) // SIZE, 0)
    image.set_word(image.l2_at(3), image.host_offset(5) | COPIED)
    found = propose(image.source, check_image(image.source), RepairTier.ALL)
    brief = found.in_brief()
    assert found.after.mismatches is not None
    assert brief.after.mismatches is None
    assert brief.plan is found.plan
    assert brief.after.verdict == found.after.verdict
    assert tiers.same_outcome(brief.after, found.after)
    for name in ("planned", "left_count", "complete", "needs_quote", "warnings", "counters"):
        assert getattr(brief, name) == getattr(found, name)
