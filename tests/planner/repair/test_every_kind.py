"""Every kind of damage under every tier: mended and proven, or named as left, or refused.

The images are the corpus of the check's rules, one for each; what a plan may never do is asserted
for all of them.
"""

import functools

import numpy as np
import pytest

from planner.check.check import check_image
from planner.check.report import Report
from planner.errors import RepairError
from planner.findings.kinds import KINDS, FindingKind, Severity
from planner.repair.overlay import Overlay
from planner.repair.plan import DETERMINED, RepairTier
from planner.repair.tiers import Proposal, propose, same_outcome
from planner.source import SECTOR, Bytes, read_bytes
from tests.images.corpus import RULES

REFUSED = {
    ("l1_table_cut_by_the_end", RepairTier.LEAKS),
    ("l1_misaligned", RepairTier.LEAKS),
    ("l1_past_end", RepairTier.LEAKS),
    ("full_table_that_runs_past_the_end", RepairTier.LEAKS),
    ("l1_table_past_end", RepairTier.LEAKS),
    ("luks_header_past_end", RepairTier.LEAKS),
    ("luks_header_longer_than_its_pointer_says", RepairTier.LEAKS),
    ("bitmap_entry_invalid", RepairTier.LEAKS),
    ("bitmap_table_past_end", RepairTier.LEAKS),
    ("bitmap_directory_entry_past_its_end", RepairTier.LEAKS),
    ("bitmap_directory_entry_with_extra_data", RepairTier.LEAKS),
    ("bitmap_directory_granularity", RepairTier.LEAKS),
    ("bitmap_directory_reserved_flags", RepairTier.LEAKS),
    ("bitmap_directory_type", RepairTier.LEAKS),
    ("bitmap_directory_table_size", RepairTier.LEAKS),
    ("bitmap_directory_table_nowhere", RepairTier.LEAKS),
    ("bitmap_directory_count", RepairTier.LEAKS),
    ("reftable_entry_reserved", RepairTier.LEAKS),
    ("second_refblock_misaligned", RepairTier.LEAKS),
    ("refblock_shared_with_data", RepairTier.LEAKS),
    ("snapshot_table_misaligned", RepairTier.LEAKS),
    ("snapshot_entry_is_garbage", RepairTier.LEAKS),
    ("snapshot_l1_misaligned", RepairTier.LEAKS),
    ("snapshot_l1_too_large", RepairTier.LEAKS),
    ("snapshot_l1_past_end", RepairTier.LEAKS),
    ("full_table_that_runs_past_the_end", RepairTier.SPLIT),
}
"""All others get a plan."""

CHOSEN = {
    RepairTier.SPLIT: (
        "l1_two_entries_on_one_table",
        "l2_data_misaligned",
        "two_entries_on_one_cluster",
        "two_entries_on_one_cluster_counted_right",
        "entry_on_its_own_l2_table",
        "compressed_range_over_two_clusters",
        "full_table_that_two_l1_entries_lead_to",
        "full_table_that_runs_past_the_end",
        "refblock_shared_with_data",
        "refblock_listed_twice",
        "overflow_of_one_bit",
        "snapshot_and_active_disk_contest_a_cluster",
        "snapshot_l1_on_the_active_l1_table",
    ),
    RepairTier.BITMAPS: (
        "bitmap_entry_invalid",
        "bitmap_data_past_end",
        "bitmap_table_past_end",
        "bitmap_directory_entry_past_its_end",
        "bitmap_directory_entry_with_extra_data",
        "bitmap_directory_granularity",
        "bitmap_directory_reserved_flags",
        "bitmap_directory_type",
        "bitmap_directory_table_size",
        "bitmap_directory_table_nowhere",
        "bitmap_directory_count",
        "bitmaps_stale",
    ),
    RepairTier.SNAPSHOTS: (
        "snapshot_table_too_long",
        "snapshot_table_misaligned",
        "snapshot_extra_data_too_long",
        "snapshot_entry_is_garbage",
        "snapshot_lost",
        "snapshots_of_nothing_past_end",
    ),
}
"""What a person may choose: the images in which it changes anything."""

CASES = [(name, tier) for name in RULES for tier in DETERMINED]
CASES += [(name, tier) for tier, names in CHOSEN.items() for name in names]
PLANNED = [case for case in CASES if case not in REFUSED]


def planned(name: str, tier: RepairTier) -> tuple[Bytes, Report, Proposal]:
    source, report, answer = proposed(name, tier)
    assert isinstance(answer, Proposal)
    return source, report, answer


@functools.cache
def proposed(name: str, tier: RepairTier) -> tuple[Bytes, Report, Proposal | RepairError]:
    source = Bytes(bytes(RULES[name]().image.data))
    report = check_image(source)
    try:
        return source, report, propose(source, report, tier)
    except RepairError as error:
        return source, report, error


def applied(source: Bytes, proposal: Proposal) -> Bytes:
    """The file as it is when the plan has been written."""
    return Bytes(read_bytes(Overlay(source, proposal.plan), 0, proposal.plan.size_after))


@pytest.mark.parametrize(("name", "tier"), sorted(REFUSED))
def test_what_is_refused_is_said_why(name, tier) -> None:
    _, _, answer = proposed(name, tier)
    assert isinstance(answer, RepairError)
    assert answer.reason
    assert answer.kind


@pytest.mark.parametrize(("name", "tier"), PLANNED)
def test_what_is_found_is_mended_or_named(name, tier) -> None:
    source, report, answer = planned(name, tier)
    after = check_image(applied(source, answer))
    assert same_outcome(after, answer.after)
    assert answer.found == answer.planned + answer.left_count
    named = {left.kind: left.count for left in answer.left}
    assert all(left.reason for left in answer.left)
    for left in answer.left:
        mends = KINDS[left.kind].tier
        if mends not in {None, tier} and tier is not RepairTier.ALL:
            assert left.reason == f"the tier `{tier}` leaves it; `{mends}` looks at this"
    for kind, number in after.counts().items():
        if KINDS[kind].tier or KINDS[kind].severity > Severity.NOTICE:
            assert named[kind] == number
    for name_of_counter in ("check_errors", "corruptions", "leaks"):
        was = getattr(report.counters, name_of_counter)
        was += answer.kept if name_of_counter == "leaks" else 0
        assert getattr(after.counters, name_of_counter) <= was


@pytest.mark.parametrize(("name", "tier"), PLANNED)
def test_a_second_repair_changes_nothing(name, tier) -> None:
    source, _, answer = planned(name, tier)
    repaired = applied(source, answer)
    again = propose(repaired, check_image(repaired), tier)
    assert again.plan.changes_nothing


@pytest.mark.parametrize(("name", "tier"), PLANNED)
def test_the_inverse_restores_every_byte(name, tier) -> None:
    source, _, answer = planned(name, tier)
    inverse = answer.plan.inverse()
    back = Overlay(applied(source, answer), inverse)
    assert back.size == source.size
    assert read_bytes(back, 0, back.size) == source.data
    assert inverse.inverse() == answer.plan


@pytest.mark.parametrize(("name", "tier"), PLANNED)
def test_patches_change_every_byte_that_they_touch_and_nothing_twice(name, tier) -> None:
    _, report, answer = planned(name, tier)
    found = report.findings.of(FindingKind.MULTIPLE_OWNERS).host_offset
    left = answer.after.findings.of(FindingKind.MULTIPLE_OWNERS).host_offset
    contested = found[np.isin(found, left)]
    alike = report.owners.of_tables_alike() << report.geometry.cluster_bits
    contested = contested[~np.isin(contested, alike)]
    bits = report.geometry.cluster_bits
    for stage in answer.plan.stages:
        assert (np.diff(stage.sectors) > 0).all()
        end = 0
        for patch in stage.patches():
            assert patch.offset >= end
            end = patch.offset + len(patch.after)
            assert all(b != a for b, a in zip(patch.before, patch.after, strict=True))
        touched = stage.sectors * SECTOR >> bits
        assert not np.isin(touched, contested >> bits).any()


@pytest.mark.parametrize(("name", "tier"), [case for case in PLANNED if case[1] in CHOSEN])
def test_what_is_chosen_is_done_whole_and_never_without_its_id(name, tier) -> None:
    _, _, answer = planned(name, tier)
    assert answer.complete
    assert not answer.plan.changes_nothing
    assert answer.needs_quote
    assert answer.warnings == list(answer.notes) != []
    # Nothing else but what follows from it is better, or worse.
    assert answer.kept == 0 or tier is RepairTier.SNAPSHOTS


def test_what_is_chosen_changes_nothing_where_there_is_nothing_of_the_sort() -> None:
    for name in list(RULES)[::5]:
        for tier, names in CHOSEN.items():
            _, _, answer = proposed(name, tier)
            if isinstance(answer, Proposal) and name not in names:
                assert answer.plan.changes_nothing, (name, tier)
                assert not answer.needs_quote


@pytest.mark.parametrize("name", [name for name, tier in PLANNED if tier is RepairTier.LEAKS])
def test_leaks_never_touches_the_header_or_raises_a_refcount(name) -> None:
    source, report, answer = planned(name, RepairTier.LEAKS)
    assert answer.plan.size_after == source.size
    for stage in answer.plan.stages:
        assert stage.sectors[0] > 0
    others = report.counts().keys() - {FindingKind.L1_COPIED, FindingKind.L2_COPIED}
    if not report.counters.leaks and any(KINDS[kind].tier for kind in others):
        assert answer.plan.changes_nothing


def test_every_kind_that_a_tier_mends_is_mended_somewhere() -> None:
    mended = set()
    for name, tier in CASES:
        _, report, answer = proposed(name, tier)
        if isinstance(answer, Proposal):
            after = answer.after.counts()
            counts = report.counts().items()
            mended |= {(kind, tier) for kind, number in counts if after.get(kind, 0) < number}
    promises = [(kind, info.tier or info.choice) for kind, info in KINDS.items()]
    assert {(kind, RepairTier(tier)) for kind, tier in promises if tier} <= mended


def test_kinds_without_a_tier_stay_and_are_named() -> None:
    # A refcount block that is listed twice has itself as its other owner: a rebuild loses nothing.
    # A refcount table past the end of the file is made anew; of a snapshot table that QEMU does not
    # load, what is whole is kept. Who owns what a table at two places maps is only looked up where
    # its refcounts are wrong. What leads to a refcount block keeps it, by the plan's id.
    mended = {
        "refblock_shared_with_data",
        "l1_two_entries_on_one_table",
        "full_table_that_two_l1_entries_lead_to",
        "reftable_past_end",
        "snapshots_of_nothing_past_end",
        "snapshot_extra_data_too_long",
        "snapshot_table_too_long",
        "snapshot_entry_is_garbage",
    }
    for name in RULES.keys() - mended - {"refblock_listed_twice"}:
        _, report, answer = proposed(name, RepairTier.ALL)
        if isinstance(answer, Proposal):
            for kind, number in report.counts().items():
                if not KINDS[kind].tier:
                    assert answer.after.counts()[kind] == number, (name, kind)
