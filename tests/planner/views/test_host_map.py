"""The atlas: every cluster of the file with all its users, refcounts and findings, run by run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from planner.check.check import check_image
from planner.check.owners import OwnersFinder
from planner.check.report import Report
from planner.errors import ImageError
from planner.findings.grouped import FindingsBuilder
from planner.findings.kinds import ACTIVE, KINDS, FindingKind, Severity, Structure
from planner.metadata.locate import take_survey
from planner.metadata.work_limits import Limits
from planner.progress import Meter
from planner.source import Bytes, Source
from planner.views import host_map as atlas_module
from planner.views.host_map import DAMAGE, Atlas, Use, bits_of, draw_atlas, kinds_in, owner_label
from tests.images.builder import Image
from tests.images.corpus import RULES
from tests.images.corpus.rule import SIZE, builder, fill, plain, with_snapshot
from tests.planner.sources import Sparse

REFCOUNTS = bits_of(FindingKind.LEAK, FindingKind.REFCOUNT_LOW, FindingKind.REFCOUNT_MISSING)

ACTIVE_USE = {
    Structure.L1_TABLE: Use.L1_TABLE,
    Structure.L2_TABLE: Use.L2_TABLE,
    Structure.DATA: Use.DATA,
    Structure.COMPRESSED: Use.COMPRESSED,
}


def draw(source: Source, report: Report | None = None) -> Atlas:
    return draw_atlas(source, report or check_image(source))


def clusters(atlas: Atlas) -> Iterator[tuple[int, int, int, int, int]]:
    """Cluster, uses, findings, refcount, references: one row a cluster."""
    bits = atlas.layout.geometry.cluster_bits
    for runs in atlas.runs():
        columns = (runs.offset, runs.length, runs.uses, runs.findings, runs.refcount)
        for offset, length, *rest in zip(
            *(c.tolist() for c in (*columns, runs.references)), strict=True
        ):
            for cluster in range(offset >> bits, (offset + length) >> bits):
                yield cluster, *rest


def owners_by_cluster(source: Source, report: Report) -> dict[int, int]:
    """Bits of `Use` for every cluster that `OwnersFinder` knows an owner of."""
    assert report.layout is not None
    assert report.mismatches is not None
    index, survey = (
        report.mismatches.index,
        take_survey(source, report.layout, FindingsBuilder()),
    )
    everything = np.ones(index.slots, dtype=np.bool_)
    finder = OwnersFinder(report.geometry, index, everything, survey.l1, survey.tables)
    finder.add_regions(survey.every_region)
    finder.add_entries(source, survey.present, Meter())
    owners = finder.result()
    found: Counter[int] = Counter()
    columns = (owners.cluster, owners.structure, owners.snapshot)
    for cluster, structure, snapshot in zip(*(c.tolist() for c in columns), strict=True):
        use = ACTIVE_USE.get(Structure(structure))
        if use is None:
            use = Use[Structure(structure).name]
        elif snapshot != ACTIVE:
            use = Use(use + 1)
        found[cluster] |= use.bit
    return found


@pytest.fixture(params=[7, 1 << 18])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atlas_module, "CHUNK", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("name", RULES)
def test_every_cluster_has_its_users_and_numbers(name: str) -> None:
    source = RULES[name]().image.source
    report = check_image(source)
    atlas = draw(source, report)
    rows = list(clusters(atlas))
    assert report.layout is not None
    assert report.mismatches is not None
    numbers = [row[0] for row in rows]
    end = report.layout.host_clusters
    assert numbers[:end] == list(range(end))
    assert numbers[end:] in ([], [end])
    owners = owners_by_cluster(source, report)
    for cluster, uses, findings, refcount, references in rows:
        slots, known = report.mismatches.index.find(np.array([cluster]))
        if known[0]:
            if bits_of(FindingKind.REFCOUNT_UNREADABLE) & findings:
                assert refcount == 0
            elif cluster < end:
                assert refcount == report.mismatches.stored[slots[0]]
            assert references == report.mismatches.counted[slots[0]]
        if cluster in owners:
            assert uses == owners[cluster], (cluster, owner_label(uses))
        else:
            assert uses in (Use.FREE.bit, Use.LEAKED.bit, Use.UNKNOWN.bit)
            assert (uses == Use.FREE.bit) == (not refcount and not references and not findings)


@pytest.mark.parametrize("name", RULES)
def test_refcount_findings_are_those_of_the_report(name: str) -> None:
    source = RULES[name]().image.source
    report = check_image(source)
    found: Counter[FindingKind] = Counter()
    for _, _, findings, _, _ in clusters(draw(source, report)):
        found.update(kind for kind in kinds_in(findings & REFCOUNTS))
    assert found == {kind: number for kind, number in report.totals.items() if number}


@pytest.mark.parametrize("name", RULES)
def test_damage_is_somewhere_in_the_file(name: str) -> None:
    source = RULES[name]().image.source
    report = check_image(source)
    shown = 0
    for _, _, findings, _, _ in clusters(draw(source, report)):
        shown |= findings
    worst = {k for k in report.counts() if KINDS[k].severity >= Severity.CORRUPTION}
    assert set(kinds_in(shown & DAMAGE)) >= worst


@pytest.mark.parametrize("name", RULES)
def test_a_sparse_index_gives_the_same_runs(name: str) -> None:
    source = RULES[name]().image.source
    dense = list(clusters(draw(source)))
    report = check_image(source, limits=Limits(dense_clusters=0))
    assert list(clusters(draw(source, report))) == dense


def test_neighbouring_runs_differ_and_touch() -> None:
    image = with_snapshot()
    rows = [
        tuple(int(column[at]) for column in map(runs.__getattribute__, runs.__slots__))
        for runs in draw(image.source).runs()
        for at in range(len(runs))
    ]
    for before, after in pairwise(rows):
        assert before[0] + before[1] == after[0]
        assert before[2:] != after[2:]


def test_the_totals_are_the_sums_of_the_runs() -> None:
    atlas = draw(with_snapshot().source)
    sums: Counter[tuple[int, int]] = Counter()
    for _, uses, findings, _, _ in clusters(atlas):
        sums[uses, findings] += SIZE
    assert atlas.totals() == sums


def test_a_cluster_with_two_users_has_both() -> None:
    image = plain()
    table = image.l2_table(0)
    image.set_word(image.l2_at(5), table | 1 << 63)
    uses = {cluster: uses for cluster, uses, *_ in clusters(draw(image.source))}
    assert owner_label(uses[table // SIZE]) == "L2 table+data"


def test_what_a_snapshot_shares_is_the_disks_own() -> None:
    image = with_snapshot()
    old, new = image.word(image.l2_at(5, 0)), image.host_offset(5)
    uses = {cluster: uses for cluster, uses, *_ in clusters(draw(image.source))}
    assert owner_label(uses[image.host_offset(0) // SIZE]) == "data"
    assert owner_label(uses[new // SIZE]) == "data"
    assert owner_label(uses[(old & ~(1 << 63)) // SIZE]) == "data of a snapshot"


def test_a_snapshots_l1_table_on_the_active_one_are_two_users() -> None:
    assert owner_label(Use.L1_TABLE.bit | Use.SNAPSHOT_L1_TABLE.bit) == (
        "L1 table+L1 table of a snapshot"
    )


def test_where_an_lost_l2_table_was_pointed_at_is_damaged() -> None:
    image = plain()
    image.set_word(image.l1_at(1), len(image.data) + 7 * SIZE)
    findings = {cluster: findings for cluster, _, findings, *_ in clusters(draw(image.source))}
    assert kinds_in(findings[image.header.l1_table_offset // SIZE]) == [FindingKind.PAST_END]


def test_a_file_that_claims_an_exbibyte_is_mostly_one_run() -> None:
    image: Image = fill(builder()).build()
    source = Sparse.of(bytes(image.data), 1 << 60)
    rows = [
        (int(runs.offset[at]), int(runs.length[at]), int(runs.uses[at]))
        for runs in draw(source).runs()
        for at in range(len(runs))
    ]
    assert sum(length for _, length, _ in rows) == 1 << 60
    assert rows[-1] == (len(image.data), (1 << 60) - len(image.data), Use.FREE.bit)


def test_nothing_is_known_of_an_image_without_a_layout() -> None:
    source = Bytes(b"QFI\xfb" + bytes(200))
    with pytest.raises(ImageError):
        draw(source)


def test_a_length_that_reaches_over_every_number_covers_the_file():
    image = plain()
    report = check_image(image.source)
    found = FindingsBuilder()
    longest = np.array([2**63 - 1, 2**63 - 1, SIZE])
    offset = np.array([SIZE, 3 * SIZE, 2 * SIZE])
    found.add(FindingKind.LEAK, host_offset=offset, length=longest)
    marked = draw(image.source, replace(report, findings=found.build()))
    leaks = [row[0] for row in clusters(marked) if FindingKind.LEAK in kinds_in(row[2])]
    assert leaks == list(range(1, image.host_clusters))
    assert len(marked.damaged) < 5, "one finding may be about millions of clusters"
