"""A table shown entry by entry says of each what a check says of it."""

from __future__ import annotations

import pytest

from planner.check.check import check_image
from planner.check.report import Report
from planner.errors import ImageError
from planner.findings.kinds import ACTIVE, FindingKind, Structure
from planner.source import Bytes, Source
from planner.views.host_map import kinds_in
from planner.views.table_view import read_l1_page, read_l2_page
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
