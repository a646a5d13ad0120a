"""The refcount walk counts as one that takes entry by entry does, whichever way it goes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.check.check import check_image
from planner.findings.kinds import FindingKind
from planner.metadata.work_limits import LIMITS, Limits
from planner.qcow2 import entries
from tests.images.builder import Image
from tests.images.table_damage import IMAGES, damage_to_tables, l2_tables
from tests.planner.answers import answers
from tests.planner.check.naive import check_naively


@pytest.mark.parametrize("name", IMAGES)
@given(data=st.data())
def test_runs_and_single_entries_count_alike(name, data):
    source = data.draw(damage_to_tables(IMAGES[name])).applied(IMAGES[name])
    assert answers(check_image(source)) == answers(check_naively(source))


@pytest.mark.parametrize("name", ["rich", "filled", "versioned"])
@given(data=st.data(), shared=st.sampled_from([1, 8]))
def test_versions_and_single_tables_count_alike(name, data, shared):
    source = data.draw(damage_to_tables(IMAGES[name])).applied(IMAGES[name])
    limits = Limits(version_entries=1, version_share=shared)
    found = answers(check_image(source, limits=limits))
    assert found == answers(check_naively(source))


@pytest.mark.parametrize("least", [1, LIMITS.version_entries])
def test_a_cluster_behind_the_end_has_no_owners(least):
    """Whether tables are versions of each other or not: no two of them share what is not there."""
    image = Image(bytearray(IMAGES["versioned"].data))
    for number, table in enumerate(l2_tables(image)[:3]):
        image.set_word(table + number * 8, len(image.data))
    report = check_image(image.source, limits=Limits(version_entries=least))
    assert report.counts()[FindingKind.PAST_END] >= 3
    assert FindingKind.MULTIPLE_OWNERS not in report.counts()


@pytest.mark.parametrize("least", [1, LIMITS.version_entries])
def test_data_that_reaches_into_the_next_cluster_shares_it(least):
    """Also where the table has versions: the owner of the next cluster is not alone there."""
    image = Image(bytearray(IMAGES["filled"].data))
    size, next_one = image.cluster_size, image.host_offset(9)
    image.set_word(image.l2_at(5), next_one - size + 512 | entries.COPIED)
    for cluster in (next_one // size - 1, next_one // size):  # so that nothing else shows it
        image.set_refcount(cluster, image.refcounts()[cluster] + 1)
    report = check_image(image.source, limits=Limits(version_entries=least))
    shared = report.findings.of(FindingKind.MULTIPLE_OWNERS).host_offset.tolist()
    assert next_one in shared
