"""The check as a whole: what it asks of a source, what a file may claim, and how it is stopped."""

import tracemalloc
from functools import partial
from itertools import chain, repeat

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.check.check import check_image
from planner.check.report import Report
from planner.errors import Cancelled
from planner.findings.kinds import Finding, FindingKind, Structure
from planner.metadata.work_limits import MAX_LUKS_BYTES, Limits
from planner.progress import unless
from planner.qcow2.extensions import CRYPTO_HEADER
from planner.qcow2.layout import Layout
from planner.source import Bytes, Source
from tests.images.builder import Image, ImageBuilder
from tests.images.corpus import RULES
from tests.images.corpus.rule import builder, fill, plain
from tests.images.luks_headers import luks_bytes
from tests.images.table_damage import IMAGES, damaged, words_for
from tests.planner.answers import answers
from tests.planner.sources import Sparse

MIB = 1 << 20
EIB = 1 << 60


def check_sparsely(source: Source) -> Report:
    """Check with counters for the clusters that matter only."""
    return check_image(source, limits=Limits(dense_clusters=0))


# Any image


RICH = IMAGES["rich"]
damages = st.lists(
    st.tuples(st.integers(0, len(RICH.data) // 8 - 1).map(lambda at: at * 8), words_for(RICH)),
    min_size=1,
    max_size=4,
)


@given(changes=damages, end=st.none() | st.integers(0, len(RICH.data)))
def test_any_damage_is_reported(changes, end) -> None:
    report = check_image(damaged(RICH, changes, end))
    rows = list(report.rows())
    assert all(isinstance(row, Finding) and row.count > 0 for row in rows)
    assert report.exit_code in (0, 1, 2, 3, 63)
    assert report.verdict


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


@pytest.mark.parametrize("name", RULES)
def test_what_is_counted_past_the_end_is_in_no_counter(name) -> None:
    source = RULES[name]().image.source
    without = check_image(source, limits=Limits(past_end=False))
    assert without.cut_off is None
    whole = check_image(source)
    assert without.counters == whole.counters
    kinds = without.counts()
    assert kinds == {
        kind: number
        for kind, number in whole.counts().items()
        if kind is not FindingKind.LEAK_PAST_END
    }


@pytest.mark.parametrize(
    ("limits", "kind"),
    [
        (Limits(overwritten=False), FindingKind.TABLE_OVERWRITTEN),
        (Limits(beyond_disk=False), FindingKind.BEYOND_DISK_END),
    ],
)
@pytest.mark.parametrize("name", RULES)
def test_what_is_in_no_counter_need_not_be_looked_for(name, limits, kind) -> None:
    source = RULES[name]().image.source
    without, whole = check_image(source, limits=limits), check_image(source)
    assert without.counters == whole.counters
    expected = whole.counts()
    expected.pop(kind, None)
    assert without.counts() == expected


@pytest.mark.parametrize("name", RULES)
def test_where_nobody_asks_what_is_wrong_with_entries_references_are_the_same(name) -> None:
    source = RULES[name]().image.source
    without, whole = check_image(source, limits=Limits(entry_findings=False)), check_image(source)
    assert without.entries is not None
    assert not without.entries.counts()
    assert without.mismatches is not None
    assert whole.mismatches is not None
    clusters = np.arange(whole.layout.host_clusters if whole.layout else 0)
    references = [
        report.count_references(clusters).tolist()
        for report in (without.mismatches, whole.mismatches)
    ]
    assert references[0] == references[1]


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


def with_luks_of(length: int) -> Image:
    """A disk in small clusters, the LUKS header of which is said to be so long."""
    image = ImageBuilder(cluster_bits=9, crypt_method=2, luks_header=luks_bytes()).build()
    extensions = Layout.read(image.source).extensions.all
    at = next(each.offset for each in extensions if each.magic == CRYPTO_HEADER)
    image.set_word(at + 8, length)
    return image


def test_of_a_luks_header_that_claims_holes_no_more_is_counted_than_one_can_have() -> None:
    image = with_luks_of(1 << 40)
    source = Sparse.of(bytes(image.data), 1 << 41)
    assert peak_of(source) < 64 * MIB
    report = check_image(source)
    assert (report.verdict, report.complete) == ("incomplete", False)
    assert any("crypto header length" in str(error) for error in report.stopped)
    luks = report.regions.structure == Structure.LUKS
    assert report.regions.size[luks].tolist() == [MAX_LUKS_BYTES]


@pytest.mark.parametrize(("length", "size"), [(MAX_LUKS_BYTES, 1 << 41), (1 << 40, 1 << 40)])
def test_a_luks_header_that_is_no_longer_or_ends_past_the_file_is_told_as_it_is(
    length: int, size: int
) -> None:
    """QEMU counts nothing of what reaches a cluster or more past the end."""
    report = check_image(Sparse.of(bytes(with_luks_of(length).data), size))
    assert not report.stopped
    luks = report.regions.structure == Structure.LUKS
    past = [row.length for row in report.rows(FindingKind.PAST_END)]
    assert (report.regions.size[luks].tolist(), past) == (
        ([length], []) if length < size else ([], [length])
    )


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

    check_image(source, progress=unless(count))
    assert asked > 3
    for limit in range(asked):
        answers = chain(repeat(False, limit), repeat(True))
        with pytest.raises(Cancelled):
            check_image(source, progress=unless(partial(next, answers)))


def test_check_reads_and_nothing_else() -> None:
    data = bytes(fill(builder()).build().data)
    source = Bytes(data)
    check_image(source)
    assert source.data is data
