"""One repair, from a tier to its outcome; and taking it back, and giving free space back.

The order of things is here: an interrupted repair taken back, a fresh check, the proposal, the undo
file, the writing, the check again. What to write is decided in `planner.repair`; the locks and the
undo file are kept in `instarfs.repair.writing`; `instarfs.repair.execute` writes. Nothing here is
rendered.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from instarfs.errors import (
    DOMAIN_ERRORS,
    ImageChanged,
    ImageReadFailed,
    InstarfsError,
    NotEnoughMemory,
    PlanStale,
    PutBackFailed,
    RepairCancelled,
    RepairIncomplete,
    RepairInterrupted,
    RepairUnproven,
    RescueNeedsUndo,
    RescueUnquoted,
    TrimRefused,
    TrimUnsupported,
    TrimWouldBury,
    UndoFileAmbiguous,
    UndoFileDamaged,
    UndoFileFailed,
    UndoFileImpossible,
    UndoFileNoSpace,
    UndoStale,
)
from instarfs.image.file import Image
from instarfs.repair.checking import run_check
from instarfs.repair.execute import Device, FileDevice, execute, punch, put_back
from instarfs.repair.journal import State, StateWord
from instarfs.repair.outcome import RepairOutcome, Status
from instarfs.repair.trim import free_runs, held_within, table_of, used_clusters
from instarfs.repair.writing import Session
from planner.arrays import I64, distinct
from planner.check.check import check_image
from planner.check.report import Report
from planner.errors import AmbiguousCorruption, Cancelled, PlannerError, as_value
from planner.progress import Progress, tell_nobody
from planner.repair.plan import ID_LENGTH, SHORTEST_QUOTE, Plan, RepairTier, RescueTier
from planner.repair.tiers import Proposal, propose, same_outcome, total
from planner.source import SECTOR, Source
from planner.triage.free_tables import find_free_tables

if TYPE_CHECKING:  # it reads file systems: whoever repairs alone does not load it
    from planner.rescue.rescue import Rescue


class Check(Protocol):
    """`planner.check.check.check_image`."""

    def __call__(
        self,
        source: Source,
        *,
        progress: Progress,
    ) -> Report: ...


class Propose(Protocol):
    """`planner.repair.tiers.propose`."""

    def __call__(
        self,
        source: Source,
        report: Report,
        tier: RepairTier,
        *,
        can_grow: bool,
        progress: Progress,
    ) -> Proposal: ...


class FindRescue(Protocol):
    """`planner.rescue.rescue.rescue`, with what its caller knows."""

    def __call__(self, source: Source, *, can_grow: bool, progress: Progress) -> Rescue: ...


@dataclass(frozen=True, slots=True)
class Repairer:
    """Repairs one image. Each method is one pass, runs in the calling thread, and never raises an
    error that it can explain: it is in the outcome.

    Without *keep_undo* nothing can be taken back once the repair stands, neither this one nor those
    before it; and where no undo file can be made the repair goes on without: then an I/O error is
    still rolled back, but not a crash or a power failure in the middle. *progress*: of every check
    and of the writing; whatever it raises, what was written by then is rolled back.
    """

    image: Image
    keep_undo: bool = True
    progress: Progress = tell_nobody
    check: Check = check_image
    propose: Propose = propose
    device: Callable[[int, str], Device] = FileDevice

    def repair(self, tier: RepairTier, quote: str = "") -> RepairOutcome:
        """Repair as far as *tier* goes; with *quote*, exactly the plan of that id or nothing."""
        return self._run(
            RepairOutcome(tier=tier), lambda work, session: work.repair(session, tier, quote)
        )

    def rescue(self, quote: str, find: FindRescue) -> RepairOutcome:
        """Bring back what *find* finds lost: exactly the plan of the id *quote*, or nothing."""
        outcome = RepairOutcome(tier=RescueTier.RESCUE)
        return self._run(outcome, lambda work, session: work.rescue(session, quote, find))

    def undo(self) -> RepairOutcome:
        """Take the last repair back, byte for byte; or finish taking back an interrupted one."""
        return self._run(RepairOutcome(), _Pass.undo)

    def trim(self, quote: str = "") -> RepairOutcome:
        """Give the disk space of all free clusters back, for good.

        Of clusters that look like what was lost only with *quote*, which the refusal tells.
        """
        return self._run(RepairOutcome(), lambda work, session: work.trim(session, quote))

    def _run(self, outcome: RepairOutcome, job: Callable[[_Pass, Session], None]) -> RepairOutcome:
        work = _Pass(self, outcome)
        try:
            with Session.open(self.image, self.device, work.check) as session:
                try:
                    job(work, session)
                finally:
                    work.count_undoable(session)
        except Cancelled:
            work.fail(RepairCancelled(self.image.path))
        except MemoryError:
            work.fail(NotEnoughMemory(self.image.path))
        except DOMAIN_ERRORS as error:
            work.fail(as_value(error))
        return work.outcome


@dataclass(frozen=True, slots=True)
class _Proven:
    """What is written: a plan, the check that it was made from, and that of its overlay."""

    plan: Plan
    before: Report
    after: Report

    @classmethod
    def of(cls, proposal: Proposal) -> _Proven:
        return cls(proposal.plan, proposal.before, proposal.after)


PUT_BACK = "the repair was taken back, and the image is as it was before it: "
"""Of a repair that was written, whole, but could not be recorded."""


class _Pass:
    """One pass over an image that is open for writing, and what has become of it so far."""

    def __init__(self, repairer: Repairer, outcome: RepairOutcome) -> None:
        self._repairer = repairer
        self._path = repairer.image.path
        self._is_writing = False
        self.outcome = outcome

    def check(self, source: Source) -> Report:
        return self._repairer.check(source, progress=self._repairer.progress)

    def fail(self, error: InstarfsError | PlannerError) -> None:
        """Put *error* into the outcome: nothing that was asked for was done."""
        status, after = Status.REFUSED, self.outcome.before
        if isinstance(error, PutBackFailed):
            status, after = Status.INTERRUPTED, None
        elif self._is_writing and not isinstance(error, ImageChanged):
            status = Status.ROLLED_BACK
        if isinstance(error, UndoStale):
            self.outcome = replace(self.outcome, undoable=0)
        self.outcome = replace(
            self.outcome,
            status=status,
            left_count=total(after) if after else 0,
            after=after,
            reason=str(error),
            error=error,
        )

    def count_undoable(self, session: Session) -> None:
        """How many repairs can be taken back now; after an undo that is known better."""
        if self.outcome.status is Status.UNDONE:
            return
        with suppress(Cancelled, ImageReadFailed, UndoFileDamaged):  # then nobody knows of any
            self.outcome = replace(self.outcome, undoable=session.count_undoable())

    # ---- repair ----

    def repair(self, session: Session, tier: RepairTier, quote: str) -> None:
        if self._recover(session):
            session.drop_journal()
        report = self._fresh_check(session)
        proposal = self._repairer.propose(
            session.source,
            report,
            tier,
            can_grow=not session.image.is_device,
            progress=self._repairer.progress,
        )
        plan = proposal.plan
        self.outcome = replace(
            self.outcome,
            plan_id=plan.id,
            found=proposal.found,
            planned=proposal.planned,
            suspects=proposal.suspects,
            suspect_count=proposal.triage.suspect_count,
        )
        self._require_quote(proposal, quote)
        after = report if plan.changes_nothing else self._write(session, _Proven.of(proposal))
        if proposal.tier.is_chosen and not plan.changes_nothing:
            self._add_reason("; ".join(proposal.notes))
        self.outcome = replace(
            self.outcome,
            status=Status.NOTHING_TO_DO if plan.changes_nothing else Status.REPAIRED,
            repaired=proposal.planned,
            left_count=proposal.left_count,
            left=proposal.left,
            counters=proposal.counters,
            shares=proposal.shares,
            after=after,
        )
        if not proposal.complete:
            error = RepairIncomplete(self._path, proposal.found, proposal.left_count)
            self.outcome = replace(
                self.outcome,
                status=Status.INCOMPLETE,
                reason=str(error),
                # Whoever quotes a plan asks for no more than what is in it.
                error=None if quote else error,
            )

    def _fresh_check(self, session: Session) -> Report:
        """The check that everything else follows from. Raises its error where it has one."""
        # It is locked, so that whoever writes keeps no locks: the image's times tell of that.
        checked = run_check(session.image, self.check, is_written=lambda: False)
        report = checked.report
        number = total(report)
        self.outcome = replace(
            self.outcome, before=report, after=report, found=number, left_count=number
        )
        if report.error is not None:
            raise report.error
        return report

    def _require_quote(self, proposal: Proposal, quote: str) -> None:
        plan = proposal.plan
        if quote:
            self._require_quoted(plan, quote)
        if proposal.needs_quote and not quote and not plan.changes_nothing:
            raise AmbiguousCorruption(
                "; ".join(proposal.warnings),
                f"if that is to be done all the same, quote the plan: {plan.tier} {plan.id}"
                f" (check -r {plan.tier} --plan {plan.id})",
            )

    def _require_quoted(self, plan: Plan, quote: str) -> None:
        if not plan.is_quoted_by(quote):
            raise PlanStale(self._path, quote, plan.id)

    # ---- rescue ----

    def rescue(self, session: Session, quote: str, find: FindRescue) -> None:
        if self._recover(session):
            session.drop_journal()
        image = session.image
        known = image.generation()
        found = find(session.source, can_grow=not image.is_device, progress=self._repairer.progress)
        if image.generation() != known:
            raise ImageChanged(self._path, "it was written to while it was looked at")
        plan, before, left = found.plan, found.before, total(found.after)
        self.outcome = replace(
            self.outcome,
            plan_id=plan.id,
            before=before,
            found=found.count + left,
            planned=found.count,
        )
        after, status = before, Status.NOTHING_TO_DO
        if not plan.changes_nothing:
            if not quote:
                raise RescueUnquoted(self._path, plan.id)
            self._require_quoted(plan, quote)
            after = self._write_rescue(session, _Proven(plan, before, found.after))
            status = Status.REPAIRED
        self.outcome = replace(
            self.outcome, status=status, repaired=found.count, left_count=left, after=after
        )

    def _write_rescue(self, session: Session, proven: _Proven) -> Report:
        try:
            return self._write(session, proven)
        except (UndoFileAmbiguous, UndoFileNoSpace):
            raise
        except UndoFileImpossible as error:
            raise RescueNeedsUndo(error.undo_file, error.reason) from error

    # ---- writing ----

    def _write(self, session: Session, proposal: _Proven) -> Report:
        """Carry the plan out and prove it again; or leave everything as it was, and raise."""
        try:
            session.start_journal(proposal.plan, proposal.before, proposal.after)
        except UndoFileImpossible:
            if self._repairer.keep_undo:
                raise
            session.go_without_journal()
        self._is_writing = True
        try:
            execute(
                session.device,
                proposal.plan,
                progress=self._repairer.progress,
            )
            after = self._proven(session, proposal)
        except BaseException as error:
            # What could not be flushed may read as put back, and is not: then the undo file stays.
            if not isinstance(error, PutBackFailed):
                session.withdraw()
            elif not session.is_interrupted:
                error.wayout = "no undo file was kept: export the disk (instarfs export)"
            raise
        self._is_writing = False
        session.settle(keep_undo=self._repairer.keep_undo)
        self.outcome = replace(
            self.outcome,
            undo_file=session.undo_file if session.is_recorded else "",
            stale=session.stale_count if session.is_recorded else 0,
        )
        return after

    def _proven(self, session: Session, proposal: _Proven) -> Report:
        """The check of the image as it was written, which must be the proof."""
        try:
            after = self.check(session.source)
            self._require_same(after, proposal.after)
            session.stand()
        except BaseException as error:
            put_back(session.device, proposal.plan, error)
            if isinstance(error, UndoFileFailed):
                error.done = PUT_BACK
            raise
        return after

    def _require_same(self, after: Report, proof: Report) -> None:
        if not same_outcome(after, proof):
            raise RepairUnproven(self._path)

    # ---- undo ----

    def undo(self, session: Session) -> None:
        if self._recover(session):
            try:
                session.drop_journal()
            except UndoFileFailed as error:  # the image has been put back all the same
                self.outcome = replace(self.outcome, reason=str(error))
        else:
            self._undo_applied(session)
        self.outcome = replace(self.outcome, status=Status.UNDONE)
        # It is undone, whether somebody still waits for the check or not, and if that fails.
        try:
            self._tell_what_is_left(session)
            after = self.check(session.source)
        except Cancelled:
            return
        except ImageReadFailed as error:
            self._add_reason(f"it could not be checked after that: {error}")
            return
        number = total(after)
        self.outcome = replace(self.outcome, after=after, found=number, left_count=number)

    def _tell_what_is_left(self, session: Session) -> None:
        """How many repairs more can be taken back; or why those that are kept cannot."""
        if session.journal is None or session.is_interrupted:
            return
        undoable, reason = 0, ""
        if session.journal.status.state is State.SEALED:
            reason = "the repair before was made with --no-undo: it cannot be taken back"
        elif session.is_recorded:
            try:
                undoable = session.count_undoable()
            except (ImageReadFailed, UndoFileDamaged) as error:
                reason = f"the repair before cannot be taken back: {error}"
            else:
                if not undoable:
                    reason = "the repair before stays: the image was written to after it"
        self.outcome = replace(self.outcome, undoable=undoable)
        self._add_reason(reason)

    def _add_reason(self, reason: str) -> None:
        reasons = [each for each in (self.outcome.reason, reason) if each]
        self.outcome = replace(self.outcome, reason="; ".join(reasons))

    def _recover(self, session: Session) -> bool:
        recovered = session.recover()
        self.outcome = replace(self.outcome, recovered=recovered)
        return recovered

    def _undo_applied(self, session: Session) -> None:
        journal, _ = session.undoable()
        plan, status = journal.plan, journal.status
        self.outcome = replace(
            self.outcome, tier=plan.tier, plan_id=plan.id, undo_file=journal.file
        )
        journal.advance(State.APPLYING)
        self._is_writing = True
        try:
            execute(
                session.device,
                plan.inverse(),
                progress=self._repairer.progress,
            )
        except BaseException as error:
            if not isinstance(error, PutBackFailed):
                session.reinstate()
            raise
        self._is_writing = False
        self._tell_what_may_differ(session, status)
        try:
            session.drop_journal()
        except UndoFileFailed as error:  # the next repair takes it back again: that changes nothing
            self._add_reason(str(error))

    def _tell_what_may_differ(self, session: Session, status: StateWord) -> None:
        """Undo promises the bytes that the repair changed; where others may differ, it says so."""
        if status.trimmed:
            self._add_reason(
                f"free clusters were trimmed after the repair ({status.trimmed} bytes of the file):"
                " what they held is gone"
            )
        elif session.is_touched:
            self._add_reason(
                "what the repair had changed is as it was before; the image may have been written"
                " to since, and what the repair had freed may hold other bytes now"
            )

    # ---- trim ----

    def trim(self, session: Session, quote: str) -> None:
        image = session.image
        if image.is_device:
            raise TrimUnsupported(image.path, "it is a block device")
        if session.is_interrupted:
            raise RepairInterrupted(image.path, session.option)
        report = self._fresh_check(session)
        if report.verdict != "clean" or not report.complete:
            raise TrimRefused(image.path, report.verdict)
        is_undoable, kept = self._needed_by_undo(session)
        offset, length = free_runs(report, session.source.size, kept)
        before = image.allocated_size()
        if not len(offset):
            status = Status.NOTHING_TO_DO
            self.outcome = replace(self.outcome, status=status, reason="no cluster is free")
            return
        self._require_no_tables(session, report, (offset, length), quote)
        held = self._punch(session, offset, length)
        given = 0
        with suppress(ImageReadFailed):
            given = max(0, before - image.allocated_size())
        if not held and not given:  # what is preallocated holds nothing, and takes up space
            status, reason = Status.NOTHING_TO_DO, "the free clusters took up no disk space"
            self.outcome = replace(self.outcome, status=status, reason=reason)
            return
        final = "what the free clusters held is gone"
        if is_undoable:
            final += "; undo still takes the last repair back, but does not bring that back"
        self.outcome = replace(self.outcome, status=Status.TRIMMED, trimmed=given, reason=final)

    def _require_no_tables(
        self, session: Session, report: Report, runs: tuple[I64, I64], quote: str
    ) -> None:
        """Raise where *runs* may hold what is left of a disk whose metadata was written over.

        Unless *quote* names them. What a repair has freed that can be undone was looked at then.
        """
        bits, source = report.geometry.cluster_bits, session.source
        tables = find_free_tables(source, report, *runs)
        if not len(tables):
            return
        for _, undone in session.each_undone():
            tables = tables[~np.isin(tables >> bits, used_clusters(undone))]
        if not len(tables):
            return
        known = hashlib.sha256(np.concatenate(runs).astype("<i8").tobytes()).hexdigest()
        if len(quote) >= SHORTEST_QUOTE and known.startswith(quote.lower()):
            return
        raise TrimWouldBury(self._path, len(tables), int(tables[0]), known[:ID_LENGTH])

    def _punch(self, session: Session, offset: I64, length: I64) -> int:
        """Punch these runs; what was lost by that is in the undo file before, and right after.

        Returns how many bytes of them held something.
        """

        punched = 0

        def extents() -> I64:
            source = session.source
            return table_of(source.data_extents(0, source.size))

        def runs() -> Iterator[tuple[int, int]]:
            nonlocal punched
            for run in zip(offset.tolist(), length.tolist(), strict=True):
                yield run
                punched += 1

        before = extents()
        most = held_within(before, offset, length)
        session.note_trim(most, is_done=False)
        try:
            punch(
                session.device,
                runs(),
                int(length.sum()),
                progress=self._repairer.progress,
            )
        finally:
            with suppress(UndoFileFailed, ImageReadFailed):  # then it says too much
                done, begun = slice(punched), slice(punched, punched + 1)
                gone = held_within(before, offset[done], length[done])
                # One that failed may have been punched in part.
                gone += held_within(before, offset[begun], length[begun])
                gone -= held_within(extents(), offset[begun], length[begun])
                session.note_trim(gone - most, is_done=True)
        return most

    def _needed_by_undo(self, session: Session) -> tuple[bool, I64]:
        """Whether the last repair can be undone, and the clusters that are in use then; and after
        undoing the one before it, and so on.

        What a repair has replaced is free now, and would be metadata again. So would be the bytes
        by which the undo file knows the image.
        """
        kept = [np.zeros(0, dtype=np.int64)]
        for record, undone in session.each_undone():
            bits = undone.geometry.cluster_bits
            kept += [stage.sectors * SECTOR >> bits for stage in record.plan.stages]
            kept.append(used_clusters(undone, stored=False))
        return len(kept) > 1, distinct(np.concatenate(kept))
