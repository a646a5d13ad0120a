"""Seeded repairs, judged by QEMU: every second case of the campaign of checks, under both tiers.

`make test ARGS="--cases 10000 --seed 7"` runs more; `python -m tests.oracle --repair` does so on
every core. Below: one test for everything that QEMU makes clean and we leave, and the judge's own.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from planner.check.check import check_image
from planner.check.report import Report
from planner.errors import RepairError
from planner.qcow2.entries import COMPRESSED, COPIED, ZERO
from planner.repair.plan import RepairTier
from planner.repair.tiers import Proposal, propose
from planner.source import Bytes, Source
from tests.images.builder import Image
from tests.images.corpus import RULES
from tests.images.corpus.rule import SIZE, plain, with_snapshot
from tests.images.guest_disks import Disk, faults_between, first_difference
from tests.images.matrix import Row, copy, run
from tests.oracle import reach
from tests.oracle.campaign import groups, row_of
from tests.oracle.judge import Answer
from tests.oracle.reach import Reach, reaches
from tests.oracle.repair_campaign import run_repair_group
from tests.oracle.repair_judge import (
    PURPOSES,
    Judgement,
    Lag,
    faults_of_getting_worse,
    judge_repairs,
    write_out,
)
from tests.oracle.scene import Scene, dissect

ROW = Row(cluster_bits=12)
LEAKS, ALL = 0, 1


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a group of cases; its name says seed and row, its failure the damage."""
    if "group" not in metafunc.fixturenames:
        return
    seed, cases = metafunc.config.getoption("--seed"), metafunc.config.getoption("--cases")
    metafunc.parametrize(
        "group",
        [
            pytest.param(group, id=f"seed{seed}-{group}-{row_of(seed, group).name}")
            for group in groups(cases)
        ],
    )


def test_repairs_are_safe_and_reach_what_qemu_reaches(group: int, seed: int, cases: int) -> None:
    every_second = range(1, cases, 2)
    wrong = [case for case in run_repair_group(seed, group, every_second) if not case.passed]
    assert not wrong, "\n\n".join(map(str, wrong))


# --- what we leave on purpose -----------------------------------------------------------------


def judged(directory: Path, image: Image, tier: int) -> Judgement:
    path = directory / "image.qcow2"
    path.write_bytes(image.data)
    return judge_repairs(ROW, path)[tier]


def excused(judgement: Judgement, *names: str) -> None:
    assert not judgement.faults, judgement
    assert set(judgement.purposes) == set(names), judgement
    assert judgement.outcome.endswith("qemu exit 0"), judgement


def test_every_purpose_is_here_and_reasoned() -> None:
    names = [one.name for one in PURPOSES]
    assert len(set(names)) == len(names)
    for one in PURPOSES:
        assert one.reason.endswith(".")
        assert f"test_{one.name.replace('-', '_')}" in globals(), one.name


def _with_bitmaps(directory: Path, *, snapshot: bool) -> Path:
    image = directory / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", image, "1M")
    run("qemu-img", "bitmap", "--add", "-g", "4k", image, "one")
    run("qemu-img", "bitmap", "--add", "-g", "4k", image, "other")
    run("qemu-io", "-c", "write -q 0 64k", image)
    if snapshot:
        run("qemu-img", "snapshot", "-c", "snap", image)
    return image


def test_snapshots_deleted(tmp_path: Path) -> None:
    """A refcount is too low; QEMU deletes the snapshot that shares the cluster, and is content."""
    path = _with_bitmaps(tmp_path, snapshot=True)
    anatomy = dissect(path)
    with Scene(path, anatomy) as scene:
        data = scene.get(anatomy.snapshot_l2[0].offset) % COPIED // SIZE
        scene.put(anatomy.refblocks[0] + 2 * data, 1, 2)
    excused(judge_repairs(ROW, path)[LEAKS], "snapshots-deleted")


def test_what_qemu_mends_without_losing_snapshots_is_not_excused_by_their_loss(
    tmp_path: Path,
) -> None:
    """Only leaks: QEMU deletes the snapshot all the same, and so is no excuse for a refusal."""
    path = _with_bitmaps(tmp_path, snapshot=True)
    report = check_image(Bytes(path.read_bytes()))
    refusal = RepairError("no reason")
    for despite_bitmaps, name in ((True, None), (False, "snapshots-deleted")):
        lag = Lag(RepairTier.LEAKS, None, refusal, report, report, False, True, despite_bitmaps)
        assert next((one.name for one in PURPOSES if one.applies(lag)), None) == name


def test_bitmaps_rewritten(tmp_path: Path) -> None:
    """Two bitmaps share their data; QEMU, opening for `leaks`, writes both somewhere else."""
    path = _with_bitmaps(tmp_path, snapshot=False)
    anatomy = dissect(path)
    with Scene(path, anatomy) as scene:
        one, other = anatomy.bitmap_tables
        scene.put(one.offset, scene.get(other.offset))
    excused(judge_repairs(ROW, path)[LEAKS], "bitmaps-rewritten")


def test_copied_flags_are_mended_by_both_where_nothing_else_is_wrong(tmp_path: Path) -> None:
    image = plain()
    image.clear_bits(image.l1_at(0), COPIED)
    image.set_refcount(len(image.data) // SIZE - 1, 2)
    for tier in (LEAKS, ALL):
        assert judged(tmp_path, image, tier).outcome == "clean"
    image.set_refcount(image.l2_table(1) // SIZE, 0)
    assert judged(tmp_path, image, LEAKS).outcome == "exit 2, qemu exit 2"


def test_table_cut(tmp_path: Path) -> None:
    """The end of the file takes an L1 entry; QEMU frees the L2 table and all that it maps."""
    image = RULES["l1_table_cut_by_the_end"]().image
    excused(judged(tmp_path, image, LEAKS), "table-cut")


def test_header_shared(tmp_path: Path) -> None:
    """A compressed cluster begins in the header, and the refcounts are lost."""
    image = plain()
    image.set_word(image.l2_at(7), COMPRESSED | 1)
    assert judged(tmp_path, image, ALL).outcome == "clean"
    image.set_word(image.reftable_at(0), 0)
    excused(judged(tmp_path, image, ALL), "header-shared")


def test_refcounts_shared(tmp_path: Path) -> None:
    """The guest's data lies on the refcount block, and a compressed cluster in the header."""
    image = plain()
    image.set_word(image.l2_at(7), COMPRESSED | 1)
    image.set_word(image.l2_at(1), image.refblock(0) | COPIED)
    excused(judged(tmp_path, image, ALL), "refcounts-shared")


def test_flags_shared(tmp_path: Path) -> None:
    """The guest's data lies on the L2 table, in which a flag is wrong; what it was leaks."""
    image = plain()
    image.set_word(image.l2_at(1), image.l2_table(0))
    image.clear_bits(image.l2_at(2), COPIED)
    judgement = judged(tmp_path, image, ALL)
    assert "flags-shared" in judgement.purposes
    assert not judgement.faults


def test_refcounts_of_flags_shared(tmp_path: Path) -> None:
    """The guest's data lies on the L2 table, and says that it is nobody else's."""
    image = plain()
    image.set_word(image.l2_at(1), image.l2_table(0) | COPIED)
    judgement = judged(tmp_path, image, ALL)
    assert "refcounts-of-flags-shared" in judgement.purposes
    assert not judgement.faults


def test_lost_among_leaks(tmp_path: Path) -> None:
    image = plain()
    image.set_word(image.l1_at(1), 0)
    excused(judged(tmp_path, image, ALL), "lost-among-leaks")
    assert judged(tmp_path, image, LEAKS).outcome == "clean"


def test_past_end_not_grown(tmp_path: Path) -> None:
    """Bits of a bitmap lie past the end; QEMU stores it anew, without them."""
    path = _with_bitmaps(tmp_path, snapshot=False)
    with Scene(path, dissect(path)) as scene:
        scene.put(scene.at.bitmap_tables[0].offset, 1 << 30)
    assert "past-end-not-grown" in judge_repairs(ROW, path)[ALL].purposes


def test_a_refcount_table_past_the_end_is_made_anew(tmp_path: Path) -> None:
    image = plain()
    image.change_header(refcount_table_offset=len(image.data) + SIZE)
    assert judged(tmp_path, image, ALL).outcome == "clean"


def test_a_refcount_table_that_seems_to_go_on_over_others_is_made_anew(tmp_path: Path) -> None:
    path = _with_bitmaps(tmp_path, snapshot=True)
    with Scene(path, dissect(path)) as scene:
        scene.put(56, 6, 4)
    assert judge_repairs(ROW, path)[ALL].outcome == "clean"


def test_snapshots_cut(tmp_path: Path) -> None:
    """An entry is zeros, and lost are the refcounts that would show what it listed."""
    image = with_snapshot()
    image.change_header(nb_snapshots=2)
    image.set_word(image.reftable_at(0), 0)
    excused(judged(tmp_path, image, ALL), "snapshots-cut")


def test_a_snapshot_table_that_qemu_does_not_load_is_mended(tmp_path: Path) -> None:
    """Its extra data would reach past the end of the file; QEMU keeps the snapshot, we its name."""
    image = with_snapshot()
    at = image.snapshots[0].offset
    image.data[at + 36 : at + 40] = (1 << 20).to_bytes(4, "big")
    assert judged(tmp_path, image, ALL).outcome == "clean"


def test_refused_where_mended_refcounts_would_bring_more_to_light(tmp_path: Path) -> None:
    """No refcount can be looked up, and a flag in an L2 table that is also data would be wrong."""
    image = plain()
    image.set_word(image.reftable_at(0), image.refblock(0) + 512)
    image.set_word(image.l2_at(1), image.l2_table(0) | COPIED)
    judgement = judged(tmp_path, image, ALL)
    assert not judgement.faults
    assert judgement.outcome == "refused, qemu exit 3"
    assert judgement.refusal == "AMBIGUOUS_CORRUPTION refcount-unreadable"


# --- the judge --------------------------------------------------------------------------------


def test_the_command_repairs_and_undoes(tmp_path: Path) -> None:
    image = plain()
    image.set_word(image.l1_at(1), 0)
    image.set_word(image.l2_at(1), image.host_offset(1) + 512 | ZERO)
    path = tmp_path / "image.qcow2"
    path.write_bytes(image.data)
    for judgement in judge_repairs(ROW, path, command=True):
        assert not judgement.faults, judgement


def test_worse_is_seen() -> None:
    before = Answer(3, {"check-errors": 0, "corruptions": 0, "leaks": 2})
    same = Answer(3, {"check-errors": 0, "corruptions": 0, "leaks": 2})
    more = Answer(3, {"check-errors": 0, "corruptions": 0, "leaks": 3})
    worse = Answer(2, {"check-errors": 0, "corruptions": 1, "leaks": 0})
    assert not [*faults_of_getting_worse(before, same)]
    for after in (more, worse, Answer(1), Answer(-6)):
        assert [*faults_of_getting_worse(before, after)]


def test_another_byte_is_seen(tmp_path: Path) -> None:
    content = bytes(3 << 20)
    other = bytearray(content)
    other[(2 << 20) + 700] = 1
    assert first_difference(Bytes(content), Bytes(content)) is None
    assert first_difference(Bytes(content), Bytes(bytes(other))) == (2 << 20) + 512
    assert first_difference(Bytes(content), Bytes(content + b"\0")) == 3 << 20
    sparse = tmp_path / "sparse"
    write_out(Bytes(bytes(other)), sparse)
    assert sparse.read_bytes() == other


def test_a_lost_or_changed_guest_is_seen(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("was", "same", "other")]
    for path, content in zip(paths, (b"a" * 1024, b"a" * 1024, b"a" * 1023 + b"b"), strict=True):
        path.write_bytes(content)
    was, same, other = (Disk(path, frozenset()) for path in paths)
    assert not [*faults_between(was, same)]
    assert [*faults_between(was, other)] == ["reads otherwise at 512"]
    assert not [*faults_between(Disk(paths[0], frozenset({1})), other)]
    assert [*faults_between(was, Disk(paths[1], frozenset({1})))]
    assert [*faults_between(was, None)] == ["cannot be read any more"]


def reached(directory: Path, image: Image) -> dict[RepairTier, Reach]:
    base, damaged = directory / "base.qcow2", directory / "case.qcow2"
    base.write_bytes(plain().data)
    damaged.write_bytes(image.data)
    return {each.tier: each for each in reaches(ROW, base, damaged)}


def test_a_repair_without_loss_is_counted_with_what_we_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = plain()
    assert reached(tmp_path, image) == {}
    image.clear_bits(image.l1_at(0), COPIED)
    assert [each.ours for each in reached(tmp_path, image).values()] == ["", ""]
    image.set_word(image.l2_at(1), image.refblock(0) | COPIED)
    assert [each.ours for each in reached(tmp_path, image).values()] == [""]

    def refuse(source: Source, report: Report, tier: RepairTier) -> Proposal:
        if tier is RepairTier.ALL:
            raise RepairError("no reason")
        return propose(source, report, tier)

    monkeypatch.setattr(reach, "propose", refuse)
    (what,) = reached(tmp_path, image).values()
    assert "refblock-shared" in what.ours
    assert not what.chosen


def test_a_repair_that_loses_a_snapshot_is_not_counted(tmp_path: Path) -> None:
    base, damaged = _with_bitmaps(tmp_path, snapshot=True), tmp_path / "case.qcow2"
    anatomy = dissect(base)
    copy(base, damaged)
    with Scene(damaged, anatomy) as scene:
        data = scene.get(anatomy.snapshot_l2[0].offset) % COPIED // SIZE
        scene.put(anatomy.refblocks[0] + 2 * data, 1, 2)
    assert "snapshots-deleted" in judge_repairs(ROW, damaged)[LEAKS].purposes
    assert RepairTier.LEAKS not in [each.tier for each in reaches(ROW, base, damaged)]
