"""A check of refcounts and flags alone says of them what a whole check says."""

import numpy as np
import pytest

from planner.check.check import check_image
from planner.check.refcounts_again import check_refcounts_again
from planner.check.report import Report
from planner.findings.kinds import FindingKind as Kind
from planner.repair.draft import Draft
from planner.repair.flags import foresee_flags
from planner.repair.overlay import Layered
from planner.repair.refcounts import correct_refcounts_in_refblocks, must_rebuild
from planner.repair.scope import Scope
from tests.images.builder import Image
from tests.images.corpus import RULES
from tests.images.corpus.rule import COPIED, extended, fill, plain, with_snapshot

NONE = np.zeros(0, dtype=np.int64)


def corrected(image: Image) -> tuple[Layered, Report] | None:
    """The image with refcounts corrected in their blocks, and its check before that."""
    source = image.source
    report = check_image(source)
    if report.error is not None:
        return None
    scope = Scope(Draft(source), source, report)
    if must_rebuild(scope, NONE):
        return None
    correct_refcounts_in_refblocks(scope, NONE, NONE)
    foresee_flags(scope, report, frozenset(Kind))
    return scope.draft.overlay(), report


def same(image: Image) -> bool:
    """Whether it is known what there is, which then must be what a whole check finds."""
    made = corrected(image)
    if made is None:
        return False
    source, report = made
    found, whole = check_refcounts_again(source, report), check_image(source)
    if found is None:
        return False
    assert found.totals == whole.totals
    assert found.mismatches is not None
    assert whole.mismatches is not None
    assert np.array_equal(found.mismatches.stored[:], whole.mismatches.stored[:])
    assert list(found.rows(Kind.L1_COPIED)) == list(whole.rows(Kind.L1_COPIED))
    assert found.entries is not None
    assert whole.entries is not None
    assert found.entries.groups() == whole.entries.groups()
    assert list(found.rows(Kind.L2_COPIED)) == list(whole.rows(Kind.L2_COPIED))
    about_header = {Kind.CORRUPT_BIT, Kind.DIRTY_BIT, Kind.LEAK_PAST_END}
    counts = [
        {kind: number for kind, number in each.counts().items() if kind not in about_header}
        for each in (found, whole)
    ]
    assert counts[0] == counts[1]
    return True


@pytest.mark.parametrize("name", RULES)
def test_refcounts_and_flags_are_those_of_a_whole_check(name: str) -> None:
    same(RULES[name]().image)


def with_subclusters() -> Image:
    return fill(extended()).build()


def damaged(image: Image) -> Image:
    """With refcounts that are too high and too low, and flags that will be wrong, and right."""
    for cluster in (1, 2, 5):
        image.set_refcount(image.host_offset(cluster) // image.cluster_size, cluster % 3)
    image.set_word(image.l2_at(4), image.host_offset(1) | COPIED)
    image.set_word(image.l1_at(0), image.word(image.l1_at(0)) & ~COPIED)
    return image


@pytest.mark.parametrize("make", [plain, with_subclusters, with_snapshot])
def test_flags_that_follow_refcounts_are_found(make) -> None:
    image = damaged(make())
    assert same(image)
    made = corrected(image)
    assert made is not None
    found = check_refcounts_again(*made)
    assert found is not None
    assert found.counts()[Kind.L2_COPIED] > 0


def test_what_is_not_enough_to_go_by_is_left_to_a_whole_check() -> None:
    gone = RULES["l1_two_entries_on_one_table"]().image
    source, report = gone.source, check_image(plain().source)
    assert report.entries is not None
    assert len(report.entries.tables) != len(check_image(source).entries.tables)  # type: ignore[union-attr]
    assert check_refcounts_again(source, report) is None
