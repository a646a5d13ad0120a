"""What is computed of one image under inspection, once for all who ask: the graph of its values.

What a value is made of, which others it needs, under which locks, and what becomes of it where the
image changed meanwhile lives here. Which file that is, and when it is another, is
`instarfs.inspect.subject`' business, how a value is shared `instarfs.inspect.shared_value`'s, and a
repair `instarfs.inspect.repair_queue`'s; how results look is `instarfs.render`'s, and where they
appear the tree's.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar, TypeVarTuple

import trio

from instarfs.errors import (
    DOMAIN_ERRORS,
    ImageReadFailed,
    InstarfsError,
    LeaksInMotion,
    ReadCancelled,
)
from instarfs.guest.allocated import AllocatedBytes
from instarfs.guest.files import hit_files
from instarfs.guest.follow import Follow
from instarfs.guest.guest import Guest, Part, Place, size_of
from instarfs.guest.reader import GuestReader
from instarfs.image import locks
from instarfs.image.file import FileSource, Generation, Image
from instarfs.image.surroundings import Gone, Surroundings
from instarfs.inspect.repair_queue import MakeRepairer, Repairs
from instarfs.inspect.shared_value import (
    Changed,
    Edition,
    Value,
    Workshop,
    room_for_values,
    while_wanted,
)
from instarfs.inspect.stages import Stages
from instarfs.inspect.subject import Subject
from instarfs.inspect.tidying import Tidier
from instarfs.repair.checking import LiveCheck, run_check
from instarfs.repair.looking import look_around
from instarfs.repair.outcome import Pending, RepairOutcome
from instarfs.repair.planning import of_one_moment, propose_for
from instarfs.repair.run import Repairer
from instarfs.repair.writing import missing
from planner.check.check import check_image
from planner.check.report import Report
from planner.errors import ImageError, PlannerError, RepairError, as_value
from planner.guestfs.files import FilesUnknown, HitFiles
from planner.progress import Progress
from planner.qcow2.contents import Contents, bare_header
from planner.qcow2.header import Header
from planner.qcow2.snapshots import Snapshot
from planner.repair.plan import RepairTier
from planner.repair.tiers import Proposal, tiers_for
from planner.source import Source
from planner.triage.beside import Beside, look_beside
from planner.triage.triage import Triage, triage_leaks
from planner.views.bitmap_state import BitmapStates, read_bitmap_states
from planner.views.host_map import Atlas, draw_atlas
from planner.views.table_view import read_l1_page

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

KEPT_LOOKS = 8
"""L2 tables and explanations: of large clusters each has 4 MiB."""

MAX_LOOKING = 16
"""Threads that look, at a time: those left to a disk that does not answer are not to be all."""

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
    the check did without. ``files``: those of the guest that are hit.
    """

    checkup: Checkup
    triage: Triage | InstarfsError
    proposals: dict[RepairTier, Proposal | InstarfsError | PlannerError]
    surroundings: Surroundings
    beside: Beside
    files: HitFiles | FilesUnknown | None = None


class Check(Protocol):
    """`planner.check.check.check_image`, or what stands in for it in a test."""

    def __call__(self, source: Source, *, progress: Progress) -> Report: ...


def _unbounded(_source: FileSource) -> None:
    """Leaves this process as much memory as it has."""


class Inspector:
    """One image, the ``subject``: its `description`, its `checkup`, and all that follows from them.

    A checkup stays good until the image is written to, replaced under its path, or opened or closed
    by a writer; so do what its `leaks` look like, a proposal, which is the refusal where a tier
    refuses, the `briefing` that joins them, and the atlas, which is the error where there is none.
    A description lasts until one of the first two. ``repairs``: what changes the image. ``reader``:
    its guest's bytes, and ``guest`` the state of one moment, or why there is none. *nursery*: where
    all of it is computed; see `inspecting`. *bound* gives this process as much memory as a check
    of a source may take.
    """

    def __init__(
        self,
        image: Image,
        nursery: trio.Nursery,
        *,
        follow: Follow | None = None,
        check: Check = check_image,
        bound: Callable[[FileSource], None] = _unbounded,
        make_repairer: MakeRepairer = Repairer,
    ) -> None:
        subject = self.subject = Subject(image)
        self._check, self._bound = check, bound
        self._stages = Stages()
        self._workshop = Workshop(nursery, subject.moment)
        self._tidier = Tidier(nursery)
        self._described: Description | None = None
        self._snapshot_sizes: dict[Place, int] = {}
        self._looking = trio.CapacityLimiter(MAX_LOOKING)
        self._looks: deque[Value[Any]] = deque()
        self._checked: tuple[Generation, Edition[Checkup]] | None = None
        self._looked_into: tuple[Generation, Leaks] | None = None
        self.repairs = Repairs(subject.to_repair, subject.sharing, make_repairer)
        self.reader = GuestReader(
            subject.look, follow or Follow(), attend=subject.attend, ask=subject.ask
        )
        self.allocated = AllocatedBytes(subject.look)
        self.guest = self._value(self.reader.state, self._open_guest, self.reader.refresh)
        self.description = self._value(lambda: subject.look()[1], self._describe)
        self.checkup = self._value(subject.checked_state, self._check_up)
        self.leaks = self._value(subject.checked_state, self._look_into_leaks)
        self.briefing = self._value(
            lambda: (subject.checked_state(), subject.surroundings()), self._brief
        )
        self.proposals = {
            tier: self._value(subject.checked_state, partial(self._propose, tier))
            for tier in RepairTier
        }
        self.files = self.files_of(Place(Part.DISK), is_kept=True)
        self.atlas = self._value(subject.checked_state, self._draw_atlas)
        self.bitmaps = self._value(subject.checked_state, self._read_bitmaps)
        self.l1_page = self.look(read_l1_page, is_kept=True)
        subject.when_replaced(self.reader.forget)
        subject.when_replaced(self.guest.forget)

    def last_check(self) -> Edition[Checkup] | None:
        """The checkup that was made last, while nothing shows that the image has changed since.

        Unlike what `checkup` gives also of an image whose times do not tell. Never checks.
        """
        known = self._checked
        return known[1] if known and known[0] == self.subject.generation() else None

    def last_leaks(self) -> Leaks | None:
        """What leaked clusters were found to look like last, as by `last_check`. Never looks."""
        known = self._looked_into
        return known[1] if known and known[0] == self.subject.generation() else None

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
            with suppress(ImageError):
                self._snapshot_sizes[place] = size_of(place, snapshot, geometry)
        return self._snapshot_sizes.get(place, 0)

    def progress(self) -> str:
        """How far is what is being computed: a check, or what follows from it; or `IDLE`."""
        return self._stages.shown

    def repair_progress(self) -> str:
        """What a repair is doing, or what a plan of one is waiting for."""
        return self.repairs.progress() if self.repairs.is_running else self.progress()

    def look(
        self,
        at: Callable[[FileSource], T],
        *,
        beside_check: bool = False,
        is_kept: bool = False,
    ) -> Value[T | ImageError]:
        """What *at* sees in the image, or why it sees nothing; good for as long as its bytes are.

        *at* runs in a thread. *beside_check*: it is shown with what a check found, and anew when
        there is another. What one of many shows is let go of when `KEPT_LOOKS` others were looked
        at, unless *is_kept*.
        """

        def key() -> Hashable:
            checkup = self.checkup.peek() if beside_check else None
            return self.subject.look()[1], checkup and weakref.ref(checkup)

        async def compute(_changed: Changed) -> T | ImageError:
            if not is_kept:
                self._keep_look(looked)
            try:
                # It holds no lock: who leaves need not wait for a disk that does not answer.
                return await trio.to_thread.run_sync(
                    at, self.subject.source(), abandon_on_cancel=True, limiter=self._looking
                )
            except ImageError as error:
                return as_value(error)

        looked = self._value(key, compute)
        return looked

    def files_of(self, place: Place, *, is_kept: bool = False) -> Value[HitFiles | FilesUnknown]:
        """Which files of the disk at *place* are hit by what a check finds; kept as by `look`."""

        async def compute(changed: Changed) -> HitFiles | FilesUnknown:
            if not is_kept:
                self._keep_look(value)
            with self._stages.running("opening"):
                found = await self._find_files(place)
            if changed() and isinstance(found, HitFiles):
                return found.with_note("the image was written to meanwhile: look again")
            return found

        value = self._value(
            lambda: (self.subject.checked_state(), self.reader.state()),
            compute,
            self.reader.refresh,
        )
        return value

    def look_at_guest(self, at: Callable[[FileSource, Guest | ImageError], T]) -> Value[T]:
        """As `look`, beside a check, of what *at* sees in the guest too; it raises nothing."""

        def key() -> Hashable:
            checkup = self.checkup.peek()
            return self.reader.state(), checkup and weakref.ref(checkup)

        async def compute(_changed: Changed) -> T:
            self._keep_look(looked)
            guest = (await self.guest.get()).value
            return await trio.to_thread.run_sync(
                at, self.subject.source(), guest, abandon_on_cancel=True, limiter=self._looking
            )

        looked = self._value(key, compute, self.reader.refresh)
        return looked

    def cancel(self) -> None:
        """End whatever is being computed, and a repair; those who wait for it get an error."""
        self.repairs.cancel()
        self._workshop.cancel()

    def _value(
        self,
        key: Callable[[], Hashable],
        compute: Callable[[Changed], Awaitable[T]],
        refresh: Callable[[], Awaitable[None]] | None = None,
    ) -> Value[T]:
        return Value(self._workshop, key, compute, refresh or self.subject.attend)

    def _keep_look(self, looked: Value[Any]) -> None:
        """Let go of what was looked at before the last few."""
        if looked in self._looks:
            self._looks.remove(looked)
        self._looks.append(looked)
        if len(self._looks) > KEPT_LOOKS:
            self._looks.popleft().forget()

    async def _in_thread(self, work: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """Await *work* in a thread; what that took beyond what it returns is given back later."""
        try:
            return await trio.to_thread.run_sync(work, *arguments)
        finally:
            self._tidier.soon()

    # ---- the values: each awaits those it needs, and then one thread ----

    async def _describe(self, _changed: Changed) -> Description:
        self._described = await trio.to_thread.run_sync(_describe, self.subject.image)
        return self._described

    async def _open_guest(self, _changed: Changed) -> Guest | ImageError:
        try:
            return await self.reader.guest()
        except ImageError as error:
            return as_value(error)

    async def _check_up(self, _changed: Changed) -> Checkup:
        image = self.subject.image
        before, checkup = await self._in_thread(self._check_now, image)
        self.subject.reviewed(image)
        if checkup.report.changed:
            self._checked = None
        else:
            checkup = replace(checkup, repaired=self.repairs.standing(before))
            self._checked = before, Edition(checkup)
        return checkup

    def _check_now(self, image: Image) -> tuple[Generation, Checkup]:
        gone = image.gone()
        if gone is not None:
            log.warning("%s", missing(image))
        with self._stages.running("opening"), self.subject.sharing.reading(image) as is_kept:
            self._bound(image.source())  # anew: it may have grown since
            checked = run_check(
                image,
                partial(self._check, progress=while_wanted(self._stages.tell)),
                is_written=lambda: not is_kept,
                live=LiveCheck(again=partial(check_image, progress=while_wanted()), pause=_pause),
            )
        return checked.before, Checkup(checked.report, pending=checked.pending, gone=gone)

    async def _look_into_leaks(self, changed: Changed) -> Leaks:
        image = self.subject.image
        report = (await self.checkup.get()).value.report
        before = self.subject.generation()
        triage = await self._in_thread(self._triage, image, report)
        self._looked_into = None if changed() else (before, Leaks(report, triage))
        return Leaks(_torn(report) if changed() else report, triage)

    def _triage(self, image: Image, report: Report) -> Triage:
        with self._stages.running("opening"), self.subject.sharing.reading(image):
            return triage_leaks(image.source(), report, progress=while_wanted(self._stages.tell))

    async def _find_files(self, place: Place) -> HitFiles | FilesUnknown:
        image, report = self.subject.image, (await self.checkup.get()).value.report
        if report.error is not None:
            return FilesUnknown(str(report.error))
        triage = await self._triage_or_error()
        guest = (await self.guest.get()).value
        if isinstance(guest, ImageError):
            return FilesUnknown(str(guest))
        return await self._in_thread(self._search, image, guest, place, report, triage)

    def _search(
        self,
        image: Image,
        guest: Guest,
        place: Place,
        report: Report,
        triage: Triage | InstarfsError,
    ) -> HitFiles | FilesUnknown:
        with self.subject.sharing.reading(image):
            return hit_files(guest, place, report, triage, while_wanted(self._stages.tell))

    async def _brief(self, changed: Changed) -> Briefing:
        """Plans are made only where something is to be repaired: each costs about a check."""
        with self._stages.running("opening"):
            checkup = (await self.checkup.get()).value
            triage = await self._triage_or_error()
            guest = (await self.guest.get()).value if checkup.report.layout else None
            around, beside = await trio.to_thread.run_sync(
                _look_around, self.subject.image, checkup.report, guest
            )
            files = None if checkup.report.error else (await self.files.get()).value
            briefing = Briefing(checkup, triage, {}, around, beside, files)
            for tier in tiers_for(checkup.report):
                briefing.proposals[tier] = await self._proposal_or_error(tier)
        if changed():
            torn = replace(checkup, report=_torn(checkup.report))
            return Briefing(torn, triage, {}, around, beside, files)
        return briefing

    async def _triage_or_error(self) -> Triage | InstarfsError:
        if (await self.checkup.get()).value.report.live is not None:
            return LeaksInMotion()
        try:
            return (await self.leaks.get()).value.triage
        except ImageReadFailed as error:  # of a leaked cluster, which the check did without
            return as_value(error)

    async def _proposal_or_error(self, tier: RepairTier) -> Proposal | InstarfsError | PlannerError:
        try:
            return (await self.proposals[tier].get()).value
        except ReadCancelled:
            raise
        except DOMAIN_ERRORS as error:
            return as_value(error)

    async def _propose(self, tier: RepairTier, changed: Changed) -> Proposal | RepairError:
        image = self.subject.image
        with self._stages.running("opening"):
            checkup = (await self.checkup.get()).value
            if checkup.pending is not None:
                return RepairError(checkup.pending.sentence)
            triage = (await self.leaks.get()).value.triage
            proposal = await self._in_thread(self._plan, image, checkup.report, tier, triage)
        return of_one_moment(proposal, checkup.report, changed, "read again")

    def _plan(
        self, image: Image, report: Report, tier: RepairTier, triage: Triage
    ) -> Proposal | RepairError:
        def tell(stage: str, done: int, total: int) -> None:
            self._stages.tell(f"plan {tier} {stage}", done, total)

        with self.subject.sharing.reading(image):
            return propose_for(image, report, tier, triage=triage, progress=while_wanted(tell))

    async def _draw_atlas(self, changed: Changed) -> Atlas | ImageError:
        image = self.subject.image
        report = (await self.checkup.get()).value.report
        atlas = await self._in_thread(self._draw, image, report)
        if isinstance(atlas, ImageError):
            return atlas
        return replace(atlas, torn=atlas.torn or changed())

    def _draw(self, image: Image, report: Report) -> Atlas | ImageError:
        try:
            with self._stages.running("drawing"):
                return draw_atlas(image.source(), report, while_wanted())
        except ImageError as error:
            return as_value(error)

    async def _read_bitmaps(self, _changed: Changed) -> Bitmaps:
        return await trio.to_thread.run_sync(_read_bitmaps, self.subject.image)


@asynccontextmanager
async def inspecting(
    image: Image,
    *,
    follow: Follow | None = None,
    check: Check = check_image,
    bound: Callable[[FileSource], None] = _unbounded,
    make_repairer: MakeRepairer = Repairer,
) -> AsyncIterator[Inspector]:
    """An inspector of *image*; whatever it computes ends with the block."""
    async with room_for_values() as nursery:
        yield Inspector(
            image, nursery, follow=follow, check=check, bound=bound, make_repairer=make_repairer
        )


def _pause(seconds: float) -> None:
    while_wanted()("", 0, 0)
    time.sleep(seconds)


def _describe(image: Image) -> Description:
    source = image.source()
    contents: Contents | ImageError
    try:
        contents = Contents.read(source)
    except ImageError as error:
        contents = as_value(error)
    return Description(contents, bare_header(source), source.size, image.allocated_size())


def _look_around(
    image: Image, report: Report, guest: Guest | ImageError | None
) -> tuple[Surroundings, Beside]:
    around = look_around(image)
    if report.layout is None or not isinstance(guest, Guest):
        return around, Beside()
    return around, look_beside(image.source(), report.layout, guest.members)


def _read_bitmaps(image: Image) -> Bitmaps:
    states: BitmapStates | ImageError
    try:
        states = read_bitmap_states(image.source(), while_wanted())
    except ImageError as error:
        states = as_value(error)
    return Bitmaps(states, locks.is_written(image.fileno()))


def _torn(report: Report) -> Report:
    """Of an image that changed before all had been said of it."""
    return replace(report, changed=True)
