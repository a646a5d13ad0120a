"""What is computed of one image under inspection, once for all who ask: the graph of its values.

What a value is made of, which others it needs, under which locks, and what becomes of it where the
image changed meanwhile lives here. Which file that is, and when it is another, is
`instarfs.inspect.subject`' business, how a value is shared `instarfs.inspect.shared_value`'s, and a
repair `instarfs.inspect.repair_queue`'s; how results look is `instarfs.render`'s, and where they
appear the tree's.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from instarfs.errors import (
    DOMAIN_ERRORS,
    ImageReadFailed,
    InstarfsError,
    LeaksInMotion,
    ReadCancelled,
)
from instarfs.guest.allocated import AllocatedBytes
from instarfs.guest.follow import Follow
from instarfs.guest.place import Part, Place, size_of
from instarfs.guest.reader import GuestReader
from instarfs.image.file import FileSource, Generation, Image
from instarfs.inspect.shared_value import Changed, Edition, Value, Workshop, room_for_values
from instarfs.inspect.stages import Stages
from instarfs.inspect.subject import Subject
from instarfs.inspect.tidying import Tidier
from instarfs.inspect.values import (
    Bitmaps,
    Briefing,
    Check,
    Checkup,
    Description,
    GuestByte,
    Leaks,
)
from planner.arrays import GuestOffset, HostOffset
from planner.errors import ImageError, PlannerError, RepairError, as_value
from planner.qcow2.header import bare_header
from planner.repair.plan import RepairTier

if TYPE_CHECKING:  # what a mount loads once it answers
    from instarfs.guest.guest import Guest
    from instarfs.inspect.repair_queue import MakeRepairer, Repairs
    from instarfs.inspect.work import Work
    from planner.check.report import Report
    from planner.guestfs.files import FilesUnknown, HitFiles
    from planner.qcow2.contents import Contents
    from planner.qcow2.snapshots import Snapshot
    from planner.repair.tiers import Proposal
    from planner.triage.triage import Triage
    from planner.views.explain import HostExplanation
    from planner.views.host_map import Atlas
    from planner.views.table_view import L2Page

T = TypeVar("T")

KEPT_LOOKS = 8
"""L2 tables and explanations: of large clusters each has 4 MiB."""

MAX_LOOKING = 16
"""Threads that look, at a time: those left to a disk that does not answer are not to be all."""


def _unbounded(_source: FileSource) -> None:
    """Leaves this process as much memory as it has."""


class Inspector:
    """One image, the ``subject``: its `description`, its `checkup`, and all that follows from them.

    A checkup stays good until the image is written to, replaced under its path, or opened or closed
    by a writer; so do what its `leaks` look like, a proposal, which is the refusal where a tier
    refuses, the `briefing` that joins them, and the atlas, which is the error where there is none.
    A description lasts until one of the first two. ``reader``: its guest's bytes, and ``guest`` the
    state of one moment, or why there is none. *nursery*: where all of it is computed; see
    `inspecting`. *bound* gives this process as much memory as a check of a source may take.
    """

    def __init__(
        self,
        image: Image,
        nursery: trio.Nursery,
        *,
        follow: Follow | None = None,
        check: Check | None = None,
        bound: Callable[[FileSource], None] = _unbounded,
        make_repairer: MakeRepairer | None = None,
    ) -> None:
        subject = self.subject = Subject(image)
        self._check, self._bound, self._make_repairer = check, bound, make_repairer
        self._stages = Stages()
        self._workshop = Workshop(nursery, subject.moment)
        self._tidier = Tidier(nursery)
        self._described: Description | None = None
        self._snapshot_sizes: dict[Place, int] = {}
        self._looking = trio.CapacityLimiter(MAX_LOOKING)
        self._looks: deque[Value[Any]] = deque()
        self._checked: tuple[Generation, Edition[Checkup]] | None = None
        self._looked_into: tuple[Generation, Leaks] | None = None
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
        self.l1_page = self.look(lambda source: self._work().read_l1_page(source), is_kept=True)
        subject.when_replaced(self.reader.forget)
        subject.when_replaced(self.guest.forget)

    @cached_property
    def repairs(self) -> Repairs:
        """What changes the image."""
        from instarfs.inspect.repair_queue import Repairs  # noqa: PLC0415
        from instarfs.repair.run import Repairer  # noqa: PLC0415

        make_repairer = self._make_repairer or Repairer
        to_repair, sharing = self.subject.to_repair, self.subject.sharing
        return Repairs(to_repair, sharing, make_repairer, self._let_go)

    def _let_go(self) -> None:
        """Forget what follows from a check, which a repair makes out of date, and the check if it
        is: beside a repair, which takes as much memory, all of it would be there twice.
        """
        derived: list[Value[Any]] = [self.leaks, self.briefing, self.files, self.atlas]
        derived += [self.bitmaps, *self.proposals.values(), *self._looks]
        for value in derived:
            value.forget()
        self._looks.clear()
        if self.checkup.peek() is None:
            self.checkup.forget()
        if self.last_check() is None:
            self._checked = None
        if self.last_leaks() is None:
            self._looked_into = None

    @property
    def _has_repairs(self) -> bool:
        """Whether there can have been one: what repairs is loaded by who asks for it first."""
        return "repairs" in vars(self)

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
        contents = self._contents()
        return contents.snapshots if contents else ()

    def snapshot_size(self, place: Place) -> int:
        """Bytes of what is at *place*, which is of a snapshot; 0 where that makes no sense.

        Of a snapshot that is gone the last size: one who reads on is to hear of it.
        """
        contents = self._contents()
        if contents and place.index < len(contents.snapshots):
            snapshot, geometry = contents.snapshots[place.index], contents.layout.geometry
            self._snapshot_sizes[place] = 0
            with suppress(ImageError):
                self._snapshot_sizes[place] = size_of(place, snapshot, geometry)
        return self._snapshot_sizes.get(place, 0)

    def _contents(self) -> Contents | None:
        contents = self._described.contents if self._described else None
        return None if isinstance(contents, ImageError) else contents

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
            if changed():
                note = "the image was written to meanwhile: look again"
                return self._work().with_note(found, note)
            return found

        value = self._value(
            lambda: (self.subject.checked_state(), self.reader.state()),
            compute,
            self.reader.refresh,
        )
        return value

    def l2_page(self, number: int) -> Value[L2Page | ImageError]:
        """The L2 table that this entry of the active L1 table leads to; kept as by `look`."""
        return self.look(lambda source: self._work().read_l2_page(source, number))

    def host_byte(self, offset: HostOffset) -> Value[HostExplanation | ImageError]:
        """What a byte of the image file is used for, beside a check; kept as by `look`."""
        return self.look(
            lambda source: self._work().explain_host(source, offset), beside_check=True
        )

    def guest_byte(self, offset: GuestOffset) -> Value[GuestByte]:
        """Where a byte of the guest's disk is, beside a check; kept as by `look`."""

        def key() -> Hashable:
            checkup = self.checkup.peek()
            return self.reader.state(), checkup and weakref.ref(checkup)

        async def compute(_changed: Changed) -> GuestByte:
            self._keep_look(looked)
            source, guest = self.subject.source(), (await self.guest.get()).value
            return await trio.to_thread.run_sync(
                lambda: self._work().explain_guest(source, guest, offset),
                abandon_on_cancel=True,
                limiter=self._looking,
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

    async def _working(self, do: Callable[[Work], T]) -> T:
        return await self._in_thread(lambda: do(self._work()))

    async def _in_thread(self, do: Callable[[], T]) -> T:
        """Await it in a thread; what that took beyond what it returns is given back later."""
        try:
            return await trio.to_thread.run_sync(do)
        finally:
            self._tidier.soon()

    def _work(self) -> Work:
        from instarfs.inspect.work import Work  # noqa: PLC0415

        return Work(self._stages, self.subject.sharing)

    def _check_now(self, image: Image) -> tuple[Generation, Checkup]:
        from instarfs.inspect.checker import Checker  # noqa: PLC0415

        checker = Checker(self._stages, self.subject.sharing, self._check, self._bound)
        return checker.check(image)

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
        before, checkup = await self._in_thread(lambda: self._check_now(image))
        self.subject.reviewed(image)
        if checkup.report.changed:
            self._checked = None
        else:
            if self._has_repairs:
                checkup = replace(checkup, repaired=self.repairs.standing(before))
            self._checked = before, Edition(checkup)
        return checkup

    async def _look_into_leaks(self, changed: Changed) -> Leaks:
        image = self.subject.image
        report = (await self.checkup.get()).value.report
        before = self.subject.generation()
        triage = await self._working(lambda work: work.triage(image, report))
        self._looked_into = None if changed() else (before, Leaks(report, triage))
        return Leaks(_torn(report) if changed() else report, triage)

    async def _find_files(self, place: Place) -> HitFiles | FilesUnknown:
        image, report = self.subject.image, (await self.checkup.get()).value.report
        if report.error is not None:
            return self._work().unknown(report.error)
        triage = await self._triage_or_error()
        guest = (await self.guest.get()).value
        if isinstance(guest, ImageError):
            return self._work().unknown(guest)
        return await self._working(lambda work: work.search(image, guest, place, report, triage))

    async def _brief(self, changed: Changed) -> Briefing:
        """Plans are made only where something is to be repaired: each costs about a check."""
        with self._stages.running("opening"):
            checkup = (await self.checkup.get()).value
            triage = await self._triage_or_error()
            guest = (await self.guest.get()).value if checkup.report.layout else None
            around, beside = await self._working(
                lambda work: work.look_around(self.subject.image, checkup.report, guest)
            )
            files = None if checkup.report.error else (await self.files.get()).value
            briefing = Briefing(checkup, triage, {}, around, beside, files)
            for tier in self._work().tiers_for(checkup.report):
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
            proposal = await self._working(
                lambda work: work.plan(image, checkup.report, tier, triage)
            )
        return self._work().of_one_moment(proposal, checkup.report, changed, "read again")

    async def _draw_atlas(self, changed: Changed) -> Atlas | ImageError:
        image = self.subject.image
        report = (await self.checkup.get()).value.report
        atlas = await self._working(lambda work: work.draw(image, report))
        if isinstance(atlas, ImageError):
            return atlas
        return replace(atlas, torn=atlas.torn or changed())

    async def _read_bitmaps(self, _changed: Changed) -> Bitmaps:
        image = self.subject.image
        return await self._working(lambda work: work.read_bitmaps(image))


@asynccontextmanager
async def inspecting(
    image: Image,
    *,
    follow: Follow | None = None,
    check: Check | None = None,
    bound: Callable[[FileSource], None] = _unbounded,
    make_repairer: MakeRepairer | None = None,
) -> AsyncIterator[Inspector]:
    """An inspector of *image*; whatever it computes ends with the block."""
    async with room_for_values() as nursery:
        yield Inspector(
            image, nursery, follow=follow, check=check, bound=bound, make_repairer=make_repairer
        )


def _describe(image: Image) -> Description:
    from planner.qcow2.contents import Contents  # noqa: PLC0415

    source = image.source()
    contents: Contents | ImageError
    try:
        contents = Contents.read(source)
    except ImageError as error:
        contents = as_value(error)
    return Description(contents, bare_header(source), source.size, image.allocated_size())


def _torn(report: Report) -> Report:
    """Of an image that changed before all had been said of it."""
    return replace(report, changed=True)
