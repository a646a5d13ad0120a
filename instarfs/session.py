"""An image open for writing: under the locks of a writer, with its undo file.

How the undo file lives beside a repair is here: when a new one takes its place, when the old one
comes back, and whether it still fits the image. What is repaired, and how, is not.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from instarfs import locks
from instarfs.errors import (
    ImageChanged,
    ImageDeleted,
    ImageMissing,
    ImageMoved,
    ImageOpenFailed,
    ImageReadFailed,
    ImageReadOnly,
    ImageReplaced,
    InstarfsError,
    UndoFileFailed,
    UndoFileImpossible,
    UndoFileMissing,
    UndoneAlready,
    UndoStale,
    reason_of,
)
from instarfs.execute import Device, require_remnant, require_start, take_back
from instarfs.image import Image
from instarfs.journal import Journal, Record, State, digest_of
from instarfs.names import SUFFIX, Opening
from instarfs.undo_place import UndoPlace
from planner.plan import Plan
from planner.report import Report
from planner.source import SECTOR, Overlay, Source, read_bytes

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
        """*check* is used to tell whether an undo file fits. A device has no *place* for one."""
        self._place, self._check = place, check
        self.image, self.device = image, device
        self.journal = Journal.open(place) if place else None

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
        `ImageReplaced`, `ImageInUse`, `UndoFileDamaged`.
        """
        with ExitStack() as stack:
            fd = _open_for_writing(image)
            stack.callback(os.close, fd)
            stack.enter_context(locks.held(fd, image.path, locks.READ_WRITE))
            place = None if image.is_device else stack.enter_context(_place_beside(image))
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
    def is_interrupted(self) -> bool:
        """Whether a repair, or its undoing, was interrupted."""
        return self.journal is not None and self.journal.status.state is State.APPLYING

    def recover(self) -> bool:
        """Take back what was interrupted; False where nothing was. Its undo file stays.

        Raises `UndoStale` where somebody has written to the image since.
        """
        if self.journal is None or not self.is_interrupted:
            return False
        self._require_fit(self.journal, require_remnant, self.journal.plan)
        take_back(self.device, self.journal.plan)
        return True

    def drop_journal(self) -> None:
        """The image is as it was before the repair: the undo file has served, and the one before it
        is in its place again. Raises `UndoFileFailed`.
        """
        if self.journal is not None:
            self.journal.advance(State.UNDONE)
            self.journal.remove()
            self._close_journal()

    def start_journal(self, plan: Plan, before: Report) -> None:
        """Make the undo file of a repair that is about to begin; the one before is kept aside.

        Raises `UndoFileImpossible`.
        """
        self._close_journal()
        if self._place is None:
            reason = "what lies beside a device does not outlive a restart"
            raise UndoFileImpossible(self.undo_file, reason)
        status = os.fstat(self.image.fileno())
        head = digest_of(read_bytes(self.source, 0, SECTOR))
        record = Record(plan, head, before.counters, status.st_dev, status.st_ino)
        self.journal = Journal.create(self._place, record)

    def settle(self, *, keep_undo: bool) -> None:
        """The repair stands: its undo file is the only one now, or there is none any more."""
        if self.journal is None:
            return
        try:
            self.journal.settle()
            if not keep_undo:
                self.journal.remove()
                self._close_journal()
        except UndoFileFailed as error:
            log.warning("%s", error)

    def withdraw(self) -> None:
        """The repair was put back: the undo file of the one before is in its place again.

        Where it was not put back, whatever the reason, the undo file stays: it is the way back.
        """
        if self.journal is not None:
            with suppress(ImageChanged, ImageReadFailed, UndoFileFailed):
                require_start(self.device, self.journal.plan)
                self.drop_journal()

    def reinstate(self) -> None:
        """The undoing was put back: the repair stands again. Where it was not, that stays said."""
        if self.journal is not None:
            with suppress(ImageChanged, ImageReadFailed, UndoFileFailed):
                require_start(self.device, self.journal.plan.inverse())
                self.journal.advance(State.APPLIED)

    def undoable(self) -> tuple[Journal, Report]:
        """The undo file of a repair that can be undone, and the check of the image without it.

        Raises `UndoFileMissing`, `UndoneAlready` and `UndoStale`.
        """
        journal = self.journal
        if journal is None:
            raise UndoFileMissing(self.image.path, self.undo_file)
        if journal.status.state is State.UNDONE:
            raise UndoneAlready(self.image.path)
        return journal, self._require_fit(journal, require_start, journal.plan.inverse())

    def _require_fit(
        self, journal: Journal, require: Callable[[Device, Plan], None], plan: Plan
    ) -> Report:
        """Raise `UndoStale` unless undoing gives what was there before the repair.

        The sectors must be the repair's, and the image with all of them put back must check as it
        did then: whoever has written to it since would have left it otherwise. Returns that check.
        """
        try:
            require(self.device, plan)
        except ImageChanged as error:
            raise UndoStale(self.image.path, error.what, journal.file) from error
        undone = Overlay(self.source, journal.plan.inverse())
        head = digest_of(read_bytes(undone, 0, SECTOR))
        report = self._check(undone)
        if (head, report.counters) != (journal.record.head, journal.record.counters):
            what = "it was written to after the repair"
            raise UndoStale(self.image.path, what, journal.file)
        return report

    def _close_journal(self) -> None:
        if self.journal is not None:
            self.journal.close()
            self.journal = None


def _open_for_writing(image: Image) -> int:
    """A second descriptor of the image's file. The first stays as it is, for reading only."""
    try:
        fd = image.hands.open(Opening.IMAGE_TO_WRITE, image.directory, image.name)
    except FileNotFoundError as error:
        raise missing(image) from error
    except OSError as error:
        kind = ImageOpenFailed if error.errno == errno.EIO else ImageReadOnly
        raise kind(image.path, reason_of(error)) from error
    ours, its = os.fstat(fd), os.fstat(image.fileno())
    if (ours.st_dev, ours.st_ino) != (its.st_dev, its.st_ino):
        os.close(fd)
        raise ImageReplaced(image.path)
    return fd


def missing(image: Image) -> InstarfsError:
    """Why there is no file under the path of *image*, which was opened under it."""
    gone = image.gone()
    if gone is None:
        return ImageMissing(image.path)
    return ImageDeleted(image.path) if gone.is_deleted else ImageMoved(image.path)


def _place_beside(image: Image) -> UndoPlace:
    try:
        return UndoPlace.beside(image)
    except OSError as error:
        raise UndoFileImpossible(image.path + SUFFIX, reason_of(error)) from error
