"""What a person chooses: each owner its own cluster, bitmaps dropped, entries that are none cut."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from planner.check.check import check_image
from planner.errors import AmbiguousCorruption, UnsupportedRepair
from planner.findings.kinds import NONE, OWNER_DTYPES, Owners, Structure
from planner.findings.kinds import FindingKind as Kind
from planner.metadata import work_limits
from planner.qcow2 import entries
from planner.qcow2.bitmaps import ENTRY_BYTES, IN_USE
from planner.qcow2.header import CRYPT_LUKS, Autoclear, read_header
from planner.qcow2.layout import Layout
from planner.qcow2.snapshots import encode_snapshot
from planner.repair import choices, proof, split
from planner.repair.overlay import Overlay
from planner.repair.plan import Plan, RepairTier, StageKind
from planner.repair.scope import Scope
from planner.repair.split import GONE
from planner.repair.tiers import Proposal, propose, tiers_for
from planner.repair.words import draft_words
from planner.source import SECTOR, Bytes, read_bytes
from tests.crash.guest import disks
from tests.images.builder import Image
from tests.images.corpus.rule import (
    COPIED,
    SIZE,
    builder,
    extended,
    fill,
    plain,
    with_snapshot,
)

SPLIT, BITMAPS, SNAPSHOTS = RepairTier.SPLIT, RepairTier.BITMAPS, RepairTier.SNAPSHOTS


def chosen(image: Image, tier: RepairTier, *, can_grow: bool = True) -> tuple[Proposal, Bytes]:
    """The repair of an image, and the image as it is then; a second one has nothing to do."""
    source = image.source
    proposal = propose(source, check_image(source), tier, can_grow=can_grow)
    end = proposal.plan.size_after
    repaired = Bytes(read_bytes(Overlay(source, proposal.plan), 0, end))
    assert propose(repaired, check_image(repaired), tier, can_grow=can_grow).plan.changes_nothing
    return proposal, repaired


# ---- split ----


def data_on_data(image: Image) -> None:
    image.set_word(image.l2_at(5), image.host_offset(1) | COPIED)


def data_on_an_l2_table(image: Image) -> None:
    image.set_word(image.l2_at(5), image.l2_table(1) | COPIED)


def data_on_its_own_l2_table(image: Image) -> None:
    image.set_word(image.l2_at(5), image.l2_table(0) | COPIED)


def data_on_the_l1_table(image: Image) -> None:
    image.set_word(image.l2_at(5), image.header.l1_table_offset | COPIED)


def data_on_a_refcount_block(image: Image) -> None:
    image.set_word(image.l2_at(5), image.refblock(0) | COPIED)


def data_on_the_refcount_table(image: Image) -> None:
    image.set_word(image.l2_at(5), image.header.refcount_table_offset | COPIED)


def an_l2_table_at_two_places(image: Image) -> None:
    image.set_word(image.l1_at(1), image.word(image.l1_at(0)))


def an_l2_table_on_a_refcount_block(image: Image) -> None:
    image.data[image.refblock(0) : image.refblock(0) + SIZE] = image.data[
        image.l2_table(1) : image.l2_table(1) + SIZE
    ]
    image.set_word(image.l1_at(1), image.refblock(0) | COPIED)


def an_l2_table_on_the_l1_table(image: Image) -> None:
    image.set_word(image.l1_at(1), image.header.l1_table_offset | COPIED)


SHARED: dict[str, Callable[[Image], None]] = {
    each.__name__: each
    for each in (
        data_on_data,
        data_on_an_l2_table,
        data_on_its_own_l2_table,
        data_on_the_l1_table,
        data_on_a_refcount_block,
        data_on_the_refcount_table,
        an_l2_table_at_two_places,
        an_l2_table_on_a_refcount_block,
        an_l2_table_on_the_l1_table,
    )
}

SHAPES: dict[str, Callable[[], Image]] = {
    "plain": plain,
    "version 2": lambda: plain(version=2),
    "snapshot": with_snapshot,
    "refcounts of a bit": lambda: plain(refcount_order=0),
    "refcounts of 64 bits": lambda: plain(refcount_order=6),
}


SHARED_SHAPES = [(shape, name) for shape in SHAPES for name in SHARED]
SHARED_SHAPES += [("extended L2", "data_on_data"), ("extended L2", "data_on_a_refcount_block")]


@pytest.mark.parametrize(("shape", "name"), SHARED_SHAPES)
def test_each_owner_gets_its_own_cluster_and_reads_what_it_read(shape: str, name: str) -> None:
    image = SHAPES[shape]() if shape in SHAPES else fill(extended()).build()
    SHARED[name](image)
    before = check_image(image.source)
    assert Kind.MULTIPLE_OWNERS in before.counts()
    proposal, repaired = chosen(image, SPLIT)
    assert Kind.MULTIPLE_OWNERS not in proposal.after.counts()
    assert proposal.after.counters.corruptions == proposal.after.counters.check_errors == 0
    assert disks(repaired.data) == disks(bytes(image.data))
    # Nothing that anybody had is written over.
    contested = before.findings.of(Kind.MULTIPLE_OWNERS).host_offset
    for stage in proposal.plan.stages:
        assert not set((stage.sectors * SECTOR // image.cluster_size).tolist()) & {
            offset // image.cluster_size for offset in contested.tolist()
        } - set(before.owners.of_tables_alike().tolist())


def test_all_owners_are_named_with_where_they_are() -> None:
    image = plain()
    place = image.host_offset(1)
    data_on_data(image)
    proposal, repaired = chosen(image, SPLIT)
    shares = proposal.shares
    assert shares.clusters.tolist() == [place // SIZE]
    assert shares.owners.l2_index.tolist() == [1, 5]
    moved = Image(bytearray(repaired.data)).host_offset(5)
    assert shares.new.tolist() == [NONE, moved // SIZE]
    assert moved >= len(image.data)
    assert proposal.notes[0].startswith("1 cluster with two owners")


def test_refcounts_that_share_a_cluster_are_made_anew_elsewhere() -> None:
    image = plain()
    data_on_a_refcount_block(image)
    old = image.refblock(0)
    proposal, repaired = chosen(image, SPLIT)
    after = Image(bytearray(repaired.data))
    assert after.refblock(0) != old
    assert after.host_offset(5) == old
    at = proposal.shares.owners.structure == Structure.REFBLOCK
    assert proposal.shares.new[at].tolist() == [GONE]


@pytest.mark.parametrize(("inflict", "number"), [(data_on_a_refcount_block, 0), (data_on_data, 1)])
def test_owners_that_keep_their_places_are_listed_once(inflict, number: int, monkeypatch) -> None:
    """There may be hundreds of thousands, of which nothing is moved."""
    image, joined, join = plain(), [], split.Shares.joined

    def joining(self, *later):
        joined.append(len(later))
        return join(self, *later)

    monkeypatch.setattr(split.Shares, "joined", joining)
    inflict(image)
    proposal = propose(image.source, check_image(image.source), SPLIT)
    assert sum(joined) == number
    assert len(proposal.shares.clusters) == 1


def test_to_join_owners_takes_no_more_than_twice_what_they_are() -> None:
    number, rng = 50_000, np.random.default_rng(1)

    def some() -> split.Shares:
        columns = rng.integers(0, number, (6, number))
        columns[0].sort()
        columns[1] = 0
        pairs = zip(columns, OWNER_DTYPES, strict=True)
        owners = Owners(*(column.astype(dtype) for column, dtype in pairs))
        return split.Shares(owners, np.arange(number))

    one, other = some(), some()
    tracemalloc.start()
    try:
        joined = one.joined(other)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(joined.new) == 2 * number
    assert peak / len(joined.new) < 2 * 37, "37 bytes are one"


def test_a_snapshot_that_has_the_same_guest_cluster_goes_with_it() -> None:
    image = with_snapshot()
    image.set_word(image.l2_at(1), image.host_offset(5) | COPIED)
    image.set_word(image.l2_at(1, 0), image.host_offset(5))
    proposal, repaired = chosen(image, SPLIT)
    assert proposal.after.counters.corruptions == 0
    after = Image(bytearray(repaired.data))
    here, there = (after.word(after.l2_at(*at)) for at in ((1,), (1, 0)))
    assert here & entries.L2_OFFSET == there & entries.L2_OFFSET != after.host_offset(5)
    assert not here & COPIED


def test_a_snapshot_table_on_the_active_one_gets_its_own() -> None:
    image = with_snapshot()
    image.set_word(image.snapshots[0].offset, image.header.l1_table_offset)
    proposal, repaired = chosen(image, SPLIT)
    assert proposal.after.counters.corruptions == 0
    after = Image(bytearray(repaired.data))
    assert after.snapshots[0].l1_table_offset != after.header.l1_table_offset
    assert disks(repaired.data) == disks(bytes(image.data))


def snapshots_of_one_table() -> Image:
    made = builder()
    made.write(0, b"a" * SIZE)
    for name in ("one", "two", "three", "four"):
        made.take_snapshot(name)
    image = made.build()
    for snapshot in image.snapshots[1:]:
        image.set_word(snapshot.offset, image.snapshots[0].l1_table_offset)
    return image


def test_snapshots_that_have_one_table_get_their_own_and_are_told_so_all_at_once(
    monkeypatch,
) -> None:
    """To draft a word reads what was drafted before: of hundreds, one by one, that took seconds."""
    image = snapshots_of_one_table()
    drafted = []

    def drafting(scope, kind, offset, words, **options):
        drafted.append((options["structure"], len(offset)))
        draft_words(scope, kind, offset, words, **options)

    monkeypatch.setattr(split, "draft_words", drafting)
    _, repaired = chosen(image, SPLIT)
    assert drafted.count((Structure.SNAPSHOT_TABLE, 3)) == 1
    after = Image(bytearray(repaired.data))
    assert len({each.l1_table_offset for each in after.snapshots}) == 4
    assert disks(repaired.data) == disks(bytes(image.data))


def test_where_a_check_gets_further_once_tables_have_parted_that_is_said(monkeypatch) -> None:
    """It follows only so much of tables that lie over each other, and what it finds there."""
    monkeypatch.setattr(work_limits, "MAX_SHARED_BYTES", 1)
    image = snapshots_of_one_table()
    image.set_bits(image.l1_at(0, 0), 1 << 60)
    before = check_image(image.source)
    assert before.counts()[Kind.CHECK_STOPPED] == 1
    with pytest.raises(AmbiguousCorruption, match="stopped before it had seen all of the image"):
        propose(image.source, before, SPLIT)


def test_compressed_clusters_keep_the_place_that_they_have_in_common() -> None:
    made = builder()
    made.write_compressed(0, b"a" * SIZE)
    made.write_compressed(1, b"b" * SIZE)
    made.write(2, b"c" * SIZE)
    image = made.build()
    packed = image.word(image.l2_at(0)) & (1 << 56) - 1
    image.set_word(image.l2_at(2), packed // SIZE * SIZE | COPIED)
    words = [image.word(image.l2_at(cluster)) for cluster in (0, 1)]
    proposal, repaired = chosen(image, SPLIT)
    after = Image(bytearray(repaired.data))
    assert [after.word(after.l2_at(cluster)) for cluster in (0, 1)] == words
    assert proposal.after.counters.corruptions == 0
    assert disks(repaired.data) == disks(bytes(image.data))


def test_a_bitmap_keeps_its_place_and_the_guest_reads_on_in_a_copy() -> None:
    made = fill(builder())
    made.add_bitmap("monday", {1, 2})
    image = made.build()
    table = image.bitmaps[0].bitmap_table_offset
    image.set_word(image.l2_at(1), table | COPIED)
    proposal, repaired = chosen(image, SPLIT)
    after = Image(bytearray(repaired.data))
    assert after.bitmaps == image.bitmaps
    assert after.host_offset(1) >= len(image.data)
    assert proposal.complete
    assert disks(repaired.data) == disks(bytes(image.data))


def test_where_an_encrypted_cluster_lies_is_part_of_its_key_so_that_the_table_moves() -> None:
    image = luks()
    data_on_an_l2_table(image)
    place = image.l2_table(1)
    _, repaired = chosen(image, SPLIT)
    after = Image(bytearray(repaired.data))
    assert (after.host_offset(5), after.l2_table(1) != place) == (place, True)
    image = luks()
    data_on_data(image)
    proposal, repaired = chosen(image, SPLIT)
    assert proposal.plan.changes_nothing
    assert not proposal.complete
    (left,) = [each for each in proposal.left if each.kind is Kind.MULTIPLE_OWNERS]
    assert "encrypted" in left.reason


def luks() -> Image:
    image = plain(crypt_method=CRYPT_LUKS, luks_header=bytes(3 * SIZE))
    assert image.header.crypt_method == CRYPT_LUKS
    return image


def test_entries_of_a_table_that_is_somebodys_data_stay_and_the_other_moves() -> None:
    made = fill(builder())
    for cluster in range(16, 32):
        made.write(cluster, bytes([cluster]) * SIZE)
    image = made.build()
    table, good = image.l2_table(1), image.host_offset(1)
    words = (COPIED | 0x3F << 56 | number % 9 * SIZE + 512 * 3 for number in range(SIZE // 8))
    image.data[table : table + SIZE] = b"".join(word.to_bytes(8, "big") for word in words)
    image.set_word(table, good)
    assert Kind.TABLE_OVERWRITTEN in check_image(image.source).counts()
    before = bytes(image.data[table : table + SIZE])
    _, repaired = chosen(image, SPLIT)
    assert repaired.data[table : table + SIZE] == before
    assert disks(repaired.data) == disks(bytes(image.data))


def test_an_l1_entry_of_reserved_bits_alone_leads_nowhere_and_gets_no_table() -> None:
    """To QEMU it is empty; its table would be the header, which as one leads to the refcounts."""
    image = plain()
    image.set_word(image.l1_at(1), 1 << 60)
    assert Kind.MULTIPLE_OWNERS in check_image(image.source).counts()
    with pytest.raises(AmbiguousCorruption, match="refers to the header's cluster"):
        propose(image.source, check_image(image.source), SPLIT)


def test_so_much_is_copied_at_a_time_and_the_next_goes_on(monkeypatch) -> None:
    monkeypatch.setattr(split, "MAX_COPIED", SIZE)
    image = plain()
    image.set_word(image.l2_at(5), image.host_offset(1) | COPIED)
    image.set_word(image.l2_at(0), image.host_offset(2) | COPIED)
    first = propose(image.source, check_image(image.source), SPLIT)
    assert (first.complete, first.after.counts()[Kind.MULTIPLE_OWNERS]) == (False, 1)
    assert first.plan.size_after == first.plan.size_before + SIZE
    image = Image(
        bytearray(read_bytes(Overlay(image.source, first.plan), 0, first.plan.size_after))
    )
    second, _ = chosen(image, SPLIT)
    assert second.complete


def test_a_device_has_room_behind_all_that_is_used_or_it_is_refused() -> None:
    image = plain()
    data_on_data(image)
    with pytest.raises(UnsupportedRepair, match="a block device of"):
        chosen(image, SPLIT, can_grow=False)
    used = len(image.data)
    image.data += bytes(8 * SIZE)
    proposal, repaired = chosen(image, SPLIT, can_grow=False)
    assert proposal.plan.size_after == used + 8 * SIZE
    assert proposal.complete
    assert disks(repaired.data) == disks(bytes(image.data))


def test_nothing_is_copied_over_what_the_image_has_lost_behind_its_end() -> None:
    image = plain()
    data_on_data(image)
    image.set_word(image.l2_at(0), len(image.data) + 4 * SIZE | COPIED)
    with pytest.raises(UnsupportedRepair, match="would look as if it were there"):
        propose(image.source, check_image(image.source), SPLIT)


def test_refcounts_that_would_lie_in_the_header_are_nobody_to_split_from() -> None:
    image = plain()
    image.change_header(refcount_table_offset=0)
    with pytest.raises(UnsupportedRepair, match="the tier `all` makes them anew"):
        propose(image.source, check_image(image.source), SPLIT)
    assert propose(image.source, check_image(image.source), RepairTier.ALL).after.verdict == "clean"


def test_where_not_all_owners_are_known_none_is_moved(monkeypatch) -> None:
    image = plain()
    data_on_data(image)
    report = check_image(image.source)
    object.__setattr__(report.owners, "truncated", True)
    with pytest.raises(AmbiguousCorruption, match="than can be listed"):
        propose(image.source, report, SPLIT)


@pytest.mark.parametrize("what", ["elsewhere", "copy", "bits"])
def test_a_split_by_which_somebody_would_read_other_bytes_is_not_proven(what, monkeypatch) -> None:
    image = plain()
    data_on_data(image)

    def spoil(scope: Scope, **_: object) -> None:
        at, word = image.l2_at(5), len(image.data) | COPIED
        if what == "copy":
            scope.draft.write(StageKind.PREPARE, len(image.data) + 100, b"not what was read")
        else:
            word = image.host_offset(2) | COPIED if what == "elsewhere" else word | entries.ZERO
            scope.draft.write(StageKind.CORRECT, at, word.to_bytes(8, "big"))

    monkeypatch.setattr(choices, "update_copied_flags_for_l1", spoil)
    monkeypatch.setattr(proof, "_require_nothing_worse", lambda *_: None)
    with pytest.raises(AmbiguousCorruption, match="would read other bytes"):
        propose(image.source, check_image(image.source), SPLIT)


# ---- bitmaps ----


def with_bitmaps(*names: str) -> Image:
    made = fill(builder())
    for number, name in enumerate(names):
        made.add_bitmap(name, {number, number + 1})
    return made.build()


def test_only_the_bitmaps_that_are_broken_go_and_what_they_had_is_freed() -> None:
    image = with_bitmaps("one", "two", "three")
    broken, kept = image.bitmaps[1], (image.bitmaps[0], image.bitmaps[2])
    image.set_bits(broken.bitmap_table_offset, 1 << 60)
    proposal, repaired = chosen(image, BITMAPS)
    after = Image(bytearray(repaired.data))
    told = [(each.name, each.bitmap_table_offset) for each in after.bitmaps]
    assert told == [(each.name, each.bitmap_table_offset) for each in kept]
    assert after.refcount(broken.bitmap_table_offset // SIZE) == 0
    assert after.header.autoclear_features & Autoclear.BITMAPS
    assert proposal.complete
    assert "'two' is dropped: its table has invalid entries" in proposal.notes[0]
    assert "2 bitmaps that can be used" in proposal.notes[1]


def test_meanwhile_the_image_says_that_it_has_none() -> None:
    image = with_bitmaps("one", "two")
    image.set_bits(image.bitmaps[1].bitmap_table_offset, 1 << 60)
    proposal, _ = chosen(image, BITMAPS)
    plan, has_none = proposal.plan, {}
    for stage in plan.stages:
        until = tuple(each for each in plan.stages if each.kind <= stage.kind)
        so_far = Overlay(image.source, Plan(BITMAPS, until, plan.size_before, plan.size_after))
        has_none[stage.kind] = bool(Layout.read(so_far).extensions.stale_bitmaps)
    between = [kind for kind in has_none if StageKind.PREPARE <= kind < StageKind.CORRECT]
    assert between
    assert all(has_none[kind] for kind in between)
    assert not has_none[max(has_none)]


def test_a_bitmap_that_was_never_saved_stops_a_backup_and_goes() -> None:
    image = with_bitmaps("one", "two")
    image.set_bits(image.bitmaps[0].offset + 12 - 4, IN_USE)
    assert image.bitmaps[0].flags & IN_USE
    proposal, repaired = chosen(image, BITMAPS)
    assert [each.name for each in Image(bytearray(repaired.data)).bitmaps] == [b"two"]
    assert "inconsistent" in proposal.notes[0]
    assert proposal.after.verdict == "clean"


def test_with_the_last_one_the_extension_goes_and_what_follows_it_moves_up() -> None:
    image = with_bitmaps("one")
    image.set_bits(image.bitmaps[0].bitmap_table_offset, 1 << 60)
    magics = [each.magic for each in Layout.read(image.source).extensions.all]
    proposal, repaired = chosen(image, BITMAPS)
    layout = Layout.read(repaired)
    left = [each.magic for each in layout.extensions.all]
    assert left == [each for each in magics if each != 0x23852875]
    assert not layout.header.autoclear_features & Autoclear.BITMAPS
    assert proposal.after.verdict in ("leaks", "clean")


def test_all_go_where_the_directory_is_broken_and_nothing_that_it_listed_is_freed() -> None:
    image = with_bitmaps("one", "two")
    tables = [each.bitmap_table_offset // SIZE for each in image.bitmaps]
    image.set_word(image.bitmaps[0].offset + ENTRY_BYTES - 8, (1 << 64) - 1)
    proposal, repaired = chosen(image, BITMAPS)
    after = Image(bytearray(repaired.data))
    assert after.bitmaps == ()
    assert [after.refcount(table) for table in tables] == [1, 1]
    assert "all bitmaps are dropped" in proposal.notes[0]


def test_a_bitmap_in_a_guests_cluster_goes_and_the_guest_is_named() -> None:
    image = with_bitmaps("one", "two")
    image.set_word(image.bitmaps[0].bitmap_table_offset, image.host_offset(1))
    proposal, repaired = chosen(image, BITMAPS)
    assert proposal.after.counts().get(Kind.MULTIPLE_OWNERS, 0) == 0
    assert sorted(proposal.shares.new.tolist()) == [GONE, NONE]
    assert disks(repaired.data) == disks(bytes(image.data))


@pytest.mark.parametrize("kept", ["some", "none", "stale"])
def test_autoclear_bits_that_are_not_known_go_first_whichever_bitmaps_stay(kept: str) -> None:
    image = with_bitmaps("one", "two") if kept == "some" else with_bitmaps("one")
    image.set_bits(image.bitmaps[0].offset + 12 - 4, IN_USE)
    known = 0 if kept == "stale" else int(Autoclear.BITMAPS)
    image.change_header(autoclear_features=1 << 63 | 1 << 5 | known)
    proposal, repaired = chosen(image, BITMAPS)
    outcome = Autoclear.BITMAPS if kept == "some" else 0
    assert read_header(repaired).autoclear_features == outcome
    stages = proposal.plan.stages
    assert stages[0].kind is StageKind.GUARD
    bits = [stage.bytes_at(88, 8)[1] for stage in stages]
    assert not any(int.from_bytes(each, "big") >> 2 for each in bits)
    assert stages[0].bytes_at(88, 8)[1] == known.to_bytes(8, "big")
    assert Kind.UNKNOWN_AUTOCLEAR in {edit.kind for edit in proposal.plan.edits}
    taken_back = Overlay(repaired, proposal.plan.inverse())
    assert read_bytes(taken_back, 0, taken_back.size) == bytes(image.data)


def test_healthy_bitmaps_are_left_alone() -> None:
    image = with_bitmaps("one", "two")
    image.change_header(autoclear_features=1 << 63 | Autoclear.BITMAPS)
    proposal, _ = chosen(image, BITMAPS)
    assert proposal.plan.changes_nothing
    assert not proposal.needs_quote


# ---- snapshots ----


def test_entries_of_zeros_go_and_what_they_may_have_held_stays_counted() -> None:
    image = with_snapshot()
    image.change_header(nb_snapshots=3)
    before = image.refcounts()
    proposal, repaired = chosen(image, SNAPSHOTS)
    after = Image(bytearray(repaired.data))
    assert [each.name for each in after.snapshots] == [b"before"]
    assert after.refcounts() == before
    assert "2 of 3 entries" in proposal.notes[0]
    assert disks(repaired.data) == disks(bytes(image.data))


def test_a_table_that_is_said_to_lie_where_none_can_is_given_up_and_nothing_is_freed() -> None:
    image = with_snapshot()
    image.change_header(snapshots_offset=image.header.snapshots_offset + 512)
    before, held = image.refcounts(), check_image(image.source).counters.leaks
    proposal, repaired = chosen(image, SNAPSHOTS)
    after = Image(bytearray(repaired.data))
    assert (after.header.nb_snapshots, after.header.snapshots_offset) == (0, 0)
    assert after.refcounts() == before
    assert proposal.after.counters.leaks == held + proposal.kept


def test_refcounts_that_are_lost_stop_nobody_who_only_cuts_the_table() -> None:
    """What `all` refuses, since refcounts would show what an entry had."""
    image = with_snapshot()
    image.change_header(nb_snapshots=2)
    image.set_word(image.reftable_at(0), 0)
    with pytest.raises(UnsupportedRepair):
        propose(image.source, check_image(image.source), RepairTier.ALL)
    proposal, repaired = chosen(image, SNAPSHOTS)
    assert read_header(repaired).nb_snapshots == 1
    assert proposal.complete


def test_a_snapshot_that_the_header_leaves_out_comes_back_if_all_of_it_is_counted() -> None:
    image = with_snapshot()
    entry = encode_snapshot(image.snapshots[0])
    image.change_header(nb_snapshots=0)
    proposal, repaired = chosen(image, SNAPSHOTS)
    assert Image(bytearray(repaired.data)).snapshots[0].name == b"before"
    assert proposal.after.verdict == "clean"
    at = image.header.snapshots_offset
    image.data[at : at + len(entry)] = b"\xff" * len(entry)
    assert chosen(image, SNAPSHOTS)[0].plan.changes_nothing


def test_the_tiers_that_are_told_of_are_those_that_may_have_something_to_do() -> None:
    image = plain()
    assert tiers_for(check_image(image.source)) == ()
    image.set_refcount(image.refcounts().index(0), 1)
    assert tiers_for(check_image(image.source)) == (RepairTier.LEAKS, RepairTier.ALL)
    data_on_data(image)
    assert SPLIT in tiers_for(check_image(image.source))
    assert split.MAX_COPIED >= 1 << 20
