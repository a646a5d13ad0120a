"""An offset explained without a check says what a check counts, and where a way ends."""

from __future__ import annotations

import numpy as np
import pytest

from planner.arrays import GuestOffset, HostOffset
from planner.check.check import check_image
from planner.errors import Cancelled, ImageError
from planner.findings.kinds import ACTIVE, NONE, FindingKind, Owner, Structure
from planner.guest.mapping import Flaw, Mapping, RunKind
from planner.progress import unless
from planner.qcow2.entries import COPIED, L2_OFFSET, NO_HOST, ClusterType
from planner.source import Bytes
from planner.views.explain import GuestExplanation, HostExplanation, explain_guest, explain_host
from planner.views.host_map import kinds_in
from tests.images.builder import Image
from tests.images.corpus import RULES
from tests.images.corpus.rule import SIZE, builder, extended, fill, plain, with_snapshot


def host(image: Image, offset: int) -> HostExplanation:
    return explain_host(image.source, HostOffset(offset))


def guest(image: Image, offset: int) -> GuestExplanation:
    return explain_guest(image.source, GuestOffset(offset))


@pytest.mark.parametrize("name", RULES)
def test_every_host_cluster_has_the_refcount_and_references_of_a_check(name: str) -> None:
    image = RULES[name]().image
    report = check_image(image.source)
    if report.layout is None or report.mismatches is None:
        with pytest.raises(ImageError):
            host(image, 0)
        return
    kinds = report.counts()
    mismatches, size = report.mismatches, report.geometry.cluster_size
    readable = mismatches.readable(0, mismatches.index.slots)
    end = report.layout.host_clusters
    for number in {*range(min(end, 16)), *range(max(0, end - 8), end)}:
        cluster = host(image, number * size + 1).cluster
        assert cluster.number == number
        if readable[number]:
            assert cluster.refcount.refcount == mismatches.stored[number]
        else:
            assert cluster.refcount.refcount is None
        # A counter that is full, and a broken entry, count less than there are users.
        if not {FindingKind.REFCOUNT_OVERFLOW, FindingKind.COMPRESSED_SUBCLUSTERS} & set(kinds):
            assert cluster.references == mismatches.counted[number]
    contested = report.findings.of(FindingKind.MULTIPLE_OWNERS)
    for offset, owners in list(zip(contested.host_offset, contested.found, strict=True))[:8]:
        assert host(image, int(offset)).cluster.contested == owners


@pytest.mark.parametrize("name", RULES)
def test_the_way_to_a_guest_byte_is_the_one_that_is_read(name: str) -> None:
    image = RULES[name]().image
    if check_image(image.source).error is not None:
        with pytest.raises(ImageError):
            guest(image, 0)
        return
    geometry, header = image.geometry, image.header
    mapping = Mapping(image.source, geometry, header.l1_table_offset, header.l1_size)
    for cluster in (0, 1, 2, 5, 20, geometry.l2_entries, geometry.l2_entries + 1):
        offset = cluster * geometry.cluster_size + geometry.cluster_size // 3
        if offset >= geometry.virtual_size:
            continue
        it, run = guest(image, offset), mapping.runs(offset, offset + 1)
        assert (it.kind, it.flaw, it.read_from) == (run.kind[0], run.flaw[0], run.host[0])
        assert (it.l1_index, it.l2_index) == divmod(cluster, geometry.l2_entries)
        assert it.l1_word == image.word(it.l1_at)
        if it.l2_table:
            assert it.l2_word == image.word(it.l2_at)


@pytest.mark.parametrize(
    ("name", "cluster", "gone"),
    [
        ("l2_table_overwritten", 9, Structure.L2_TABLE),
        ("l2_table_overwritten_in_part", 70, Structure.L2_TABLE),
        ("l2_table_overwritten_in_part", 0, None),
        ("l1_table_overwritten", 5, Structure.L1_TABLE),
        ("zero_flag_in_version_2", 0, None),
    ],
)
def test_a_table_that_was_overwritten_is_named(
    name: str, cluster: int, gone: Structure | None
) -> None:
    image = RULES[name]().image
    assert guest(image, cluster * image.geometry.cluster_size).gone is gone


def test_users_are_named_with_their_snapshots() -> None:
    image = with_snapshot()
    cluster = host(image, image.host_offset(0)).cluster
    assert cluster.owners == (
        Owner(Structure.DATA, ACTIVE, 0, 0, NONE),
        Owner(Structure.DATA, 0, 0, 0, -1),
    )
    assert cluster.references == 2
    assert not cluster.contested
    assert {number: it.name for number, it in cluster.snapshots.items()} == {0: b"before"}
    assert cluster.l1_table(0) == image.snapshots[0].l1_table_offset
    assert cluster.l1_table(ACTIVE) == image.header.l1_table_offset


def test_an_explanation_holds_no_more_snapshots_than_it_names() -> None:
    """There may be tens of thousands, and some explanations are kept."""
    made = fill(builder())
    made.take_snapshot("one")
    made.write(0, b"z" * SIZE)
    made.take_snapshot("two")
    image = made.build()
    cluster = host(image, image.word(image.l2_at(0, 0)) & L2_OFFSET).cluster
    assert {number: it.name for number, it in cluster.snapshots.items()} == {0: b"one"}


def test_the_guest_byte_of_a_host_byte() -> None:
    image = plain()
    assert host(image, image.host_offset(5) + 17).guest == (5 * SIZE + 17,)
    assert host(image, image.l2_table(0) + 8).guest == (None,)
    image.set_bits(image.l2_at(5), 512)
    assert host(image, image.host_offset(5) + 17).guest == (5 * SIZE + 17,)


def test_a_leaked_a_free_and_a_contested_cluster() -> None:
    image = plain()
    free = image.refcounts().index(0)
    assert not host(image, free * SIZE).cluster.is_leaked
    image.set_refcount(free, 3)
    assert host(image, free * SIZE).cluster.is_leaked
    image.set_word(image.l2_at(1), image.word(image.l2_at(0)))
    assert host(image, image.host_offset(0)).cluster.contested == 2


def test_the_way_ends_where_nothing_leads_on() -> None:
    image = plain()
    image.set_word(image.l1_at(1), 0)
    it = guest(image, image.geometry.l2_coverage + 5)
    assert (it.l2_table, it.host, it.clusters) == (0, NO_HOST, ())
    assert it.kind is RunKind.UNALLOCATED


def test_the_way_ends_at_a_misaligned_l2_table() -> None:
    image = plain()
    image.set_bits(image.l1_at(0), 512)
    it = guest(image, 5)
    assert (it.kind, it.flaw) == (RunKind.DAMAGED, Flaw.L2_MISALIGNED)
    assert kinds_in(it.l1_findings) == [FindingKind.L2_TABLE_MISALIGNED]


def test_data_past_the_end_has_a_host_cluster_there() -> None:
    image = plain()
    past = (image.host_clusters + 5) * SIZE
    image.set_word(image.l2_at(0), past | COPIED)
    it = guest(image, 9)
    assert kinds_in(it.l2_findings) == [FindingKind.PAST_END, FindingKind.L2_COPIED]
    assert [cluster.offset for cluster in it.clusters] == [image.l2_table(0), past]


def test_a_subcluster_is_named_by_its_number() -> None:
    made = fill(extended())
    made.write_subclusters(9, b"s" * (1 << 14), 0b100, 0b1000)
    image = made.build()
    kinds = []
    for number in range(5):
        it = guest(image, (9 << 14) + number * 512 + 100)
        assert it.subcluster == number
        assert it.bitmap == 0b1000 << 32 | 0b100
        kinds.append(it.kind)
    assert kinds == [
        RunKind.UNALLOCATED,
        RunKind.UNALLOCATED,
        RunKind.DATA,
        RunKind.ZERO,
        RunKind.UNALLOCATED,
    ]


def test_compressed_data_may_lie_in_two_host_clusters() -> None:
    made = fill(extended())
    rng = np.random.default_rng(1)
    for cluster in range(20, 26):
        made.write_compressed(cluster, rng.bytes(7000))
    image = made.build()
    ways = [guest(image, (cluster << 14) + 1) for cluster in range(20, 26)]
    assert {it.type for it in ways} == {ClusterType.COMPRESSED}
    assert {len(it.clusters) for it in ways} == {2, 3}


@pytest.mark.parametrize("offset", [1 << 40, (1 << 64) - 1])
def test_offsets_that_no_file_has(offset: int) -> None:
    image = plain()
    cluster = host(image, offset).cluster
    assert (cluster.references, cluster.refcount.refcount) == (0, 0)
    with pytest.raises(ImageError, match="the disk ends at"):
        guest(image, offset)


def test_it_stops_when_it_is_told_to() -> None:
    with pytest.raises(Cancelled):
        explain_host(plain().source, HostOffset(0), unless(lambda: True))


def test_nothing_is_explained_without_a_layout() -> None:
    source = Bytes(b"QFI\xfb" + bytes(200))
    with pytest.raises(ImageError):
        explain_host(source, HostOffset(0))
