"""The check as a whole: what it asks of a source, what a file may claim, and how it is stopped."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.check import check as check_module
from planner.check import versions
from planner.check.check import check_image
from planner.check.refcount_walk import Walker
from planner.check.report import Report
from planner.errors import Cancelled
from planner.findings.grouped import FindingsBuilder
from planner.findings.kinds import Finding, FindingKind
from planner.metadata.locate import take_survey
from planner.metadata.mapping_tables import L2Tables
from planner.qcow2 import entries
from planner.qcow2.layout import Layout
from planner.source import Bytes, Source
from tests.images.builder import Image, ImageBuilder
from tests.images.corpus import RULES
from tests.images.corpus.rule import builder, fill, plain
from tests.planner.sources import Sparse

MIB = 1 << 20
EIB = 1 << 60


def answers(report: Report) -> list[object]:
    """All that a report says, for comparison, but for how it groups COPIED flags into findings."""
    stopped = [str(error) for error in report.stopped]
    rows = [single for row in report.rows() for single in singles(row, report)]
    return [report.counters, stopped, report.complete, *rows]


def singles(row: Finding, report: Report) -> list[Finding]:
    """A finding about many L2 entries as findings about one each."""
    if row.kind is not FindingKind.L2_COPIED:
        return [row]
    entry, cluster = report.geometry.l2_entry_size, report.geometry.cluster_size
    number = row.length // entry
    return [
        replace(
            row,
            count=row.count // number,
            host_offset=row.host_offset + at * entry,
            length=entry,
            l2_index=row.l2_index + at,
            guest_offset=row.guest_offset + at * cluster,
            guest_length=cluster,
        )
        for at in range(number)
    ]


class CarefulWalker(Walker):
    """Judges every entry one by one, never a run at once."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.fast = False


def check_carefully(source: Source) -> Report:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check_module, "Walker", CarefulWalker)
        return check_image(source)


def check_sparsely(source: Source) -> Report:
    """Check with counters for the clusters that matter only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check_module, "DENSE_CLUSTERS", 0)
        return check_image(source)


# Any image


def rich() -> Image:
    """Small clusters, so that damage hits metadata: two snapshots, compression, zeros, a bitmap."""
    made = ImageBuilder(cluster_bits=9, size=1 << 17, refcount_order=3)
    made.write(0, b"a" * 512 * 5)
    made.write(70, b"b" * 512 * 3)
    made.write_compressed(6, b"c")
    made.write_compressed(7, b"d")
    made.write_zeros(8)
    made.write_zeros(9, allocated=True)
    made.take_snapshot("one")
    made.write(1, b"e")
    made.take_snapshot("two")
    made.write(71, b"f")
    made.skip(2)
    made.add_bitmap("bits", {0, 1}, granularity_bits=16)
    return made.build()


RICH = rich()
ALL_BITS = (1 << 64) - 1
words = st.one_of(
    st.sampled_from([0, 1, 1 << 62, 1 << 63, ALL_BITS, 512, 1 << 61, 1 << 55, (1 << 63) - 512]),
    st.integers(0, RICH.host_clusters + 2).map(lambda cluster: cluster << 9 | 1 << 63),
    st.integers(0, RICH.host_clusters + 2).map(lambda cluster: cluster << 9),
    st.integers(0, ALL_BITS),
)
damages = st.lists(
    st.tuples(st.integers(0, len(RICH.data) // 8 - 1), words), min_size=1, max_size=4
)


def damaged(changes: list[tuple[int, int]], end: int | None = None) -> Bytes:
    image = Image(bytearray(RICH.data))
    for index, word in changes:
        image.set_word(index * 8, word)
    return Bytes(bytes(image.data[:end]))


@given(changes=damages, end=st.none() | st.integers(0, len(RICH.data)))
def test_any_damage_is_reported(changes, end) -> None:
    report = check_image(damaged(changes, end))
    rows = list(report.rows())
    assert all(isinstance(row, Finding) and row.count > 0 for row in rows)
    assert report.exit_code in (0, 1, 2, 3, 63)
    assert report.verdict


@given(changes=damages)
def test_runs_and_single_entries_count_alike(changes) -> None:
    source = damaged(changes)
    assert answers(check_image(source)) == answers(check_carefully(source))


def filled() -> Image:
    """Full L2 tables of adjacent clusters, one of them shared with a snapshot."""
    made = ImageBuilder(cluster_bits=12, size=1 << 22)
    made.write(0, b"f" * (1 << 22))
    made.take_snapshot("full")
    made.write(5, b"g")
    return made.build()


FILLED = filled()
near = st.integers(0, FILLED.host_clusters + 2).map(lambda cluster: cluster << 12 | 1 << 63)


@given(
    changes=st.lists(st.tuples(st.integers(0, 1023), near | words), min_size=1, max_size=3),
    refcounts=st.lists(
        st.tuples(st.integers(0, FILLED.host_clusters - 1), st.integers(0, 3)), max_size=2
    ),
)
def test_runs_and_single_entries_of_full_tables_count_alike(changes, refcounts) -> None:
    image = Image(bytearray(FILLED.data))
    for cluster, word in changes:
        image.set_word(FILLED_AT[cluster], word)
    for cluster, refcount in refcounts:
        image.set_refcount(cluster, refcount)
    assert answers(check_image(image.source)) == answers(check_carefully(image.source))


def versioned() -> Image:
    """Four versions of the same L2 tables, each with clusters that the one before has not."""
    made = ImageBuilder(cluster_bits=9, size=1 << 16)
    made.write(0, b"v" * (1 << 16))
    made.take_snapshot("one")
    made.write(3, b"w" * 1024)
    made.take_snapshot("two")
    made.write(3, b"x")
    made.write(100, b"x")
    made.take_snapshot("three")
    made.write(7, b"y")
    return made.build()


VERSIONED = versioned()
VERSIONED_TABLES = take_survey(
    VERSIONED.source, Layout.read(VERSIONED.source), FindingsBuilder()
).tables.offset.tolist()
nearby = st.integers(0, VERSIONED.host_clusters + 2).map(lambda cluster: cluster << 9)


@given(
    changes=st.lists(
        st.tuples(st.sampled_from(VERSIONED_TABLES), st.integers(0, 63), nearby | words),
        max_size=4,
    ),
    shared=st.sampled_from([1, 8]),
)
def test_versions_and_single_tables_count_alike(changes, shared) -> None:
    image = Image(bytearray(VERSIONED.data))
    for table, entry, word in changes:
        image.set_word(table + entry * 8, word)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(versions, "MIN_ENTRIES", 1)
        patch.setattr(versions, "SHARED", shared)
        found = answers(check_image(image.source))
    assert found == answers(check_carefully(image.source))


def test_versions_of_tables_are_cut_into_parts_of_groups_that_count_alike() -> None:
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


@pytest.mark.parametrize("number", range(len(VERSIONED_TABLES)))
def test_a_flag_that_versions_should_not_have_is_found_among_many_other_ones(number) -> None:
    """Where versions differ in most flags, these do not make their entries different ones."""
    image = Image(bytearray(VERSIONED.data))
    for at in (table + entry * 8 for table in VERSIONED_TABLES[::2] for entry in range(64)):
        image.set_word(at, image.word(at) ^ entries.COPIED)
    image.set_word(VERSIONED_TABLES[number] + 8, entries.COPIED | entries.COMPRESSED | 0x600)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(versions, "MIN_ENTRIES", 1)
        found = answers(check_image(image.source))
    assert found == answers(check_carefully(image.source))


FILLED_AT = [FILLED.l2_table(cluster // 512) + cluster % 512 * 8 for cluster in range(1024)]


@given(data=st.binary(max_size=400))
def test_any_bytes_are_reported(data) -> None:
    assert check_image(Bytes(data)).exit_code in (1, 63)


@given(data=st.binary(min_size=1, max_size=600))
def test_any_bytes_behind_a_sound_header_are_reported(data) -> None:
    image = plain()
    image.data[4096:] = data
    assert list(check_image(image.source).rows())


# What a file claims


HUGE = 64 * MIB
"""A hole this long behind an image makes the check count sparsely, if it may."""


@pytest.mark.parametrize("name", [name for name in RULES if name != "refblock_listed_twice"])
def test_sparse_counters_find_the_same(name) -> None:
    image = RULES[name]().image
    source = Sparse.of(bytes(image.data), len(image.data) + HUGE)
    assert answers(check_sparsely(source)) == answers(check_image(source))


def claiming(**fields: int) -> Image:
    image = plain()
    image.change_header(**fields)
    return image


CLAIMS: dict[str, dict[str, int]] = {
    "2^60 bytes of disk": {"size": EIB, "l1_size": 1 << 22},
    "longest tables": {"l1_size": 1 << 22, "refcount_table_clusters": 2048},
    "2^32 snapshots": {"nb_snapshots": 0xFFFF_FFFF, "snapshots_offset": 1 << 40},
    "snapshots far away": {"nb_snapshots": 200, "snapshots_offset": 1 << 40},
    "snapshots in place of clusters": {"nb_snapshots": 200, "snapshots_offset": 4096},
    "tables far away": {
        "l1_size": 1 << 22,
        "l1_table_offset": 1 << 62,
        "refcount_table_offset": 1 << 62,
        "refcount_table_clusters": 2048,
    },
}


def peak_of(source: Source) -> int:
    """The most memory that a check of *source* holds, in bytes."""
    tracemalloc.start()
    report = check_image(source)
    list(report.rows())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("length", [200, 4096, None], ids=["200 bytes", "one cluster", "whole"])
@pytest.mark.parametrize("fields", CLAIMS.values(), ids=CLAIMS)
def test_what_a_short_file_claims_costs_nothing(fields, length) -> None:
    data = bytes(claiming(**fields).data[:length])
    assert peak_of(Bytes(data)) < 64 * MIB


@pytest.mark.parametrize("size", [1 << 40, 1 << 50, (1 << 63) - (1 << 30), (1 << 63) - 1])
@pytest.mark.parametrize("fields", CLAIMS.values(), ids=CLAIMS)
def test_what_a_sparse_file_claims_costs_nothing(fields, size) -> None:
    source = Sparse.of(bytes(claiming(**fields).data), size)
    assert peak_of(source) < 64 * MIB
    assert source.bytes_read < 64 * MIB


def test_as_many_snapshots_as_can_be_claimed_cost_few_reads() -> None:
    source = Sparse.of(bytes(claiming(nb_snapshots=65536, snapshots_offset=1 << 40).data), EIB)
    assert check_image(source).counters.corruptions >= 65536
    assert source.bytes_read < 4 * MIB
    assert len(source.asked) < 12


def test_clusters_far_apart_are_counted_where_they_are() -> None:
    image = plain()
    far = (1 << 55) + 4096
    image.set_word(image.l2_at(1), far | 1 << 63)
    source = Sparse.of(bytes(image.data), 1 << 60)
    report = check_image(source)
    assert report.counters.corruptions == 2
    assert {row.kind.label: row.host_offset for row in report.rows()} == {
        "refcount-missing": far,
        "l2-copied": image.l2_at(1),
        "leak": 3 * 4096,
    }
    assert report.counters.image_end_offset == far + 4096


def test_metadata_in_holes_is_not_read() -> None:
    made = builder(size=1 << 40)
    image = made.build()
    source = Sparse.of(bytes(image.data), 1 << 50)
    check_image(source)
    # The L1 table of 4 MiB is a hole, and so is nearly all of the file.
    assert source.bytes_read < MIB


# Progress, and the wish to stop


def test_progress_is_told_stage_by_stage_and_never_goes_back() -> None:
    told: list[tuple[str, int, int]] = []
    check_image(
        RULES["two_entries_on_one_cluster"]().image.source,
        progress=lambda stage, done, total: told.append((stage, done, total)),
    )
    assert all(0 <= done <= total and total > 0 for _, done, total in told)
    stages = list(dict.fromkeys(stage for stage, _, _ in told))
    assert stages[0] == "census"
    last = {stage: (done, total) for stage, done, total in told}
    assert last["refcounts"][0] == last["refcounts"][1]
    assert last["census"][0] == last["census"][1]
    for stage in stages[1:]:
        done = [at for name, at, _ in told if name == stage]
        assert done == sorted(done) or stage == "census"


def test_check_can_be_stopped_whenever_it_asks() -> None:
    source = RULES["two_entries_on_one_cluster"]().image.source
    asked = 0

    def count() -> bool:
        nonlocal asked
        asked += 1
        return False

    check_image(source, cancelled=count)
    assert asked > 3
    for limit in range(asked):
        patience = iter(range(limit))
        with pytest.raises(Cancelled):
            check_image(source, cancelled=lambda patience=patience: next(patience, None) is None)


def test_check_reads_and_nothing_else() -> None:
    data = bytes(fill(builder()).build().data)
    source = Bytes(data)
    check_image(source)
    assert source.data is data
