"""One damaged image, repaired by us and by `qemu-img check -r`, and what QEMU makes of the two.

A repair of ours must never make anything worse: not a counter, not a byte that the guest could
read. Where QEMU reaches clean so must we, but for what `PURPOSES` lists, each with its reason.
Nothing here makes or damages images.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from planner.check.check import check_image
from planner.check.report import Report
from planner.errors import RepairError
from planner.findings.kinds import KINDS, FindingKind, Structure
from planner.qcow2.header import AUTOCLEAR_AT, Autoclear, read_header
from planner.repair.choices import choices_for
from planner.repair.overlay import Overlay
from planner.repair.plan import DETERMINED, RepairTier
from planner.repair.steps import leaked_clusters
from planner.repair.tiers import Proposal, propose, same_outcome
from planner.source import Source, read_bytes
from tests.images.guest_disks import CHUNK, Disks, first_difference
from tests.images.matrix import Row, copy, repair_command
from tests.oracle.judge import EXCEPTIONS, Answer, answer_of, ask_qemu, compare, fingerprint
from tests.oracle.scene import FileSource

COMMAND_SECONDS = 60
QEMU_REPAIR_SECONDS = 20
"""On large sparse files QEMU's repair takes minutes: then there is nothing to compare with."""
BADNESS = {0: 0, 3: 1, 2: 2, 1: 3, 63: 4}
"""Of the exit codes of `qemu-img check`; a signal is worse than all of them."""
DAMAGE_COUNTERS = ("check-errors", "corruptions", "leaks")
NB_SNAPSHOTS_AT = 60
"""Where the header holds nb_snapshots, 4 bytes."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What came of one tier.

    ``faults``: what must not be. ``purposes``: what excuses us where QEMU reached clean and we did
    not. ``unread``: disks that could not be compared.
    """

    tier: RepairTier
    outcome: str
    refusal: str = ""
    faults: tuple[str, ...] = ()
    purposes: tuple[str, ...] = ()
    unread: int = 0

    def __str__(self) -> str:
        shown = [self.outcome, self.refusal, *(f"({name})" for name in self.purposes)]
        lines = [f"  {self.tier}: {' '.join(filter(None, shown))}"]
        return "\n".join([*lines, *(f"    fault: {fault}" for fault in self.faults)])


@dataclass(frozen=True)
class Patient:
    """The damaged image, and what is known of it before any repair."""

    row: Row
    image: Path
    source: Source
    report: Report
    disks: Disks

    @cached_property
    def qemu(self) -> Answer:
        """What QEMU says of it."""
        return ask_qemu(self.row, self.image)

    def beside(self, name: str) -> Path:
        """Another file in its directory: the names in the image lead to the same files there."""
        return self.image.with_name(name)


def judge_repairs(row: Row, image: Path, command: bool = False) -> list[Judgement]:
    """Both tiers, each on a copy; *command* repairs with `instarfs check -r` too."""
    untouched = fingerprint(image)
    with image.open("rb") as file:
        source = FileSource(file.fileno())
        report = check_image(source)
        disks = Disks(row, image, report.snapshots)
        patient = Patient(row, image, source, report, disks)
        judged = [_judge_tier(patient, tier, command) for tier in DETERMINED]
    if fingerprint(image) != untouched:
        judged.append(Judgement(RepairTier.ALL, "planned", faults=("planning changed the file",)))
    return judged


def judge_choices(row: Row, image: Path) -> Iterator[Judgement]:
    """Each tier that a person may choose for an image, of those that may have something to do."""
    with image.open("rb") as file:
        source = FileSource(file.fileno())
        report = check_image(source)
        patient = Patient(row, image, source, report, Disks(row, image, report.snapshots))
        for tier in choices_for(report):
            answer = _answer(patient, tier)
            if isinstance(answer, str):
                yield Judgement(tier, "raised", faults=(answer,))
            elif isinstance(answer, RepairError):
                yield Judgement(tier, "refused", str(answer), tuple(_faults_of_refusal(answer)))
            elif answer.plan.changes_nothing:
                yield Judgement(tier, "nothing to do" if answer.complete else "nothing can be done")
            else:
                faults = (*_faults_of_promise(patient, answer), *_faults_of_result(patient, answer))
                outcome = "done" if answer.complete else "done in part"
                yield Judgement(tier, outcome, "", faults, unread=patient.disks.unread)


def _answer(patient: Patient, tier: RepairTier) -> Proposal | RepairError | str:
    """A proposal, a refusal, or how it failed."""
    try:
        return propose(patient.source, patient.report, tier)
    except RepairError as error:
        return error
    except Exception:  # noqa: BLE001 -- whatever it is, it is a fault of this one case
        return traceback.format_exc()


def _judge_tier(patient: Patient, tier: RepairTier, command: bool) -> Judgement:
    answer = _answer(patient, tier)
    if isinstance(answer, str):
        return Judgement(tier, "raised", faults=(answer,))
    faults: list[str] = []
    unread, refusal = 0, ""
    if isinstance(answer, RepairError):
        refusal = f"{answer.kind} {answer.finding or answer.reason.split(':')[0]}"
        faults += _faults_of_refusal(answer)
    else:
        faults += _faults_of_promise(patient, answer)
        if not answer.plan.changes_nothing:
            faults += _faults_of_result(patient, answer)
            unread = patient.disks.unread
    if command:
        faults += _faults_of_command(patient, tier, answer)
    outcome, lag, purposes = _beside_qemu(patient, tier, answer)
    return Judgement(tier, outcome, refusal, (*faults, *lag), purposes, unread)


# --- our repair alone -------------------------------------------------------------------------


def _faults_of_refusal(error: RepairError) -> Iterator[str]:
    if not error.reason or not (error.wayout or error.finding):
        yield f"a refusal without a reason, a way out or a finding: {error!r}"
    if "and then not proven" in error.reason:
        yield str(error)


def _faults_of_promise(patient: Patient, proposal: Proposal) -> Iterator[str]:
    """What a proposal says of itself must be true of its own proof."""
    after = proposal.after
    if proposal.found != proposal.planned + proposal.left_count:
        yield f"found {proposal.found}: {proposal.planned} planned, {proposal.left_count} left"
    if sum(left.count for left in proposal.left) != proposal.left_count:
        yield f"{proposal.left_count} left, and named: {proposal.left}"
    if not all(left.reason for left in proposal.left):
        yield f"left without a reason: {proposal.left}"
    unclean = after.counters.leaks if proposal.tier is RepairTier.LEAKS else after.exit_code
    if proposal.complete and unclean and not proposal.tier.is_chosen:
        yield f"called complete, and is not: {after.counters}"
    if proposal.plan.changes_nothing and not same_outcome(patient.report, after):
        yield "a plan that changes nothing has another outcome"


def _faults_of_result(patient: Patient, proposal: Proposal) -> Iterator[str]:
    """The repaired file: what QEMU says and reads of it, a second repair, and the way back."""
    repaired, after = patient.beside("repaired.qcow2"), proposal.after
    write_out(Overlay(patient.source, proposal.plan), repaired)
    qemu = ask_qemu(patient.row, repaired)
    yield from faults_of_getting_worse(patient.qemu, qemu, proposal.kept)
    ours = answer_of(after)
    differences = compare(qemu, ours)
    if differences and not any(one.applies(qemu, ours) for one in EXCEPTIONS):
        yield f"the proof is not what QEMU says: {'; '.join(differences)}; QEMU: {qemu}"
    with repaired.open("rb") as file:
        result = FileSource(file.fileno())
        if read_header(result).unknown_autoclear:
            yield "autoclear bits that are not known survive"
        again = check_image(result)
        if not same_outcome(again, after):
            yield f"checked again: {again.counters}, proven: {after.counters}"
        yield from _faults_of_second(result, again, proposal.tier)
        if proposal.tier is RepairTier.ALL:
            yield from faults_of_freeing(result, again)
        at = first_difference(patient.source, Overlay(result, proposal.plan.inverse()))
        if at is not None:
            yield f"the inverse does not restore the bytes at {at}"
    yield from patient.disks.faults_of(repaired)


def faults_of_getting_worse(before: Answer, after: Answer, kept: int = 0) -> Iterator[str]:
    """By what QEMU says: the exit code, and every counter of damage.

    *kept*: so many clusters leak since they are counted again, lest they be overwritten.
    """
    worst = max(BADNESS.get(before.exit_code, 5), BADNESS[3] if kept else 0)
    if BADNESS.get(after.exit_code, 5) > worst:
        yield f"worse: QEMU said {before}; now {after}"
    for name in DAMAGE_COUNTERS if before.counters else ():
        allowed = before.counters[name] + (kept if name == "leaks" else 0)
        if after.counters.get(name, 1) > allowed:
            yield f"worse: {name} was {before.counters[name]}; QEMU now: {after}"


def _faults_of_second(result: Source, report: Report, tier: RepairTier) -> Iterator[str]:
    try:
        again = propose(result, report, tier)
    except Exception:  # noqa: BLE001 -- after a repair that was not refused nothing may go wrong
        yield f"a second repair: {traceback.format_exc()}"
        return
    if not again.plan.changes_nothing:
        stages = [(stage.kind.name, stage.changed_bytes()) for stage in again.plan.stages]
        yield f"a second repair changes {stages}, and the size to {again.plan.size_after}"


def faults_of_freeing(result: Source, report: Report) -> Iterator[str]:
    """What a repair has kept, no other frees that asks nobody; *report* is of its *result*."""
    kept = leaked_clusters(report)
    for tier in DETERMINED if len(kept) else ():
        with contextlib.suppress(RepairError):
            later = propose(result, report, tier)
            freed = np.setdiff1d(kept, leaked_clusters(later.after), assume_unique=True)
            if len(freed) and not later.needs_quote:
                yield f"{tier} frees {len(freed)} clusters unasked, which were kept"


def write_out(source: Source, target: Path) -> None:
    """Make a file of a source, holes and all."""
    with target.open("wb") as file:
        for start, end in source.data_extents(0, source.size):
            for offset in range(start, end, CHUNK):
                part = read_bytes(source, offset, min(CHUNK, end - offset))
                os.pwrite(file.fileno(), part, offset)
        file.truncate(source.size)


# --- our command ------------------------------------------------------------------------------


def _faults_of_command(
    patient: Patient, tier: RepairTier, answer: Proposal | RepairError
) -> Iterator[str]:
    """`instarfs check -r` must do what was proposed, and `instarfs undo` take it back."""
    image = patient.beside("by-command.qcow2")
    image.with_name(f"{image.name}.instarfs-undo").unlink(missing_ok=True)
    copy(patient.image, image)
    repair = ["check", "-q", "-r", tier.value]
    if isinstance(answer, RepairError) or _is_refused_unquoted(answer):
        refused = _run_command(*repair, str(image))
        if refused.returncode not in (1, 63) or not refused.stderr.strip():
            yield f"the command refused with {refused}"
        yield from _faults_of_file("the refused command", image, patient.source)
        if isinstance(answer, RepairError):
            return
    done = _run_command(*repair, "--plan", answer.plan.id, str(image))
    if done.returncode:
        yield f"the command, whose plan was quoted, ended with {done}"
    result = Overlay(patient.source, answer.plan)
    yield from _faults_of_file("the command", image, result)
    if not answer.plan.changes_nothing:
        undone = _run_command("undo", str(image))
        if undone.returncode:
            yield f"undo ended with {undone}"
        yield from _faults_of_file("undo", image, patient.source)


def _is_refused_unquoted(answer: Proposal) -> bool:
    return answer.needs_quote and not answer.plan.changes_nothing


def _run_command(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "instarfs", *words]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=COMMAND_SECONDS
    )


def _faults_of_file(who: str, image: Path, expected: Source) -> Iterator[str]:
    with image.open("rb") as file:
        at = first_difference(FileSource(file.fileno()), expected)
    if at is not None:
        yield f"{who} left other bytes at {at}"


# --- beside QEMU's repair ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lag:
    """One thing that stands between us and clean, where QEMU got there.

    ``kind``: a kind of finding that we left; None where we refused, with ``error``. ``after``: our
    check of what we leave. ``fewer_snapshots``: QEMU's result has lost some. ``despite_bitmaps``:
    QEMU gets there with the bitmaps set aside too, and keeps the snapshots.
    """

    tier: RepairTier
    kind: FindingKind | None
    error: RepairError | None
    before: Report
    after: Report
    is_evidence: bool
    fewer_snapshots: bool
    despite_bitmaps: bool

    def __str__(self) -> str:
        if self.kind is None:
            return f"refused: {self.error}"
        return f"{self.kind.label} ({self.after.counts()[self.kind]}) left"


def _beside_qemu(
    patient: Patient, tier: RepairTier, answer: Proposal | RepairError
) -> tuple[str, list[str], tuple[str, ...]]:
    """The outcome in a word or two, faults, and the names of the purposes that excuse us."""
    refused = isinstance(answer, RepairError)
    after = patient.report if isinstance(answer, RepairError) else answer.after
    if answer_of(after).exit_code == 0:
        return "refused, was clean" if refused else "clean", [], ()
    ours = "refused" if refused else f"exit {after.exit_code}"
    qemu, fewer_snapshots = repair_by_qemu(patient, tier)
    outcome = f"{ours}, qemu exit {qemu.exit_code}"
    if qemu.exit_code != 0:
        return outcome, [], ()
    despite_bitmaps = False
    if _has_bitmaps(patient.report):
        qemu, fewer = repair_by_qemu(patient, tier, bitmaps=False)
        despite_bitmaps = qemu.exit_code == 0 and not fewer
    faults, purposes = [], dict[str, None]()
    for lag in _lags(patient, tier, answer, fewer_snapshots, despite_bitmaps):
        purpose = next((each.name for each in PURPOSES if each.applies(lag)), None)
        if purpose is None:
            faults.append(f"QEMU reached clean, we did not: {lag}")
        else:
            purposes[purpose] = None
    return outcome, faults, tuple(purposes)


def _lags(
    patient: Patient,
    tier: RepairTier,
    answer: Proposal | RepairError,
    fewer_snapshots: bool,
    despite_bitmaps: bool,
) -> Iterator[Lag]:
    before, of_qemu = patient.report, (fewer_snapshots, despite_bitmaps)
    if isinstance(answer, RepairError):
        yield Lag(tier, None, answer, before, before, False, *of_qemu)
        return
    after, is_evidence = answer.after, answer.triage.is_evidence
    for kind in after.counts():
        if KINDS[kind].counted:
            yield Lag(tier, kind, None, before, after, is_evidence, *of_qemu)


def repair_by_qemu(
    patient: Patient, tier: RepairTier, *, bitmaps: bool = True
) -> tuple[Answer, bool]:
    """What QEMU says of its own repair, and whether snapshots are gone.

    Without *bitmaps* they are made void first, so that QEMU does not store them anew.
    """
    image = patient.beside("by-qemu.qcow2")
    copy(patient.image, image)
    if not bitmaps:
        with image.open("r+b") as file:
            features = int.from_bytes(os.pread(file.fileno(), 8, AUTOCLEAR_AT), "big")
            void = (features & ~Autoclear.BITMAPS).to_bytes(8, "big")
            os.pwrite(file.fileno(), void, AUTOCLEAR_AT)
    try:
        subprocess.run(
            repair_command(patient.row, image, tier.value),
            check=False,
            capture_output=True,
            cwd=image.parent,
            timeout=QEMU_REPAIR_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return Answer(1, stderr="QEMU's repair did not end"), False
    with image.open("rb") as file:
        left = int.from_bytes(os.pread(file.fileno(), 4, NB_SNAPSHOTS_AT), "big")
    named = read_bytes(patient.source, NB_SNAPSHOTS_AT, 4)
    return ask_qemu(patient.row, image), left < int.from_bytes(named, "big")


# --- what we leave on purpose -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Purpose:
    """Something that QEMU makes clean and we leave: when, and why."""

    name: str
    reason: str
    applies: Callable[[Lag], bool]


_COPIED = (FindingKind.L1_COPIED, FindingKind.L2_COPIED)
_REFCOUNTS = (FindingKind.REFCOUNT_MISSING, FindingKind.REFCOUNT_LOW, FindingKind.LEAK)
_OF_BITMAPS = {Structure.BITMAP_DIRECTORY, Structure.BITMAP_TABLE, Structure.BITMAP_DATA}
_REFCOUNT_STRUCTURE = {Structure.REFTABLE, Structure.REFBLOCK}
_BY_REFCOUNTS = (
    FindingKind.REFCOUNT_UNREADABLE,
    FindingKind.REFCOUNT_OVERFLOW,
    FindingKind.REFCOUNT_MISSING,
    FindingKind.REFCOUNT_LOW,
    FindingKind.LEAK,
    FindingKind.REFTABLE_ENTRY_RESERVED,
    FindingKind.REFBLOCK_MISALIGNED,
    FindingKind.REFBLOCK_PAST_END,
    FindingKind.REFBLOCK_SHARED,
    FindingKind.PAST_END,
    FindingKind.ZERO_MISALIGNED,
    FindingKind.SNAPSHOT_EXTRA_DATA,
)
"""What lies in the refcount structure, or cannot be mended without changing a refcount."""


def _sharing(report: Report) -> Iterator[set[Structure]]:
    """Which structures are in each cluster with two owners."""
    bits = report.geometry.cluster_bits
    for offset in report.findings.of(FindingKind.MULTIPLE_OWNERS).host_offset.tolist():
        yield {owner.structure for owner in report.owners.of(offset >> bits)}


def _refcounts_share_a_cluster(report: Report) -> bool:
    """Whether something else lies where a refcount table or block does."""
    return any(
        owners & _REFCOUNT_STRUCTURE and owners - _REFCOUNT_STRUCTURE for owners in _sharing(report)
    )


def _entries_share_a_cluster(report: Report) -> bool:
    """Whether an L1 or L2 table lies in a cluster with two owners."""
    return any(owners & {Structure.L1_TABLE, Structure.L2_TABLE} for owners in _sharing(report))


def _flags_share_a_cluster(lag: Lag) -> bool:
    """Whether every wrong flag that is left lies in a cluster with two owners."""
    if lag.kind not in _COPIED:
        return False
    bits = lag.after.geometry.cluster_bits
    contested = lag.after.findings.of(FindingKind.MULTIPLE_OWNERS).host_offset >> bits
    wrong = [row.host_offset >> bits for row in lag.after.rows(lag.kind)]
    return bool(np.isin(wrong, contested).all())


def _growth_would_hide_loss(lag: Lag) -> bool:
    refused = lag.error is not None and lag.error.finding == FindingKind.PAST_END.label
    return refused or bool({FindingKind.PAST_END, FindingKind.CUT_OFF} & lag.before.counts().keys())


def _table_is_cut(lag: Lag) -> bool:
    return lag.error is not None and lag.error.finding == FindingKind.CUT_OFF.label


def _snapshots_would_be_cut(lag: Lag) -> bool:
    of_table = {FindingKind.CHECK_STOPPED.label, FindingKind.SNAPSHOT_EXTRA_DATA.label}
    return lag.error is not None and lag.error.finding in of_table


def _has_bitmaps(report: Report) -> bool:
    return bool((report.regions.structure == Structure.BITMAP_DIRECTORY).any())


def _bitmaps_are_damaged(report: Report) -> bool:
    """Whether something is wrong with them or their refcounts, or lies where one does."""
    structures = {structure for _, structure in report.findings.groups}
    if structures & _OF_BITMAPS or _bitmaps_share_a_cluster(report):
        return True
    bits = report.geometry.cluster_bits
    bitmaps = report.regions.select(np.isin(report.regions.structure, list(_OF_BITMAPS)))
    spans = zip(bitmaps.first(bits).tolist(), bitmaps.last(bits).tolist(), strict=True)
    return report.mismatches is not None and any(
        len(report.mismatches.between(first, last + 1)[0]) for first, last in spans
    )


def _bitmaps_share_a_cluster(report: Report) -> bool:
    return any(owners & _OF_BITMAPS for owners in _sharing(report))


def _snapshots_are_deleted(lag: Lag) -> bool:
    """Clean only because of that, or because damaged bitmaps went with them."""
    spared = lag.despite_bitmaps and not _bitmaps_are_damaged(lag.before)
    return lag.fewer_snapshots and not spared


def _bitmaps_are_in_the_way(lag: Lag) -> bool:
    """For `all`, whether one shares a cluster; for `leaks`, whether QEMU is clean only with them.

    Damaged bitmaps that are set aside are leaks to QEMU, and no damage any more. Set aside or not,
    for them it writes the header anew, where a snapshot table without entries then has no place.
    """
    if lag.tier is RepairTier.ALL or not _has_bitmaps(lag.before):
        return _bitmaps_share_a_cluster(lag.before)
    by_header = lag.kind is FindingKind.CHECK_STOPPED and all(
        error.field == "snapshots_offset" for error in lag.after.stopped
    )
    return not lag.despite_bitmaps or by_header or _bitmaps_are_damaged(lag.before)


def _header_is_contested(lag: Lag) -> bool:
    found = lag.before.findings.of(FindingKind.MULTIPLE_OWNERS).host_offset
    return lag.error is not None and bool((found == 0).any())


PURPOSES: tuple[Purpose, ...] = (
    Purpose(
        "snapshots-deleted",
        "QEMU deleted the snapshots of an image with bitmaps: clean, and the loss is for good.",
        _snapshots_are_deleted,
    ),
    Purpose(
        "bitmaps-rewritten",
        "QEMU stored the bitmaps anew while it had the image open, which nobody asked for.",
        _bitmaps_are_in_the_way,
    ),
    Purpose(
        "header-shared",
        "Something else refers to the header's cluster: a write there may change what that holds.",
        _header_is_contested,
    ),
    Purpose(
        "refcounts-shared",
        "Something else refers to a cluster of refcounts, and none can be made anew elsewhere.",
        lambda lag: lag.kind in _BY_REFCOUNTS and _refcounts_share_a_cluster(lag.after),
    ),
    Purpose(
        "flags-shared",
        "A wrong COPIED flag lies in a cluster with two owners: it may be the other's data.",
        _flags_share_a_cluster,
    ),
    Purpose(
        "lost-among-leaks",
        "Leaked clusters look like a lost table: `leaks` frees them, when its plan is quoted.",
        lambda lag: lag.tier is RepairTier.ALL and lag.kind is FindingKind.LEAK and lag.is_evidence,
    ),
    Purpose(
        "refcounts-of-flags-shared",
        "The refcount of what a COPIED flag is about cannot be mended where the flag must not be.",
        lambda lag: lag.kind in _REFCOUNTS and _entries_share_a_cluster(lag.after),
    ),
    Purpose(
        "table-cut",
        "The file ends in a table: what its lost entries led to looks leaked, and is evidence.",
        _table_is_cut,
    ),
    Purpose(
        "past-end-not-grown",
        "The image refers to what lies past its end; if it grew, what is lost would seem there.",
        _growth_would_hide_loss,
    ),
    Purpose(
        "snapshots-cut",
        "Cut off the snapshot table, nothing would show that what then leaks is a lost snapshot.",
        _snapshots_would_be_cut,
    ),
)
