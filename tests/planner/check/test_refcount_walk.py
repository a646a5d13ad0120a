"""The refcount walk counts as one that takes entry by entry does, whichever way it goes."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.check.check import check_image
from planner.check.compressed import find_packed
from planner.check.refcounts_again import check_refcounts_again
from planner.findings.kinds import FindingKind
from planner.metadata import mapping_tables
from planner.metadata.work_limits import LIMITS, Limits
from planner.progress import Meter
from planner.qcow2 import entries
from planner.source import Bytes, read_bytes
from tests.images.builder import Image, ImageBuilder
from tests.images.table_damage import IMAGES, damage_to_tables, l2_tables
from tests.planner.answers import answers
from tests.planner.check.naive import check_naively
from tests.planner.sources import Sparse


@pytest.mark.parametrize("name", IMAGES)
@given(data=st.data())
def test_runs_and_single_entries_count_alike(name, data):
    source = data.draw(damage_to_tables(IMAGES[name])).applied(IMAGES[name])
    assert answers(check_image(source)) == answers(check_naively(source))


@pytest.mark.parametrize("name", IMAGES)
@given(data=st.data())
def test_parts_and_whole_tables_count_alike(name, data):
    source = data.draw(damage_to_tables(IMAGES[name])).applied(IMAGES[name])
    content = read_bytes(source, 0, source.size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapping_tables, "LARGE_TABLE", 0)
        patch.setattr(mapping_tables, "HOLE", 512)
        found = answers(check_image(Sparse.of(content, len(content))))
    assert found == answers(check_naively(source))


@pytest.mark.parametrize("dense_clusters", [0, LIMITS.dense_clusters])
def test_of_large_tables_of_snapshots_no_more_is_read_than_is_there(dense_clusters):
    builder = ImageBuilder(cluster_bits=21, size=1 << 40)
    for version in range(3):
        builder.write(0, b"a")
        builder.write(700, b"shared")
        builder.take_snapshot(str(version))
    image = builder.build()
    tables = [image.l2_at(0), *(image.l2_at(0, snapshot) for snapshot in range(3))]
    for table in tables:  # so that none is a plain one
        image.set_word(table + 8 * 600, entries.COMPRESSED | 1 << 48)
    source = Sparse.of(bytes(image.data), len(image.data), 4096)
    limits = replace(LIMITS, dense_clusters=dense_clusters)
    report = check_image(source, limits=limits)
    read, source.bytes_read = source.bytes_read, 0
    assert check_refcounts_again(source, report) is not None or not dense_clusters
    # The header's cluster, and the refcount block: twice, for what is counted past the end.
    assert read < 3.2 * image.cluster_size
    assert source.bytes_read < 2.2 * image.cluster_size
    whole = check_image(Bytes(bytes(image.data)), limits=limits)
    assert answers(report) == answers(whole)


def test_of_large_tables_no_more_is_read_than_is_there():
    tables = 10
    builder = ImageBuilder(cluster_bits=21, size=tables << 39)
    for number in range(tables):
        builder.write(number << 18, b"a")
    image = builder.build()
    for number in range(tables):  # so that each is looked at again
        image.set_word(image.l2_at(number << 18) + 8, entries.COMPRESSED | 1 << 48)
    source = Sparse.of(bytes(image.data), len(image.data), 4096)
    report = check_image(source)
    assert report.counts()[FindingKind.PAST_END] == tables
    assert source.bytes_read < tables << 20  # half of the tables, and refcounts are among it
    before = source.bytes_read
    assert len(find_packed(source, report, Meter())) == 1
    assert source.bytes_read - before == tables * 4096


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
