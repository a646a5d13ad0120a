"""Every crash of every repair of the corpus, replayed: nothing is lost, and there is a way on.

What a crash leaves is made in `replay`, what must hold of it stands in `judge`.
"""

import json
import random
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from instarfs.image.directory import SUFFIX
from instarfs.image.file import Image
from instarfs.repair.execute import take_back
from instarfs.repair.journal import BODY_AT, SLOTS_AT, Record, State, digest_of, encode_slot
from instarfs.repair.outcome import RepairOutcome
from instarfs.repair.run import Repairer
from instarfs.repair.undo_place import Identity
from planner.arrays import U8
from planner.errors import RepairError
from planner.findings.kinds import KINDS, FindingKind
from planner.repair.draft import Draft
from planner.repair.overlay import Overlay
from planner.repair.plan import Plan, RepairTier, StageKind
from planner.repair.steps import leaked_clusters
from planner.source import SECTOR, Bytes, read_bytes
from tests.cached import cached_check, cached_propose, check_bytes, propose_bytes
from tests.crash.corpus import GROUPS, Case, cases
from tests.crash.guest import disks
from tests.crash.judge import Original, faults
from tests.crash.replay import Crash, crashes, record
from tests.devices import MemoryDevice
from tests.images.builder import Image as Made
from tests.undo_files import encoded, stack_of

SHARE = 6
"""Of a group, every sixth case is also played further: on real files, with a second crash."""

ASKED = 4
"""Crashes of a case that QEMU is asked about, and from which taking back crashes too."""


def carried_out(content: bytes, plan: Plan) -> bytes:
    return read_bytes(Overlay(Bytes(content), plan), 0, plan.size_after)


def crashes_of(content: bytes, plan: Plan) -> Iterator[Crash]:
    yield from crashes(content, record(content, plan), random.Random(plan.id))


def share_of(group: str) -> tuple[Case, ...]:
    """Of each group others: they are of the same kinds, in the same order."""
    return cases(group)[GROUPS.index(group) % SHARE :: SHARE]


def some(crashes: list[Crash]) -> list[Crash]:
    return crashes[1 :: max(1, len(crashes) // ASKED)]


def prefixes_of(case: Case) -> list[Crash]:
    every = crashes_of(case.content, case.proposal.plan)
    return [crash for crash in every if crash.is_prefix]


# ---- the corpus ----


def test_the_corpus_has_every_planner_and_every_stage() -> None:
    every = [case for group in GROUPS for case in cases(group)]
    assert len({case.content for case in every}) >= 40
    plans = [case.proposal.plan for case in every]
    assert {stage.kind for plan in plans for stage in plan.stages} == set(StageKind)
    assert {plan.tier for plan in plans} == set(RepairTier)
    assert any(plan.size_after > plan.size_before for plan in plans)
    # Within a stage there must be something to tear.
    assert sum(max(len(stage.sectors) for stage in plan.stages) > 6 for plan in plans) >= 10
    mended = set()
    for case in every:
        before, after = case.proposal.before.counts(), case.proposal.after.counts()
        mended |= {kind for kind, number in before.items() if after.get(kind, 0) < number}
    assert mended >= {kind for kind, info in KINDS.items() if info.tier}


# ---- every crash ----


@pytest.mark.parametrize("group", GROUPS)
def test_no_crash_of_a_repair_costs_anything(group: str) -> None:
    found = []
    for case in cases(group):
        original = Original.of(case.content, case.proposal.plan)
        for crash in crashes_of(case.content, case.proposal.plan):
            found += [f"{case.name}: {crash.where}: {each}" for each in faults(original, crash)]
    assert found == []


@pytest.mark.parametrize("group", GROUPS)
def test_no_crash_of_an_undo_costs_anything(group: str) -> None:
    found = []
    for case in share_of(group):
        plan = case.proposal.plan
        original = Original.of(case.content, plan)
        for crash in crashes_of(carried_out(case.content, plan), plan.inverse()):
            found += [f"{case.name}: {crash.where}: {each}" for each in faults(original, crash)]
    assert found == []


@pytest.mark.parametrize("group", GROUPS)
def test_no_second_crash_while_a_repair_is_taken_back_costs_anything(group: str) -> None:
    found = []
    for case in share_of(group):
        plan = case.proposal.plan
        original = Original.of(case.content, plan)
        for first in some(prefixes_of(case)):
            device = MemoryDevice(bytearray(first.content))
            take_back(device, plan)
            for crash in crashes(first.content, device.log, random.Random(1)):
                found += [f"{case.name}: {first.where}: {each}" for each in faults(original, crash)]
    assert found == []


# ---- the way on, on real files ----


class Files:
    """An image and its undo file as a crash left them."""

    def __init__(self, directory: Path, case: Case) -> None:
        self.path = directory / "disk.qcow2"
        self.undo_path = directory / ("disk.qcow2" + SUFFIX)
        self._case = case
        head = digest_of(case.content[:SECTOR])
        counters = case.proposal.before.counters
        self.record = Record(case.proposal.plan, head, counters, Identity(0, 0))
        self.journal = encoded(self.record)

    def put(self, content: bytes, journal: bytes | None) -> None:
        self.path.write_bytes(content)
        self.undo_path.unlink(missing_ok=True)
        if journal is not None:
            self.undo_path.write_bytes(journal)
            self.undo_path.chmod(0o600)

    def repair(self, tier: RepairTier, quote: str) -> RepairOutcome:
        with Image.open(str(self.path)) as image:
            repairer = Repairer(image, check=cached_check, propose=cached_propose)
            return repairer.repair(tier, quote)

    def undo(self) -> RepairOutcome:
        with Image.open(str(self.path)) as image:
            return Repairer(image, check=cached_check).undo()


@pytest.mark.parametrize("group", GROUPS)
def test_the_next_repair_takes_a_crash_back_and_comes_to_the_same_end(
    group: str, tmp_path: Path
) -> None:
    for case in share_of(group):
        plan, files = case.proposal.plan, Files(tmp_path, case)
        end = carried_out(case.content, plan)
        for crash in prefixes_of(case):
            files.put(crash.content, files.journal)
            outcome = files.repair(case.tier, plan.id)
            assert outcome.recovered
            assert (outcome.repaired, outcome.plan_id) == (case.proposal.planned, plan.id)
            assert files.path.read_bytes() == end
            assert files.undo().error is None
            assert files.path.read_bytes() == case.content


@pytest.mark.parametrize("group", GROUPS)
def test_a_crash_while_the_state_is_written_leaves_a_way_on_and_a_way_back(
    group: str, tmp_path: Path
) -> None:
    for case in share_of(group):
        plan, files = case.proposal.plan, Files(tmp_path, case)
        end = carried_out(case.content, plan)
        word = replace(stack_of(files.record)[-1], state=State.APPLIED, sequence=1)
        applied = encode_slot(word)
        for length in (0, 8, 9, 21, 50, SECTOR):
            at = SLOTS_AT + SECTOR
            torn = files.journal[:at] + applied[:length] + files.journal[at + length :]
            assert len(torn) == len(files.journal) > BODY_AT
            files.put(end, torn)
            outcome = files.undo()
            assert outcome.error is None
            assert files.path.read_bytes() == case.content
            files.put(end, torn)
            outcome = files.repair(case.tier, "")
            if outcome.recovered and case.proposal.needs_quote:
                outcome = files.repair(case.tier, plan.id)
            assert files.path.read_bytes() == end


@pytest.mark.parametrize("group", GROUPS)
def test_without_its_undo_file_a_crash_is_mended_as_well_as_the_image_could_be(group: str) -> None:
    for case in share_of(group):
        wanted = kinds_left(case.content)
        if wanted is None:
            continue
        guest = disks(case.content)
        for crash in some(prefixes_of(case)):
            proposal = propose_bytes(crash.content, RepairTier.ALL)
            left = kinds_left(crash.content)
            assert left is not None, f"{case.name}: {crash.where}"
            # Less, where what was freed as somebody asked for is not freed unasked; but what the
            # repair had ceased to refer to may look like something lost, and leaks until asked.
            more = {kind for kind, number in left.items() if number > wanted.get(kind, 0)}
            if not leaks_of_nobody(case.content, crash.content):
                more -= {FindingKind.LEAK}
            assert not more, f"{case.name}: {crash.where}"
            now = disks(carried_out(crash.content, proposal.plan))
            for name, disk in guest.items():
                assert disk.items() <= now[name].items(), f"{case.name}: {crash.where}"


def leaks_of_nobody(before: bytes, after: bytes) -> list[int]:
    """Clusters that leak *after*, and neither leaked nor had an owner *before*."""
    was, now = check_bytes(before), check_bytes(after)
    new = np.setdiff1d(leaked_clusters(now), leaked_clusters(was))
    assert was.mismatches is not None
    found: list[int] = new[was.mismatches.count_references(new) == 0].tolist()
    return found


def kinds_left(content: bytes) -> dict[FindingKind, int] | None:
    """What `all` leaves; None where it refuses.

    Not counted is the corrupt bit: nobody knows any more that it was the repair that set it, so
    that it stays with whatever else does.
    """
    try:
        left = propose_bytes(content, RepairTier.ALL).left
    except RepairError:
        return None
    return {each.kind: each.count for each in left if each.kind is not FindingKind.CORRUPT_BIT}


# ---- QEMU's own opinion ----


def qemu_reads(path: Path, raw: Path) -> bytes | None:
    """The guest's disk as QEMU reads it; None where it cannot."""
    command = ["qemu-img", "convert", "-O", "raw", str(path), str(raw)]
    if subprocess.run(command, capture_output=True, check=False, timeout=60).returncode:
        return None
    return raw.read_bytes()


def qemu_checks(path: Path) -> dict[str, int] | None:
    """The counters of `qemu-img check`; None where it does not come to an end."""
    command = ["qemu-img", "check", "--output=json", str(path)]
    done = subprocess.run(command, capture_output=True, check=False, timeout=60)
    return json.loads(done.stdout) if done.stdout.strip() else None


@pytest.mark.parametrize("group", [group for group in GROUPS if group != "data file"])
def test_qemu_opens_what_a_crash_leaves_and_reads_the_same(group: str, tmp_path: Path) -> None:
    path, raw = tmp_path / "disk.qcow2", tmp_path / "disk.raw"
    for case in share_of(group)[:2]:
        path.write_bytes(case.content)
        checked, reads = qemu_checks(path), qemu_reads(path, raw)
        every = list(crashes_of(case.content, case.proposal.plan))
        for crash in some(every):
            path.write_bytes(crash.content)
            if checked is not None:
                assert qemu_checks(path) is not None, f"{case.name}: {crash.where}"
            if reads is not None:
                assert qemu_reads(path, raw) == reads, f"{case.name}: {crash.where}"


# ---- the judge ----


def all_at_once(plan: Plan) -> Plan:
    """The same repair without an order: everything in one stage."""
    first: dict[int, U8] = {}
    last: dict[int, U8] = {}
    for stage in plan.stages:
        for at, sector in enumerate(stage.sectors.tolist()):
            first.setdefault(sector, stage.before[at])
            last[sector] = stage.after[at]
    sectors = sorted(first)
    stage = replace(
        plan.stages[0],
        kind=StageKind.CORRECT,
        sectors=np.array(sectors),
        before=np.array([first[sector] for sector in sectors]),
        after=np.array([last[sector] for sector in sectors]),
    )
    return replace(plan, stages=(stage,))


def test_the_judge_notices_a_repair_without_an_order() -> None:
    [case] = [each for each in cases("version 2") if "everything" in each.name]
    plan = all_at_once(case.proposal.plan)
    assert carried_out(case.content, plan) == carried_out(case.content, case.proposal.plan)
    original = Original.of(case.content, plan)
    every = crashes_of(case.content, plan)
    found = [each for crash in every for each in faults(original, crash)]
    assert any("went from" in each for each in found)


def test_the_judge_notices_a_write_to_guest_data() -> None:
    case = cases("damages")[0]
    image = Made(bytearray(case.content))
    draft = Draft(Bytes(case.content))
    draft.write(StageKind.CORRECT, image.host_offset(image.mapped(0)[0]), b"not the guest's")
    plan = draft.plan(RepairTier.ALL)
    crash = Crash(carried_out(case.content, plan), "", is_prefix=True)
    found = list(faults(Original.of(case.content, plan), crash))
    assert any("guest cluster" in each for each in found)


def test_the_judge_notices_an_undo_file_that_lacks_a_sector() -> None:
    case = next(each for each in cases("plain") if len(each.proposal.plan.stages) > 1)
    plan = case.proposal.plan
    crash = Crash(carried_out(case.content, plan), "", is_prefix=True)
    shorter = replace(plan, stages=plan.stages[:-2])
    with pytest.raises(AssertionError):
        assert list(faults(Original.of(case.content, shorter), crash)) == []


def test_the_judge_notices_a_flag_that_lets_a_guest_write_to_shared_data() -> None:
    [case] = [each for each in cases("plain") if "copied" in each.name]
    assert check_bytes(case.content).counters.corruptions
    mended = carried_out(case.content, case.proposal.plan)
    draft = Draft(Bytes(mended))
    draft.write(StageKind.CORRECT, 0, case.content)
    plan = draft.plan(RepairTier.ALL)
    found = list(faults(Original.of(mended, plan), Crash(case.content, "", is_prefix=True)))
    assert any("other users" in each for each in found)
