"""The fuzzers' targets without a fuzzer: on their seeds, on seeded mutations, and on bombs.

`--cases 30000`: 100 times as many mutations, and every target on every bomb.
"""

import contextlib
import random
import subprocess
import sys
import tracemalloc
from collections import deque
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from instarfs.guest.files import hit_files
from instarfs.guest.follow import Follow
from instarfs.guest.guest import Guest
from instarfs.guest.place import Part, Place
from instarfs.image.file import FileSource, Image
from instarfs.render.files import files_tsv
from planner.check.check import check_image
from planner.check.claims import refcounts_are_shared
from planner.check.past_end import references_past_end
from planner.check.report import Report
from planner.errors import PlannerError, RepairError
from planner.findings.kinds import FindingKind
from planner.metadata.cluster_counters import ClusterIndex
from planner.repair.plan import RepairTier
from planner.repair.tiers import propose
from planner.rescue.headers import find_headers
from planner.rescue.rescue import rescue
from planner.source import Bytes
from planner.triage.triage import Triage, triage_leaks
from tests.fuzz.bounds import run
from tests.fuzz.costs import KINDS
from tests.fuzz.guest_bombs import make_guest_bomb
from tests.fuzz.holed import (
    WITHOUT_A_HEADER,
    leaks_in_holes,
    make_bomb,
    one_table_for_all,
    one_table_of_a_data_file,
    refcount_blocks_in_holes,
    tables_of_a_page,
    tables_that_are_holes,
)
from tests.fuzz.limit_bombs import make_limits
from tests.fuzz.mutations import mutate_words
from tests.fuzz.table_bombs import make_blocks
from tests.fuzz.targets import FILE_BYTES, MEMORY, SECONDS, TARGETS, Target
from tests.images.bombs import BOMBS
from tests.mount.mounts import INSTARFS, environment

CASES_A_MUTATION = 10
CASES_A_BOMB = 300
MANY_CASES = 10_000

STARTED_SECONDS, STARTED_BYTES = 1.0, 64 << 20
"""What `instarfs check` takes on an image with nothing in it: Python, numpy."""


def keep_to_the_bounds(work: Callable[[], object], *answers: type[Exception]) -> None:
    """Do *work* as a target is run. *answers*: what it may raise."""

    def once(_: bytes) -> None:
        with contextlib.suppress(*answers):
            work()

    run(Target(once, list), b"")


@pytest.mark.parametrize("name", TARGETS)
def test_every_seed_keeps_the_contract(name) -> None:
    for seed in TARGETS[name].seeds():
        TARGETS[name].run(seed)


@pytest.mark.parametrize("name", TARGETS)
def test_mutations_keep_the_contract(name, cases, seed) -> None:
    target, rng = TARGETS[name], random.Random(f"{name} {seed}")
    seeds = list(target.seeds())
    for _ in range(cases // CASES_A_MUTATION):
        target.run(mutate_words(rng.choice(seeds), rng))


@pytest.mark.parametrize("name", ["check", "triage", "guest"])
def test_every_word_may_be_as_large_as_words_get(name) -> None:
    seed = next(iter(TARGETS[name].seeds()))
    words = np.frombuffer(seed, dtype=">u8")
    for at in np.flatnonzero(words):
        for word in (words[at] | np.uint64(1 << 63), (1 << 64) - 512):
            changed = words.copy()
            changed[at] = word
            TARGETS[name].run(changed.tobytes())


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_no_more_than_its_bytes(name, tmp_path, cases) -> None:
    data = bytes(BOMBS[name]().data)
    assert len(data) <= FILE_BYTES
    run(Target(lambda data: assert_answered(check_image(Bytes(data))), list), data)
    if cases >= MANY_CASES:
        for target in ("header", "check", "plan"):
            run(TARGETS[target], data)


@pytest.mark.parametrize("name", ["snapshots-that-are-only-claimed", "snapshots-of-nothing"])
def test_a_bomb_can_be_shown_and_planned(name) -> None:
    data = bytes(BOMBS[name]().data)
    for target in ("header", "check", "triage", "plan"):
        run(TARGETS[target], data)


def assert_answered(report: Report) -> None:
    assert report.exit_code in (0, 1, 2, 3)


# Between the test and the command, so that the memory of the command is not that of the tests: a
# program begins with the peak of the one that started it.
_MEASURE = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(done.returncode, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)
"""


def test_a_whole_command_costs_no_more(tmp_path) -> None:
    image = tmp_path / "bomb.qcow2"
    image.write_bytes(BOMBS["snapshots-with-one-l1-table"]().data)
    command = [sys.executable, "-c", _MEASURE, *INSTARFS, "check", "-q", image]
    measured = subprocess.run(command, check=True, capture_output=True, env=environment())
    code, seconds, memory = measured.stdout.split()
    assert int(code) == 1
    assert float(seconds) < SECONDS + STARTED_SECONDS
    assert int(memory) < MEMORY + STARTED_BYTES


def test_no_command_and_no_file_of_a_mount_costs_more(tmp_path, cases, seed) -> None:
    """On a bomb, of another kind for each seed; more of them: `python -m tests.fuzz.costs`."""
    command = [sys.executable, "-m", "tests.fuzz.costs", "--briefly", "--folder", str(tmp_path)]
    command += ["--seed", str(seed), "--bombs", str(max(1, cases // CASES_A_BOMB))]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_a_bomb_occupies_less_than_it_may(kind, tmp_path, seed) -> None:
    KINDS[kind](seed).write(tmp_path / "image.qcow2")
    assert (tmp_path / "image.qcow2").stat().st_blocks * 512 <= FILE_BYTES
    beside = [path for path in tmp_path.iterdir() if path.name != "image.qcow2"]
    assert sum(path.stat().st_blocks * 512 for path in beside) <= FILE_BYTES
    assert bool(beside) == (kind in ("rare", "chain", "undo", "state", "scans", "turns", "limits"))


def test_bombs_are_of_every_width() -> None:
    heads = [dict(make_limits(number).parts)[0] for number in range(150)]
    assert {head[23] for head in heads} == set(range(9, 22))  # bits of a cluster
    version_3 = [head for head in heads if head[7] == 3]
    assert {head[99] for head in version_3} == set(range(7))  # order of refcounts
    lengths = {int.from_bytes(head[100:104], "big") for head in version_3}
    assert min(lengths) == 104
    assert max(lengths) > 1 << 20


@pytest.mark.parametrize("number", range(12))
def test_the_check_of_a_file_of_holes_costs_no_more(number, tmp_path) -> None:
    path = tmp_path / "bomb.qcow2"
    make_bomb(number).write(path)
    with Image.open(str(path)) as image:
        source = image.source()
        keep_to_the_bounds(lambda: assert_answered(check_image(source)))


@pytest.mark.parametrize(
    "make",
    [
        *(partial(make_guest_bomb, number) for number in (2, 5, 6, 20, 31, 38)),
        one_table_of_a_data_file,
    ],
    ids=["2", "5", "6", "20", "31", "38", "data file"],
)
def test_whose_the_damage_is_costs_no_more_on_a_disk_that_is_made_for_it(make, tmp_path) -> None:
    path = tmp_path / "bomb.qcow2"
    make().write(path)
    with Image.open(str(path)) as image:
        report = check_image(image.source())
        assert_answered(report)

        def search() -> None:
            guest = Guest(image, Follow(()))
            found = hit_files(guest, Place(Part.DISK), report, Triage())
            deque(files_tsv(found), maxlen=0)

        keep_to_the_bounds(search)


@pytest.mark.parametrize("number", [5_000_014, 5_000_021])
def test_what_leaks_and_what_is_planned_cost_no_more_on_tables_in_holes(number, tmp_path) -> None:
    path = tmp_path / "bomb.qcow2"
    make_bomb(number).write(path)
    with Image.open(str(path)) as image:
        source = image.source()
        report = check_image(source)
        keep_to_the_bounds(lambda: triage_leaks(source, report))
        keep_to_the_bounds(lambda: propose(source, report, RepairTier.BITMAPS), RepairError)


@pytest.mark.parametrize("number", [5_000_008, 5_000_022])
def test_placing_tables_costs_no_more_on_a_disk_that_is_made_for_it(number, tmp_path) -> None:
    path = tmp_path / "bomb.qcow2"
    make_guest_bomb(number).write(path)
    with Image.open(str(path)) as image:
        keep_to_the_bounds(partial(rescue, image.source()))


@pytest.mark.parametrize(
    "number", [5_100_015, 6_000_007, 6_000_015], ids=["L1 in a hole", "leaks in holes", "bitmaps"]
)
def test_a_rescue_costs_no_more_where_there_are_millions(number, tmp_path) -> None:
    path = tmp_path / "bomb.qcow2"
    make_bomb(number).write(path)
    with Image.open(str(path)) as image:
        keep_to_the_bounds(partial(rescue, image.source()), RepairError)


def test_tables_of_snapshots_that_lie_over_each_other_are_not_all_read(tmp_path) -> None:
    path = tmp_path / "bomb.qcow2"
    make_bomb(5_100_011).write(path)
    with Image.open(str(path)) as image:
        tracemalloc.start()
        try:
            rescue(image.source())
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 100 << 20


def test_a_hundred_thousand_refcount_blocks_that_are_lost_are_not_asked_about_one_by_one(
    tmp_path, monkeypatch
) -> None:
    asked, ask = [], ClusterIndex.slots_before

    def slots_before(index: ClusterIndex, cluster: int) -> int:
        asked.append(cluster)
        return ask(index, cluster)

    monkeypatch.setattr(ClusterIndex, "slots_before", slots_before)
    path = tmp_path / "bomb.qcow2"
    make_bomb(5_100_017).write(path)
    with Image.open(str(path)) as image:
        source = image.source()
        report = check_image(source)
        assert report.counts()[FindingKind.REFCOUNT_UNREADABLE] > 100_000
        references_past_end(source, report)
    assert len(asked) < 1000


def test_of_refcount_blocks_of_8_million_refcounts_no_more_are_unpacked_than_asked_for(
    tmp_path,
) -> None:
    path = tmp_path / "bomb.qcow2"
    make_blocks(11_000_102).write(path)
    with Image.open(str(path)) as image:
        source = image.source()
        report = check_image(source)
        assert report.geometry.refblock_entries == 1 << 23
        tracemalloc.start()
        try:
            assert refcounts_are_shared(source, report)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 32 << 20


def test_entries_that_read_as_zeros_and_lead_to_refcounts_are_not_looked_up_one_by_one(
    tmp_path, monkeypatch
) -> None:
    path = tmp_path / "bomb.qcow2"
    make_blocks(7).write(path)
    with Image.open(str(path)) as image:
        source = image.source()
        report = check_image(source)
        assert report.counts()[FindingKind.ZERO_MISALIGNED] > 100_000
        reads, read_into = [], FileSource.read_into

        def counted(it: FileSource, offset: int, buffer: memoryview) -> None:
            reads.append(offset)
            read_into(it, offset, buffer)

        monkeypatch.setattr(FileSource, "read_into", counted)
        with contextlib.suppress(RepairError):
            propose(source, report, RepairTier.ALL)
    assert len(reads) < 10_000


def test_a_header_is_looked_for_where_an_l1_table_would_be_all_holes(tmp_path) -> None:
    path = tmp_path / "bomb.qcow2"
    make_bomb(5_100_026).write(path)
    with Image.open(str(path)) as image, contextlib.suppress(RepairError):
        rescue(image.source())


@pytest.mark.parametrize("name", WITHOUT_A_HEADER)
def test_finding_a_header_costs_no_more_on_a_file_that_is_made_for_it(name, tmp_path) -> None:
    path = tmp_path / "bomb"
    WITHOUT_A_HEADER[name]().write(path)
    with Image.open(str(path)) as image:
        keep_to_the_bounds(partial(find_headers, image.source()))


@pytest.mark.parametrize(
    "make",
    [
        tables_that_are_holes,
        partial(tables_of_a_page, are_lost=True),
        partial(tables_of_a_page, are_lost=False),
    ],
    ids=["holes", "lost", "led to"],
)
def test_a_rescue_costs_no_more_where_tables_are_holes_for_the_most(make, tmp_path) -> None:
    path = tmp_path / "bomb.qcow2"
    make().write(path)
    with Image.open(str(path)) as image:
        keep_to_the_bounds(partial(rescue, image.source()), PlannerError)


def test_parting_tables_costs_no_more_however_many_lead_to_one_place(tmp_path) -> None:
    path = tmp_path / "bomb.qcow2"
    one_table_for_all().write(path)
    with Image.open(str(path)) as image:
        source = image.source()
        report = check_image(source)
        keep_to_the_bounds(lambda: propose(source, report, RepairTier.SPLIT), PlannerError)


@pytest.mark.parametrize("cluster_bits", [12, 13, 15, 21])
def test_refcount_blocks_in_holes_are_not_counted_as_clusters(cluster_bits, tmp_path) -> None:
    path = tmp_path / "bomb.qcow2"
    refcount_blocks_in_holes(cluster_bits).write(path)
    with Image.open(str(path)) as image:
        source = image.source()
        keep_to_the_bounds(lambda: assert_answered(check_image(source)))


LEAK_BYTES, LEAKS_BYTES = 24, 24 << 20
"""What looking at a leaked cluster, a plan that frees it, and a rescue may take of memory, and any
number.
"""


def test_leaks_by_the_million_are_looked_at_and_planned_in_bounded_memory(tmp_path) -> None:
    path = tmp_path / "bomb.qcow2"
    leaks_in_holes(b"\xff", 2).write(path)
    with Image.open(str(path)) as image:
        source = image.source()
        report = check_image(source)
        assert report.counters.leaks > 1_000_000
        tracemalloc.start()
        try:
            triage = triage_leaks(source, report)
            assert triage.leaked == report.counters.leaks
            for tier in RepairTier:
                propose(source, report, tier, triage=triage)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < LEAK_BYTES * report.counters.leaks + LEAKS_BYTES


def test_a_rescue_takes_bounded_memory_where_millions_of_clusters_leak(tmp_path) -> None:
    path, blocks = tmp_path / "bomb.qcow2", 4
    leaks_in_holes(b"\xff", blocks).write(path)
    with Image.open(str(path)) as image:
        source = image.source()
        tracemalloc.start()
        try:
            with pytest.raises(PlannerError):
                rescue(source)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < LEAK_BYTES * (blocks << 19) + LEAKS_BYTES
