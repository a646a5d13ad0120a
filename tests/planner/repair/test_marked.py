"""L2 entries that findings are about, part by part of their tables."""

import itertools

import pytest

from planner.check.check import check_image
from planner.findings.kinds import FindingKind
from planner.repair.draft import Draft
from planner.repair.marked import marked_tables
from planner.repair.plan import RepairTier
from planner.repair.scope import Scope
from planner.repair.tiers import propose
from tests.images.builder import Image, ImageBuilder
from tests.planner.sources import Sparse


def image_with(wrong: range, cluster_bits: int) -> Image:
    """Entries from 0 to that behind *wrong* that lead to one cluster; *wrong* are those with a
    reserved bit."""
    builder = ImageBuilder(cluster_bits=cluster_bits, size=1 << 34)
    builder.write(0, b"content")
    image = builder.build()
    word = image.host_offset(0)
    for number in range(wrong.stop + 1):
        image.set_word(image.l2_at(number), word | 2 * (number in wrong))
    return image


def test_a_single_entry_of_a_large_table_takes_no_more_than_the_part_that_it_is_in() -> None:
    image = image_with(range(3, 4), cluster_bits=21)
    source = Sparse.of(bytes(image.data), len(image.data), block=4096)
    scope = Scope(Draft(source), source, check_image(source))
    source.bytes_read = 0
    found = list(marked_tables(scope, FindingKind.L2_ENTRY_RESERVED))
    assert [each.host_offsets().tolist() for each in found] == [[image.l2_at(3)]]
    assert source.bytes_read == 4096


@pytest.mark.parametrize("cluster_bits", [12, 16])
def test_a_run_of_entries_is_one_edit_in_however_many_parts_it_is(cluster_bits: int) -> None:
    builder = ImageBuilder(cluster_bits=cluster_bits, size=1 << 30, data_file=b"data")
    width = builder.geometry.l2_entries
    builder.write(0, b"content")
    builder.write(width, b"content")
    image = builder.build()
    wrong = [range(5, width - 7), range(width - 1, width + 9)]
    for number in itertools.chain(*wrong):
        image.set_word(image.l2_at(number), number + 1 << cluster_bits)
    found = propose(image.source, check_image(image.source), RepairTier.ALL)
    edits = [(edit.offset, edit.count) for edit in found.plan.edits]
    runs = [wrong[0], wrong[1][:1], wrong[1][1:]]
    assert edits == [(image.l2_at(run.start), len(run)) for run in runs]
