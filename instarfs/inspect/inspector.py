"""One image under inspection: what it says of itself, its check, and what repairs would do.

Everything about when an image is read, under which locks, and what still holds after it changed
lives here. Repairing it is `instarfs.inspect.repair_queue`' business; how results look is
`instarfs.render`'s, and where they appear the tree's.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock
from typing import Any, Protocol, TypeVar

import trio

from instarfs.errors import (
    DOMAIN_ERRORS,
    ImageReadFailed,
    ImageReplaced,
    InstarfsError,
    ReadCancelled,
)
from instarfs.guest.allocated import AllocatedBytes
from instarfs.guest.follow import Follow
from instarfs.guest.guest import Guest, Place, size_of
from instarfs.guest.reader import GuestReader
from instarfs.image import locks
from instarfs.image.file import FileSource, Generation, Image, WouldBlock
from instarfs.image.rwlock import Sharing
from instarfs.image.surroundings import Gone, Surroundings
from instarfs.inspect.repair_queue import MakeRepairer, Repairs, last_repair
from instarfs.inspect.shared_value import Computed, Edition
from instarfs.inspect.stages import Stages
from instarfs.repair.interrupted import pending
from instarfs.repair.journal import State, Summary
from instarfs.repair.looking import look_around
from instarfs.repair.outcome import Pending, RepairOutcome
from instarfs.repair.run import Repairer
from instarfs.repair.writing import missing
from planner.check.check import check_image
from planner.check.report import Report
from planner.errors import (
    AmbiguousCorruption,
    Cancelled,
    ImageError,
    PlannerError,
    RepairError,
    as_value,
)
from planner.qcow2.contents import Contents, bare_header
from planner.qcow2.geometry import SECTOR
from planner.qcow2.header import SIGNED_MAX, Header
from planner.qcow2.snapshots import Snapshot
from planner.repair.plan import RepairTier
from planner.repair.tiers import Proposal, is_repairable, propose
from planner.triage.beside import Beside, look_beside
from planner.triage.triage import Triage, triage_leaks
from planner.views.bitmap_state import BitmapStates, read_bitmap_states
from planner.views.host_map import Atlas, draw_atlas
from planner.views.table_view import read_l1_page

T = TypeVar("T")

KEPT_LOOKS = 8
"""L2 tables and explanations: of large clusters each has 4 MiB."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Description:
    """What an image says of itself; where that makes no sense, why, and the header as it stands.

    Sizes in bytes, from the file system.
    """

    contents: Contents | ImageError
    header: Header | None
    file_size: int
    allocated_size: int


@dataclass(frozen=True, slots=True)
class Bitmaps:
    """The persistent bitmaps, or why nothing is known of them.

    ``is_written``: a program has the image open for writing, and uses those that are in use.
    """

    states: BitmapStates | ImageError
    is_written: bool


@dataclass(frozen=True, slots=True)
class Checkup:
    """The check of an image, and what is known of its repairs.

    ``repaired``: the repair that left the image as it was checked. ``pending``: one that was
    interrupted and comes first. ``gone``: that the file has no name any more.
    """

    report: Report
    repaired: RepairOutcome | None = None
    pending: Pending | None = None
    gone: Gone | None = None


@dataclass(frozen=True, slots=True)
class Leaks:
    """What a check found leaked, and what that looks like."""

    report: Report
    triage: Triage


@dataclass(frozen=True, slots=True)
class Briefing:
    """A check, and what follows from it: all that a person needs who has to decide.

    ``proposals``: of each tier, or why there is none; empty where there is nothing to repair, or
    nobody knows. ``surroundings``: what is around the image, to make files there; ``beside``: what
    the check did without.
    """

    checkup: Checkup
    triage: Triage | InstarfsError
    proposals: dict[RepairTier, Proposal | InstarfsError | PlannerError]
    surroundings: Surroundings
    beside: Beside


class Check(Protocol):
    """`planner.check.check.check_image`, or what stands in for it in a test."""

    def __call__(
        self,
        source: FileSource,
        *,
        progress: Callable[[str, int, int], None],
        cancelled: Callable[[], bool],
    ) -> Report: ...


class Inspector:
    """One image: its `description`, its `checkup` and its `proposals`, computed in worker threads.

    A checkup stays good until the image is written to, replaced under its path, or opened or closed
    by a writer; so do what its `leaks` look like, a proposal, which is the refusal where a tier
    refuses, the `briefing` that joins them, and the atlas, which is the error where there is none.
    A description lasts until one of the first two. ``repairs``: what changes the image. ``reader``:
    its guest's bytes, and ``guest`` the state of one moment, or why there is none.
    """

    def __init__(
        self,
        image: Image,
        *,
        follow: Follow | None = None,
        check: Check = check_image,
        make_repairer: MakeRepairer = Repairer,
    ) -> None:
        self._image = image
        self._check = check
        self._generation = image.generation()
        # The image itself, not its inode number: that of a file which is gone goes to another.
        self._reviewed = weakref.ref(image)
        self._stages = Stages()
        self._sharing = Sharing()
        self._described: Description | None = None
        self._snapshot_sizes: dict[Place, int] = {}
        self._size: tuple[Generation | None, int] = (None, 0)
        # One that waits for a disk that does not answer is enough.
        self._reading_header = trio.CapacityLimiter(1)
        self.reader = GuestReader(self._look_at_guest, follow or Follow())
        self.allocated = AllocatedBytes(self._look_at_guest)
        self.guest = Computed(self.reader.state, self._open_guest, self.reader.refresh)
        self.description = Computed(self._image_state, self._describe)
        self.checkup = Computed(self._state, self._run_check)
        self.leaks = Computed(self._state, self._look_into_leaks)
        self.briefing = Computed(lambda: (self._state(), self._surroundings()), self._brief)
        self.proposals = {
            tier: Computed(self._state, partial(self._propose, tier)) for tier in RepairTier
        }
        self.atlas = Computed(self._state, self._draw_atlas)
        self.bitmaps = Computed(self._state, self._read_bitmaps)
        self._looks: deque[Computed[Any]] = deque()
        self._looks_lock = Lock()
        self.l1_page = self.look(lambda source, _cancelled: read_l1_page(source), is_kept=True)
        self._checked: tuple[Generation, Edition[Checkup]] | None = None
        self.repairs = Repairs(self._reviewed_image, self._sharing, make_repairer)

    @property
    def path(self) -> str:
        """The image's path, absolute."""
        return self._image.path

    def generation(self) -> Generation:
        """What the image is now, or was when it last could be looked at."""
        with contextlib.suppress(InstarfsError):
            self._generation = self._look()
        return self._generation

    def state(self) -> Hashable:
        """What changes when any byte of the image might; see `Generation.state`. Never raises."""
        try:
            return self._image_state()
        except InstarfsError:
            return object()

    def source(self) -> FileSource:
        """The image's bytes, as many as there are now."""
        return self._image.source()

    def last_check(self) -> Edition[Checkup] | None:
        """The checkup that was made last, while nothing shows that the image has changed since.

        Unlike what `checkup` gives also of an image whose times do not tell. Never checks.
        """
        known = self._checked
        return known[1] if known and known[0] == self.generation() else None

    def disk_size(self) -> int:
        """Bytes of the guest's disk, from the header alone; 0 where there is none.

        Waits for no disk: until `learn_disk_size` has, those that there were.
        """
        generation = self.generation()
        if self._size[0] != generation:
            with contextlib.suppress(WouldBlock):
                self._size = generation, _disk_size(self._image, wait=False)
        return self._size[1]

    async def learn_disk_size(self) -> None:
        """Read the header, in a thread where a disk has to be waited for."""
        generation, image = self.generation(), self._image
        self.disk_size()
        if self._size[0] != generation:
            size = await trio.to_thread.run_sync(
                partial(_disk_size, image, wait=True),
                abandon_on_cancel=True,
                limiter=self._reading_header,
            )
            self._size = generation, size

    def snapshots(self) -> Sequence[Snapshot]:
        """Those that the image had when it was last described. Computes nothing."""
        contents = self._described.contents if self._described else None
        return contents.snapshots if isinstance(contents, Contents) else ()

    def snapshot_size(self, place: Place) -> int:
        """Bytes of what is at *place*, which is of a snapshot; 0 where that makes no sense.

        Of a snapshot that is gone the last size: one who reads on is to hear of it.
        """
        contents = self._described.contents if self._described else None
        if isinstance(contents, Contents) and place.index < len(contents.snapshots):
            snapshot, geometry = contents.snapshots[place.index], contents.layout.geometry
            self._snapshot_sizes[place] = 0
            with contextlib.suppress(ImageError):
                self._snapshot_sizes[place] = size_of(place, snapshot, geometry)
        return self._snapshot_sizes.get(place, 0)

    def progress(self) -> str:
        """How far is what is being computed: a check, or what follows from it; or `IDLE`."""
        return self._stages.shown

    def repair_progress(self) -> str:
        """What a repair is doing, or what a plan of one is waiting for."""
        return self.repairs.progress() if self.repairs.is_running else self.progress()

    def pending(self) -> Pending | None:
        """The repair of the image that was interrupted, if there is one."""
        return pending(self._image)

    def last_repair(self) -> Summary | Exception | None:
        """What its undo file says of itself, or why that cannot be known; None where none is."""
        return last_repair(self._image)

    def is_touched(self, last: Summary) -> bool:
        """Whether others may have written to the image after the *last* repair, by its times."""
        if self._image.is_device or last.status.state is not State.APPLIED:
            return False
        return last.status.mtime_ns != self.generation().mtime_ns

    def look(
        self,
        at: Callable[[FileSource, Callable[[], bool]], T],
        *,
        beside_check: bool = False,
        is_kept: bool = False,
    ) -> Computed[T | ImageError]:
        """What *at* sees in the image, or why it sees nothing; good for as long as its bytes are.

        *at* is handed a function that turns true when it should stop. *beside_check*: it is shown
        with what a check found, and anew when there is another. What
        one of many shows is let go of when `KEPT_LOOKS` others were looked at, unless *is_kept*.
        """

        def key() -> Hashable:
            checkup = self.checkup.peek() if beside_check else None
            return self._image_state(), checkup and weakref.ref(checkup)

        def compute(cancelled: Callable[[], bool]) -> T | ImageError:
            if not is_kept:
                self._keep_look(looked)
            try:
                return at(self._image.source(), cancelled)
            except ImageError as error:
                return as_value(error)

        looked: Computed[T | ImageError] = Computed(key, compute)
        return looked

    def _keep_look(self, looked: Computed[Any]) -> None:
        """Let go of what was looked at before the last few; in any thread."""
        with self._looks_lock:
            if looked in self._looks:
                self._looks.remove(looked)
            self._looks.append(looked)
            if len(self._looks) > KEPT_LOOKS:
                self._looks.popleft().forget()

    def cancel(self) -> None:
        """End whatever is being computed; those who wait for it get an error."""
        self.repairs.cancel()
        self.description.cancel()
        self.guest.cancel()
        self.checkup.cancel()
        self.atlas.cancel()
        self.bitmaps.cancel()
        self.leaks.cancel()
        self.briefing.cancel()
        for proposal in self.proposals.values():
            proposal.cancel()

    # ---- what it is now ----

    def _look(self) -> Generation:
        """The generation of the file that the path names now."""
        if self._image.is_replaced():
            # The old one is closed, and its disk space free, when the last thread that reads it
            # lets go of it.
            self._image = self._image.reopen()
            self.reader.forget()
            self.guest.forget()
        return self._image.generation()

    def _image_state(self) -> Hashable:
        """Of the file that the path names now; see `Generation.state`."""
        return self._look().state()

    def _look_at_guest(self) -> tuple[Image, Hashable]:
        state = self._image_state()
        return self._image, state

    def _state(self) -> Hashable:
        """What a check depends on: also on whether somebody writes, as it then is no verdict."""
        generation = self._image_state()
        return generation, self._is_written(), self.pending(), self._image.gone()

    def _surroundings(self) -> Surroundings:
        return look_around(self._image)

    def _is_written(self) -> bool:
        """Whether somebody, here or elsewhere, writes to it, or may."""
        return locks.is_written(self._image.fileno()) or self._sharing.has_writer

    def _reviewed_image(self) -> Image:
        """The image, to be repaired. Raises `ImageReplaced` for one that nobody has looked at."""
        self._look()
        if self._reviewed() is not self._image:
            raise ImageReplaced(self.path)
        return self._image

    # ---- what is computed ----

    def _describe(self, _cancelled: Callable[[], bool]) -> Description:
        image = self._image
        source = image.source()
        contents: Contents | ImageError
        try:
            contents = Contents.read(source)
        except ImageError as error:
            contents = as_value(error)
        described = Description(contents, bare_header(source), source.size, image.allocated_size())
        self._described = described
        return described

    def _open_guest(self, _cancelled: Callable[[], bool]) -> Guest | ImageError:
        try:
            return trio.from_thread.run(self.reader.guest)
        except ImageError as error:
            return as_value(error)

    def _run_check(self, cancelled: Callable[[], bool]) -> Checkup:
        image = self._image
        before, interrupted, gone = image.generation(), pending(image), image.gone()
        if gone is not None:
            log.warning("%s", missing(image))
        with self._stages.running("opening"), self._sharing.reading(image) as is_kept:
            report = self._check(image.source(), progress=self._stages.tell, cancelled=cancelled)
        self._reviewed = weakref.ref(image)
        report = replace(report, in_use=not is_kept, changed=image.generation() != before)
        repaired = None if report.changed else self.repairs.standing(before)
        checkup = Checkup(report, repaired, interrupted, gone)
        self._checked = None if report.changed else (before, Edition(checkup))
        return checkup

    def _moment(self) -> Hashable:
        """The image and whether it is written; for worker threads.

        What takes a check and looks again may see two images. It is of one if this is the same
        before the first and after the last look; `_image` is the one that it tells of.
        """
        return trio.from_thread.run_sync(lambda: (self.generation(), self._is_written()))

    def _look_into_leaks(self, cancelled: Callable[[], bool]) -> Leaks:
        before, image = self._moment(), self._image
        report = trio.from_thread.run(self.checkup.get).value.report
        with self._stages.running("opening"), self._sharing.reading(image):
            triage = triage_leaks(
                image.source(), report, progress=self._stages.tell, cancelled=cancelled
            )
        return Leaks(_torn(report) if self._moment() != before else report, triage)

    def _brief(self, _cancelled: Callable[[], bool]) -> Briefing:
        with self._stages.running("opening"):
            return self._make_briefing()

    def _make_briefing(self) -> Briefing:
        """Plans are made only where something is to be repaired: each costs about a check."""
        before = self._moment()
        checkup = trio.from_thread.run(self.checkup.get).value
        triage: Triage | InstarfsError
        try:
            triage = trio.from_thread.run(self.leaks.get).value.triage
        except ImageReadFailed as error:  # of a leaked cluster, which the check did without
            triage = as_value(error)
        around = self._surroundings()
        beside = self._look_beside(checkup.report)
        briefing = Briefing(checkup, triage, {}, around, beside)
        if is_repairable(checkup.report):
            for tier in RepairTier:
                briefing.proposals[tier] = self._proposal_or_error(tier)
        if self._moment() != before:
            torn = replace(checkup, report=_torn(checkup.report))
            return Briefing(torn, triage, {}, around, beside)
        return briefing

    def _look_beside(self, report: Report) -> Beside:
        guest = trio.from_thread.run(self.guest.get).value if report.layout else None
        if report.layout is None or not isinstance(guest, Guest):
            return Beside()
        return look_beside(self._image.source(), report.layout, guest.members)

    def _proposal_or_error(self, tier: RepairTier) -> Proposal | InstarfsError | PlannerError:
        try:
            return trio.from_thread.run(self.proposals[tier].get).value
        except ReadCancelled:
            raise
        except DOMAIN_ERRORS as error:
            return as_value(error)

    def _propose(self, tier: RepairTier, cancelled: Callable[[], bool]) -> Proposal | RepairError:
        with self._stages.running("opening"):
            return self._make_proposal(tier, cancelled)

    def _make_proposal(
        self, tier: RepairTier, cancelled: Callable[[], bool]
    ) -> Proposal | RepairError:
        def tell(stage: str, done: int, total: int) -> None:
            self._stages.tell(f"plan {tier} {stage}", done, total)

        before, image = self._moment(), self._image
        checkup = trio.from_thread.run(self.checkup.get).value
        if checkup.pending is not None:
            return RepairError(checkup.pending.sentence)
        triage = trio.from_thread.run(self.leaks.get).value.triage
        proposal: Proposal | RepairError
        try:
            with self._sharing.reading(image):
                proposal = propose(
                    image.source(),
                    checkup.report,
                    tier,
                    can_grow=not image.is_device,
                    triage=triage,
                    progress=tell,
                    cancelled=cancelled,
                )
        except RepairError as error:
            proposal = as_value(error)
        # A refusal, too, may come of the change; that of a torn report has the better advice.
        if self._moment() != before and not checkup.report.torn:
            return AmbiguousCorruption("the image changed while it was planned", "read again")
        return proposal

    def _draw_atlas(self, cancelled: Callable[[], bool]) -> Atlas | ImageError:
        def tick(_amount: int) -> None:
            if cancelled():
                raise Cancelled

        before, image = self._moment(), self._image
        report = trio.from_thread.run(self.checkup.get).value.report
        try:
            with self._stages.running("drawing"):
                atlas = draw_atlas(image.source(), report, tick)
        except ImageError as error:
            return as_value(error)
        return replace(atlas, torn=atlas.torn or self._moment() != before)

    def _read_bitmaps(self, cancelled: Callable[[], bool]) -> Bitmaps:
        def tick(_amount: int) -> None:
            if cancelled():
                raise Cancelled

        states: BitmapStates | ImageError
        try:
            states = read_bitmap_states(self._image.source(), tick)
        except ImageError as error:
            states = as_value(error)
        return Bitmaps(states, locks.is_written(self._image.fileno()))


def _disk_size(image: Image, *, wait: bool) -> int:
    """As the header says. Raises `WouldBlock` unless *wait*."""
    header = None
    with contextlib.suppress(InstarfsError):
        header = bare_header(image.source(wait=wait))
    size = header.size // SECTOR * SECTOR if header else 0
    return size if size <= SIGNED_MAX else 0


def _torn(report: Report) -> Report:
    """Of an image that changed before all had been said of it."""
    return replace(report, changed=True)
