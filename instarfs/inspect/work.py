"""What an inspector has done in threads beside checks: triage, plans, pictures, searches.

Each function takes what it is about and returns a value. When one is called, and what becomes of
the value where the image changed meanwhile, is `instarfs.inspect.inspector`'s business, which loads
this when the first one is wanted: it is most of the planner, and a mount answers before.
"""

from __future__ import annotations

from instarfs.errors import InstarfsError
from instarfs.guest.files import hit_files, owner_of
from instarfs.guest.guest import Guest
from instarfs.guest.place import Place
from instarfs.image import locks
from instarfs.image.file import Image
from instarfs.image.linux import give_back_freed_pages
from instarfs.image.rwlock import Sharing
from instarfs.image.surroundings import Surroundings
from instarfs.inspect.shared_value import while_wanted
from instarfs.inspect.stages import Stages
from instarfs.inspect.values import Bitmaps, GuestByte
from instarfs.repair.looking import look_around
from instarfs.repair.planning import of_one_moment, propose_for
from planner.arrays import GuestOffset, HostOffset
from planner.check.report import Report
from planner.errors import ImageError, RepairError, as_value
from planner.guestfs.files import FilesUnknown, HitFiles
from planner.repair.plan import RepairTier
from planner.repair.tiers import Proposal, tiers_for
from planner.source import Source
from planner.triage.beside import Beside, look_beside
from planner.triage.triage import Triage, triage_leaks
from planner.views.bitmap_state import BitmapStates, read_bitmap_states
from planner.views.explain import HostExplanation, explain_guest, explain_host
from planner.views.host_map import Atlas, draw_atlas
from planner.views.table_view import read_l1_page, read_l2_page


class Work:
    """It tells *stages* how far it is, and keeps a repair of this process out by *sharing*."""

    def __init__(self, stages: Stages, sharing: Sharing) -> None:
        self._stages, self._sharing = stages, sharing

    def triage(self, image: Image, report: Report) -> Triage:
        """What the leaked clusters of a check look like."""
        with self._stages.running("opening"), self._sharing.reading(image):
            return triage_leaks(image.source(), report, progress=while_wanted(self._stages.tell))

    def search(
        self,
        image: Image,
        guest: Guest,
        place: Place,
        report: Report,
        triage: Triage | InstarfsError,
    ) -> HitFiles | FilesUnknown:
        """The files of the disk at *place* that are hit by what a check found."""
        with self._sharing.reading(image):
            return hit_files(guest, place, report, triage, while_wanted(self._stages.tell))

    @staticmethod
    def unknown(error: ImageError) -> FilesUnknown:
        """That nobody can say which files are hit, because of *error*."""
        return FilesUnknown(str(error))

    @staticmethod
    def with_note(found: HitFiles | FilesUnknown, note: str) -> HitFiles | FilesUnknown:
        """The same, with one more thing to be said first, if there is anything to be said."""
        return found.with_note(note) if isinstance(found, HitFiles) else found

    def plan(
        self, image: Image, report: Report, tier: RepairTier, triage: Triage
    ) -> Proposal | RepairError:
        """What a repair would do, or why the tier refuses."""

        def tell(stage: str, done: int, total: int) -> None:
            self._stages.tell(f"plan {tier} {stage}", done, total)

        with self._sharing.reading(image):
            give_back_freed_pages()  # One tier after the other is planned, and each needs as much.
            found = propose_for(image, report, tier, triage=triage, progress=while_wanted(tell))
            return found if isinstance(found, RepairError) else found.in_brief()

    def draw(self, image: Image, report: Report) -> Atlas | ImageError:
        """The map of the host file; why there is none."""
        try:
            with self._stages.running("drawing"):
                return draw_atlas(image.source(), report, while_wanted())
        except ImageError as error:
            return as_value(error)

    tiers_for = staticmethod(tiers_for)
    of_one_moment = staticmethod(of_one_moment)
    read_l1_page = staticmethod(read_l1_page)
    read_l2_page = staticmethod(read_l2_page)

    @staticmethod
    def look_around(
        image: Image, report: Report, guest: Guest | ImageError | None
    ) -> tuple[Surroundings, Beside]:
        """What is around the image, and what the check did without."""
        around = look_around(image)
        if report.layout is None or not isinstance(guest, Guest):
            return around, Beside()
        return around, look_beside(image.source(), report.layout, guest.members)

    @staticmethod
    def explain_host(source: Source, offset: HostOffset) -> HostExplanation:
        """What a byte of the image file is used for."""
        return explain_host(source, offset, while_wanted())

    @staticmethod
    def explain_guest(source: Source, guest: Guest | ImageError, offset: GuestOffset) -> GuestByte:
        """Where a byte of the guest's disk is, and whose."""
        try:
            way = explain_guest(source, offset, while_wanted())
        except ImageError as error:
            return GuestByte(as_value(error))
        if isinstance(guest, ImageError):
            return GuestByte(way)
        return GuestByte(way, owner_of(guest, offset, while_wanted()))

    @staticmethod
    def read_bitmaps(image: Image) -> Bitmaps:
        """The persistent bitmaps."""
        states: BitmapStates | ImageError
        try:
            states = read_bitmap_states(image.source(), while_wanted())
        except ImageError as error:
            states = as_value(error)
        return Bitmaps(states, locks.is_written(image.fileno(), image.path))
