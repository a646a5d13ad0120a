"""Each rule by itself; and a table shown entry by entry says of each what a check says of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np
import pytest

from planner.check.check import check_image
from planner.check.entry_rules import L1_RULES, L2_RULES, expected, judge_l1, judge_l2
from planner.check.report import Report
from planner.errors import ImageError
from planner.findings.kinds import ACTIVE, FindingKind, Structure
from planner.metadata.refcounts import Reftable, StoredRefcounts
from planner.qcow2.layout import Layout
from planner.source import Bytes, Source
from planner.views.host_map import kinds_in
from planner.views.table_view import read_l1_page, read_l2_page
from tests.images.builder import ImageBuilder
from tests.images.corpus import RULES
from tests.images.corpus.rule import SIZE, plain

OF_L1 = {
    FindingKind.L1_ENTRY_RESERVED,
    FindingKind.L2_TABLE_MISALIGNED,
    FindingKind.L1_COPIED,
}
OF_L2 = {
    FindingKind.L2_ENTRY_RESERVED,
    FindingKind.UNALLOCATED_SUBCLUSTERS,
    FindingKind.ZERO_IN_VERSION_2,
    FindingKind.COMPRESSED_COPIED,
    FindingKind.COMPRESSED_WITH_DATA_FILE,
    FindingKind.COMPRESSED_SUBCLUSTERS,
    FindingKind.SUBCLUSTER_CONFLICT,
    FindingKind.DATA_MISALIGNED,
    FindingKind.ZERO_MISALIGNED,
    FindingKind.L2_COPIED,
}
Judged = set[tuple[int, FindingKind]]


class Shape(TypedDict, total=False):
    """What `in_an_image` takes."""

    extended: bool
    external: bool
    version: int


SIZES = {False: SIZE, True: 4 * SIZE}
"""Of clusters, without and with extended L2 entries."""


def in_an_image(
    *, extended: bool = False, external: bool = False, version: int = 3
) -> tuple[Layout, StoredRefcounts]:
    """Of 32 clusters and a half: the header's refcount is 1, that of cluster 4 is 2, others are 0.

    The refcount block of the clusters from 16 times that of a block on is misaligned.
    """
    size = SIZES[extended]
    made = ImageBuilder(
        cluster_bits=size.bit_length() - 1,
        size=1 << 26,
        version=version,
        extended_l2=extended,
        data_file=b"data.raw" if external else None,
    )
    image = made.build()
    image.data += bytes(32 * size + size // 2 - len(image.data))
    for cluster in range(32):
        image.set_refcount(cluster, {0: 1, 4: 2}.get(cluster, 0))
    layout = Layout.read(image.source)
    image.set_word(layout.header.refcount_table_offset + 16 * 8, 512)
    return layout, StoredRefcounts(image.source, layout, Reftable(image.source, layout))


COPIED, PACKED, ZERO = 1 << 63, 1 << 62, 1
ALLOCATED, READS_ZERO = 1 << 5, 1 << 37
"""Of subcluster 5."""


@dataclass(frozen=True)
class Case:
    """A word that breaks a rule, and one that is as near to it as can be and does not."""

    kind: FindingKind
    wrong: int
    right: int
    bitmaps: tuple[int, int] = (0, 0)
    image: Shape = field(default_factory=Shape)


L1_CASES = [
    Case(FindingKind.L1_ENTRY_RESERVED, 2 * SIZE | 1 << 8, 2 * SIZE),
    Case(FindingKind.L1_ENTRY_RESERVED, 1 << 56, 1 << 63),
    Case(FindingKind.L2_TABLE_MISALIGNED, 2 * SIZE + 512, 2 * SIZE),
    Case(FindingKind.PAST_END, 33 * SIZE, 32 * SIZE),
    Case(FindingKind.L1_COPIED, COPIED | 4 * SIZE, 4 * SIZE),
    Case(FindingKind.L1_COPIED, COPIED | 5 * SIZE, 1 << 56),  # cluster 0 has one reference
]
EXTENDED: Shape = {"extended": True}
X_SIZE = SIZES[True]
L2_CASES = [
    Case(FindingKind.L2_ENTRY_RESERVED, 2 * SIZE | 1 << 61, PACKED | 1 << 61),
    Case(FindingKind.L2_ENTRY_RESERVED, 2, 0),
    Case(FindingKind.ZERO_IN_VERSION_2, ZERO, 0, image={"version": 2}),
    Case(FindingKind.ZERO_IN_VERSION_2, 2 * SIZE | ZERO, PACKED | ZERO, image={"version": 2}),
    Case(
        FindingKind.UNALLOCATED_SUBCLUSTERS, 0, 0, bitmaps=(ALLOCATED, READS_ZERO), image=EXTENDED
    ),
    Case(FindingKind.UNALLOCATED_SUBCLUSTERS, 0, X_SIZE, bitmaps=(ALLOCATED,) * 2, image=EXTENDED),
    Case(FindingKind.COMPRESSED_COPIED, COPIED | PACKED | SIZE, PACKED | SIZE),
    Case(FindingKind.COMPRESSED_WITH_DATA_FILE, PACKED | SIZE, SIZE, image={"external": True}),
    Case(
        FindingKind.COMPRESSED_SUBCLUSTERS, PACKED, PACKED, bitmaps=(READS_ZERO, 0), image=EXTENDED
    ),
    Case(
        FindingKind.SUBCLUSTER_CONFLICT,
        X_SIZE,
        X_SIZE,
        bitmaps=(ALLOCATED | READS_ZERO, ALLOCATED | READS_ZERO << 1),
        image=EXTENDED,
    ),
    Case(FindingKind.DATA_MISALIGNED, 2 * SIZE + 512, 2 * SIZE),
    Case(FindingKind.DATA_MISALIGNED, 2 * SIZE + 512, 2 * SIZE + 512 | ZERO),
    Case(FindingKind.DATA_MISALIGNED, 512, 512, bitmaps=(ALLOCATED, READS_ZERO), image=EXTENDED),
    Case(FindingKind.ZERO_MISALIGNED, 2 * SIZE + 512 | ZERO, 2 * SIZE | ZERO),
    Case(FindingKind.ZERO_MISALIGNED, 512, 512, bitmaps=(0, ALLOCATED), image=EXTENDED),
    Case(FindingKind.PAST_END, 33 * SIZE, 32 * SIZE),
    Case(FindingKind.PAST_END, PACKED | 34 * SIZE, PACKED | 33 * SIZE),
    Case(FindingKind.L2_COPIED, COPIED | 4 * SIZE, 4 * SIZE),
    Case(FindingKind.L2_COPIED, COPIED | 5 * SIZE, COPIED),
    Case(FindingKind.L2_COPIED, SIZE, COPIED | SIZE, image={"external": True}),
]


def kinds_of_l2(word: int, bitmap: int, options: Shape) -> list[FindingKind]:
    layout, stored = in_an_image(**options)
    bitmaps = as_words(bitmap) if layout.geometry.extended_l2 else None
    return kinds_in(int(judge_l2(as_words(word), bitmaps, layout, stored)[0]))


def as_words(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


def told(case: Case) -> str:
    return f"{case.kind.label}-{case.wrong:#x}-{case.right:#x}"


@pytest.mark.parametrize("case", L1_CASES, ids=told)
def test_rule_of_l1_entries(case: Case) -> None:
    found = judge_l1(as_words(case.wrong, case.right), *in_an_image()).tolist()
    assert case.kind in kinds_in(found[0])
    assert case.kind not in kinds_in(found[1])


@pytest.mark.parametrize("case", L2_CASES, ids=told)
def test_rule_of_l2_entries(case: Case) -> None:
    assert case.kind in kinds_of_l2(case.wrong, case.bitmaps[0], case.image)
    assert case.kind not in kinds_of_l2(case.right, case.bitmaps[1], case.image)


def test_every_rule_has_a_word_that_breaks_it() -> None:
    assert {rule.kind for rule in L1_RULES} == {case.kind for case in L1_CASES}
    assert {rule.kind for rule in L2_RULES} == {case.kind for case in L2_CASES}


def test_a_flag_whose_refcount_cannot_be_looked_up_is_not_wrong() -> None:
    layout, stored = in_an_image()
    lost = 16 * layout.geometry.refblock_entries * SIZE
    words = as_words(COPIED | lost, lost)
    kinds = {FindingKind.L1_COPIED, FindingKind.L2_COPIED}
    judged_words = (*judge_l1(words, layout, stored), *judge_l2(words, None, layout, stored))
    for bits in judged_words:
        assert not kinds & set(kinds_in(int(bits)))


def test_nothing_of_a_data_file_is_past_the_end_of_the_image() -> None:
    for word in (1 << 50, PACKED | 1 << 50):
        assert FindingKind.PAST_END not in kinds_of_l2(word, 0, {"external": True})


@pytest.mark.parametrize(
    ("kind", "found", "wanted"),
    [
        (FindingKind.L1_ENTRY_RESERVED, COPIED | SIZE | 1 << 57 | 2, COPIED | SIZE),
        (FindingKind.L2_ENTRY_RESERVED, COPIED | SIZE | 1 << 57 | 3, COPIED | SIZE | 1),
        (FindingKind.COMPRESSED_COPIED, COPIED | PACKED | 3 * SIZE, PACKED | 3 * SIZE),
        (FindingKind.DATA_MISALIGNED, SIZE + 512, 0),
    ],
)
def test_expected_is_the_word_without_what_is_wrong(kind, found, wanted) -> None:
    assert expected(kind, as_words(found)).tolist() == [wanted]


def test_the_other_flag_is_expected() -> None:
    for kind in (FindingKind.L1_COPIED, FindingKind.L2_COPIED):
        assert expected(kind, np.array([True, False])).tolist() == [False, True]


def judged(source: Source) -> Judged:
    """(host offset of a word, kind) of all that the pages of the active tables say."""
    l1 = read_l1_page(source)
    layout = l1.layout
    found: Judged = set()
    for index, bits in zip(l1.index.tolist(), l1.findings.tolist(), strict=True):
        at = layout.header.l1_table_offset + 8 * index
        found |= {(at, kind) for kind in kinds_in(bits) if kind in OF_L1}
        if FindingKind.PAST_END in kinds_in(bits):
            found.add((int(l1.offset[l1.index == index][0]), FindingKind.PAST_END))
        page = read_l2_page(source, index)
        assert page.l1_findings == bits & ~(1 << FindingKind.MULTIPLE_OWNERS)
        for position, entry in enumerate(page.findings.tolist()):
            at = page.offset + position * layout.geometry.l2_entry_size
            found |= {(at, kind) for kind in kinds_in(entry)}
    return found


def checked(report: Report) -> Judged:
    found: Judged = set()
    for finding in report.rows(*OF_L1, *OF_L2, FindingKind.PAST_END):
        step = report.geometry.l2_entry_size
        guest = finding.structure in (Structure.DATA, Structure.COMPRESSED)
        if finding.snapshot != ACTIVE:
            continue
        if finding.kind is FindingKind.PAST_END and not guest:
            if finding.structure is Structure.L2_TABLE:
                found.add((finding.host_offset, finding.kind))
            continue
        count = finding.length // step if finding.kind in OF_L2 else 1
        found |= {(finding.host_offset + at * step, finding.kind) for at in range(count)}
    return found


@pytest.mark.parametrize("name", RULES)
def test_words_are_judged_as_a_check_judges_them(name: str) -> None:
    source = RULES[name]().image.source
    report = check_image(source)
    if report.error is not None:
        with pytest.raises(ImageError):
            read_l1_page(source)
        return
    assert judged(source) == checked(report)


def test_two_l1_entries_with_one_table_are_marked() -> None:
    image = plain()
    image.set_word(image.l1_at(1), image.word(image.l1_at(0)))
    marks = [kinds_in(bits) for bits in read_l1_page(image.source).findings.tolist()]
    assert marks == [[FindingKind.MULTIPLE_OWNERS]] * 2


def test_without_an_l2_table_all_entries_are_zero() -> None:
    image = plain()
    image.set_word(image.l1_at(1), 0)
    for index in (1, 77):
        page = read_l2_page(image.source, index)
        assert page.offset == 0
        assert not page.words.any()
        assert not page.findings.any()


def test_an_l2_table_past_the_end_is_zeros_and_says_so() -> None:
    image = plain()
    image.set_word(image.l1_at(1), len(image.data) + 9 * SIZE)
    page = read_l2_page(image.source, 1)
    assert not page.words.any()
    assert kinds_in(page.l1_findings) == [FindingKind.PAST_END]


def test_a_header_that_makes_no_sense_is_an_error() -> None:
    with pytest.raises(ImageError):
        read_l2_page(Bytes(b"QFI\xfb" + bytes(200)), 0)
