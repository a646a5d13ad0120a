"""An image open for writing: under the locks of a writer, with its undo file.

How the undo file lives beside a repair is here: when a record is put on top of the others, when it
goes again, and whether it still fits the image. What is repaired, and how, is not; the bytes are
written by `instarfs.repair.execute`.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from instarfs.errors import (
    ImageChanged,
    ImageOpenFailed,
    ImageReadFailed,
    ImageReadOnly,
    ImageReplaced,
    UndoEmpty,
    UndoFileDamaged,
    UndoFileElsewhere,
    UndoFileFailed,
    UndoFileImpossible,
    UndoFileMissing,
    UndoFileTaken,
    UndoSealed,
    UndoStale,
    reason_of,
)
from instarfs.image import locks
from instarfs.image.directory import SUFFIX
from instarfs.image.file import Image, close_all, missing
from instarfs.repair.execute import Device, holds_start, require_remnant, require_start, take_back
from instarfs.repair.journal import Journal, Record, State, digest_of
from instarfs.repair.undo_place import UndoPlace
from planner.check.report import Report
from planner.repair.overlay import Overlay
from planner.repair.plan import Plan
from planner.source import SECTOR, Source, read_bytes

log = logging.getLogger(__name__)


class Session:
    """One image, open for writing. Use `Session.open`. ``journal``: its undo file, or None."""

    def __init__(
        self,
        image: Image,
        device: Device,
        place: UndoPlace | None,
        check: Callable[[Source], Report],
    ) -> None:
        """*check* is used to tell whether an undo file fits. A device has no *place* for one,
        unless somebody named it.
        """
        self._place, self._check = place, check
        self.image, self.device = image, device
        self.journal = Journal.open(place) if place else None
        self._is_touched = self._was_written_to()

    @classmethod
    @contextmanager
    def open(
        cls,
        image: Image,
        make_device: Callable[[int, str], Device],
        check: Callable[[Source], Report],
    ) -> Iterator[Session]:
        """Open *image* for writing, for as long as the context lasts.

        Raises `ImageReadOnly`, `ImageDeleted`, `ImageMoved`, `ImageMissing`, `ImageOpenFailed`,
        `ImageReplaced`, `ImageNameless`, `ImageInUse`, `UndoFileDamaged`, `UndoFileElsewhere`.
        """
        with ExitStack() as stack:
            fd = _open_for_writing(image)
            stack.callback(close_all, fd)
            stack.enter_context(locks.held(fd, image.path, locks.READ_WRITE))
            place = _place_of(image)
            if place is not None:
                stack.enter_context(place)
                _require_only_place(image, place)
            session = cls(image, make_device(fd, image.path), place, check)
            stack.callback(session._close_journal)
            yield session

    @property
    def source(self) -> Source:
        """The image's bytes, as many as there are now."""
        return self.image.source()

    @property
    def undo_file(self) -> str:
        """Where the undo file is, or would be."""
        return self._place.file if self._place else self.image.path + SUFFIX

    @property
    def option(self) -> str:
        """What a command needs to find that file, with a blank before it; empty: nothing."""
        return self._place.option if self._place else ""

    @property
    def is_interrupted(self) -> bool:
        """Whether a repair, or its undoing, was interrupted."""
        return self.journal is not None and self.journal.status.state is State.APPLYING

    @property
    def is_recorded(self) -> bool:
        """Whether there is a repair on top of the undo file."""
        return self.journal is not None and self.journal.status.depth > 0

    def count_undoable(self) -> int:
        """How many repairs can be taken back now, one after the other.

        Where others may have written to the image since, that costs a check. Raises
        `UndoFileDamaged`.
        """
        if self.journal is None or not self.is_recorded or self.is_interrupted:
            return 0
        if self.journal.record is None:
            self.journal.load_next()
        return self.journal.status.depth if self._fits(self.journal.top) else 0

    @property
    def stale_count(self) -> int:
        """How many repairs below the one on top did not fit any more when that was made."""
        return self.journal.stale_count if self.journal else 0

    def _still_fits(self) -> bool:
        """Whether what is kept would be taken back, as far as it can be read."""
        try:
            return self.count_undoable() > 0
        except (UndoFileDamaged, ImageReadFailed):
            return False

    def _fits(self, record: Record) -> bool:
        """Whether *record*, the one on top, would be taken back."""
        inverse = record.plan.inverse()
        if not holds_start(self.source, inverse):
            return False
        if not self._is_touched:
            return True
        undone = Overlay(self.source, inverse)
        return self._is_as_recorded(self.source, undone, self._check(undone), record)

    @property
    def is_touched(self) -> bool:
        """Whether others may have written to the image after the repair on top, as far as the
        image's times tell: not all of that is seen in what its tables say.
        """
        return self._is_touched

    # ---- a repair that was interrupted ----

    def recover(self) -> bool:
        """Take back what was interrupted; False where nothing was. Its record stays.

        Raises `UndoStale` where somebody has written to the image since.
        """
        if self.journal is None or not self.is_interrupted:
            return False
        record = self.journal.top
        self._require_fit(record, require_remnant, record.plan)
        take_back(self.device, self.journal.plan)
        self._is_touched = True  # it may have been before
        return True

    def drop_journal(self) -> None:
        """The image is as it was before the repair on top: its record has served, and the one below
        counts again. Raises `UndoFileFailed`.
        """
        if self.journal is not None:
            is_known = self.journal.below.mtime_ns and not self._is_touched
            self.journal.drop(self._mtime_ns() if is_known else 0)
            self._is_touched = not is_known

    # ---- a repair ----

    def start_journal(self, plan: Plan, before: Report, after: Report) -> None:
        """Put the record of a repair that is about to begin on top of the others.

        *before*, *after*: the checks of the image as it is, and as the repair will leave it.
        Raises `UndoFileImpossible`, and `UndoFileTaken` where these are of another image.
        """
        if self._place is None:
            reason = "what lies beside a device does not outlive a restart"
            raise UndoFileImpossible(self.undo_file, reason)
        self._require_stack_of_this()
        fits = self._still_fits()
        if self.journal is None:
            self.journal = Journal.make(self._place)
        head = digest_of(read_bytes(self.source, 0, SECTOR))
        # Where nothing can be counted before, a header is brought back: then by what it leaves.
        known = before if before.error is None else after
        record = Record(plan, head, known.counters, self._place.identity)
        self.journal.begin(record, is_touched=self._is_touched, fits=fits)
        self._is_touched = False

    def go_without_journal(self) -> None:
        """A repair is about to begin of which there is no record: those that there are can then not
        be taken back. Raises `UndoFileFailed`.
        """
        if self.journal is not None:
            self.journal.seal()

    def stand(self) -> None:
        """The repair is written, whole. Raises `UndoFileFailed`."""
        if self.is_interrupted and self.journal is not None:
            self.journal.advance(State.APPLIED, self._mtime_ns())

    def settle(self, *, keep_undo: bool) -> None:
        """The repair stands: it can be taken back, or nothing can any more."""
        if self.journal is None or keep_undo or not self.is_recorded:
            return
        try:
            self.journal.forget()
        except UndoFileFailed as error:
            log.warning("%s", error)

    def withdraw(self) -> None:
        """The repair was put back: its record goes.

        Where it was not put back, whatever the reason, its record stays: it is the way back.
        """
        if self.journal is not None:
            with suppress(ImageChanged, ImageReadFailed, UndoFileFailed):
                if not self.is_interrupted:
                    self.journal.unseal()
                    return
                require_start(self.device, self.journal.plan)
                self.drop_journal()

    # ---- an undo ----

    def reinstate(self) -> None:
        """The undoing was put back: the repair stands again. Where it was not, that stays said."""
        if self.journal is not None:
            with suppress(ImageChanged, ImageReadFailed, UndoFileFailed):
                require_start(self.device, self.journal.plan.inverse())
                mtime_ns = 0 if self._is_touched else self._mtime_ns()
                self.journal.advance(State.APPLIED, mtime_ns)

    def undoable(self) -> tuple[Journal, Report]:
        """The undo file of a repair that can be undone, and the check of the image without it.

        Raises `UndoFileMissing`, `UndoEmpty`, `UndoSealed` and `UndoStale`.
        """
        journal = self.journal
        if journal is None:
            others = self._place.other_names() if self._place else ""
            hint = f"; {others}: it may lie beside another: --undo-file" if others else ""
            raise UndoFileMissing(self.image.path, self.undo_file, hint)
        if journal.status.state is State.SEALED:
            raise UndoSealed(self.image.path, journal.file)
        if journal.record is None:
            raise UndoEmpty(self.image.path, journal.file)
        record = journal.record
        return journal, self._require_fit(record, require_start, record.plan.inverse())

    def each_undone(self) -> Iterator[tuple[Record, Report]]:
        """Every repair that can be taken back, the newest first, and the check of the image then;
        of one that has no header then, of what it leads to with the header that it had found.

        Ends at the first that no longer fits.
        """
        if self.journal is None:
            return
        source = self.source
        with suppress(UndoFileDamaged):
            for record, _ in self.journal.walk():
                if not holds_start(source, record.plan.inverse()):
                    return
                left, source = source, Overlay(source, record.plan.inverse())
                report = self._check(source)
                if not self._is_as_recorded(left, source, report, record):
                    return
                yield record, report if report.error is None else self._check(left)

    def note_trim(self, length: int, *, is_done: bool) -> None:
        """*length* bytes more of what the image held are gone, or less. Raises `UndoFileFailed`."""
        if self.journal is not None and self.is_recorded:
            is_known = is_done and not self._is_touched
            self.journal.note_trim(length, self._mtime_ns() if is_known else 0)

    # ---- whether it fits ----

    def _require_stack_of_this(self) -> None:
        """A place that somebody named may hold the repairs of another image."""
        journal = self.journal
        if journal is None or journal.record is None or self._place is None:
            return
        is_other = journal.record.identity.inode != self._place.identity.inode
        if is_other and not holds_start(self.source, journal.plan.inverse()):
            what = "its repairs are of another file, and do not fit this one"
            raise UndoFileTaken(journal.file, what)

    def _require_fit(
        self, record: Record, require: Callable[[Device, Plan], None], plan: Plan
    ) -> Report:
        """Raise `UndoStale` unless undoing gives what was there before the repair.

        The sectors must be the repair's, and the image with all of them put back must check as it
        did then: whoever has written to it since would have left it otherwise. Returns that check.
        """
        try:
            require(self.device, plan)
        except ImageChanged as error:
            raise UndoStale(self.image.path, error.what, self.undo_file) from error
        undone = Overlay(self.source, record.plan.inverse())
        report = self._check(undone)
        # Of what was interrupted some of it may be there, and nothing but its own sectors tells.
        left = None if self.is_interrupted else self.source
        if not self._is_as_recorded(left, undone, report, record):
            what = "it was written to after the repair"
            raise UndoStale(self.image.path, what, self.undo_file)
        return report

    def _is_as_recorded(
        self, left: Source | None, undone: Source, report: Report, record: Record
    ) -> bool:
        """Whether *undone*, of which *report* is the check, is the image before the repair.

        Where that cannot be checked, having no header, *left* must be what the repair left.
        """
        if digest_of(read_bytes(undone, 0, SECTOR)) != record.head:
            return False
        if report.error is None:
            return report.counters == record.counters
        return left is None or self._check(left).counters == record.counters

    def _mtime_ns(self) -> int:
        """Of the image as it is; 0 where that says nothing, as of a device, or is not told."""
        with suppress(ImageReadFailed):
            return 0 if self.image.is_device else self.image.generation().mtime_ns
        return 0

    def _was_written_to(self) -> bool:
        known = self.journal.status.mtime_ns if self.journal else 0
        return known == 0 or known != self._mtime_ns()

    def _close_journal(self) -> None:
        if self.journal is not None:
            self.journal.close()
            self.journal = None


def _open_for_writing(image: Image) -> int:
    """A second descriptor of the image's file. The first stays as it is, for reading only."""
    try:
        fd = image.open_to_write()
    except FileNotFoundError as error:
        raise missing(image) from error
    except OSError as error:
        if error.errno in (errno.ESTALE, errno.EXDEV):
            raise ImageReplaced(image.path) from error
        kind = ImageOpenFailed if error.errno == errno.EIO else ImageReadOnly
        raise kind(image.path, reason_of(error)) from error
    try:
        is_it = os.path.sameopenfile(fd, image.fileno())
    except OSError as error:
        close_all(fd)
        raise ImageOpenFailed(image.path, reason_of(error)) from error
    if not is_it:
        close_all(fd)
        raise ImageReplaced(image.path)
    return fd


def _place_of(image: Image) -> UndoPlace | None:
    try:
        return UndoPlace.of(image)
    except OSError as error:
        raise UndoFileImpossible(image.path + SUFFIX, reason_of(error)) from error


def _require_only_place(image: Image, place: UndoPlace) -> None:
    """An image has one undo file: of two nobody would know which repair came last."""
    place.require_image_here()
    if image.undo is None or image.is_device:
        return
    try:
        with UndoPlace.beside(image) as beside:
            if beside.is_taken() and not beside.is_same(place):
                raise UndoFileElsewhere(image.path, beside.file, place.file)
    except OSError:
        return  # where nothing can lie beside it, nothing does
