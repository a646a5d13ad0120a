"""Versions of a table: how they are cut into parts, and what makes their entries different ones."""

import numpy as np
import pytest

from planner.check import versions
from planner.check.check import check_image
from planner.metadata.mapping_tables import L2Tables
from planner.metadata.work_limits import Limits
from planner.qcow2 import entries
from tests.images.builder import Image
from tests.images.table_damage import IMAGES, l2_tables
from tests.planner.answers import answers
from tests.planner.check.naive import check_naively

VERSIONED = IMAGES["versioned"]
TABLES = l2_tables(VERSIONED)


def test_versions_of_tables_are_cut_into_parts_of_groups_that_count_alike():
    index = np.array([0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4, 4], dtype=np.int64)
    ones = np.ones(len(index), dtype=np.int64)
    tables = L2Tables(
        offset=np.arange(len(index)) << 16,
        weight=np.where(np.arange(len(index)) == 5, 7, ones),
        active=(np.arange(len(index)) == 8) * ones,
        copied=0 * ones,
        snapshot=np.zeros(len(index), dtype=np.int32),
        l1_index=index,
        sibling=ones != 0,
        l1_position=index,
    )
    parts, left = versions.cut(tables, np.arange(len(index)), target=4, limit=4)
    assert [part.tolist() for part in parts] == [
        [[3], [4]],
        [[0], [1], [2]],
        [[5], [6]],
        [[8], [7]],
    ]
    assert left.tolist() == [9, 10, 11, 12, 13]


@pytest.mark.parametrize("number", range(len(TABLES)))
def test_a_flag_that_versions_should_not_have_is_found_among_many_other_ones(number):
    """Where versions differ in most flags, these do not make their entries different ones."""
    image = Image(bytearray(VERSIONED.data))
    for at in (table + entry * 8 for table in TABLES[::2] for entry in range(64)):
        image.set_word(at, image.word(at) ^ entries.COPIED)
    image.set_word(TABLES[number] + 8, entries.COPIED | entries.COMPRESSED | 0x600)
    found = answers(check_image(image.source, limits=Limits(version_entries=1)))
    assert found == answers(check_naively(image.source))
