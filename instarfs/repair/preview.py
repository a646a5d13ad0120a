"""An image as it would be, to be looked at: what would be done to it, laid over it in memory.

What is planned is decided in `planner`; what a preview is to its readers, in
`instarfs.image.preview`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from instarfs.errors import RepairPending
from instarfs.image.file import Image
from instarfs.image.memory import keep_freed_memory
from instarfs.image.preview import PreviewImage
from instarfs.repair.interrupted import pending
from instarfs.repair.known import Known
from instarfs.repair.planning import run_plan
from planner.errors import AmbiguousCorruption
from planner.progress import Progress, tell_nobody
from planner.repair.plan import RescueTier, tier_of

if TYPE_CHECKING:
    from planner.rescue.rescue import Rescue


@dataclass(frozen=True, slots=True)
class Preview:
    """``image``: with a plan laid over it. ``rescue``: what that plan puts back, if it is one."""

    image: PreviewImage
    rescue: Rescue | None = None


def preview_of(
    image: Image, word: str, progress: Progress = tell_nobody, *, knows: Known | None = None
) -> Preview:
    """*image* as a repair of the tier *word* would leave it, or a rescue by what somebody *knows*.

    To be called under the locks of a reader. Raises as `run_plan` and
    `planner.rescue.rescue.rescue` do.
    """
    tier, before = tier_of(word), image.generation()
    if not isinstance(tier, RescueTier):
        return Preview(PreviewImage(image, run_plan(image, tier, progress=progress).plan, before))
    from planner.rescue.rescue import rescue  # noqa: PLC0415 - it reads file systems, for nobody else

    interrupted = pending(image)
    if interrupted is not None:
        raise RepairPending(image.path, interrupted.sentence)
    knows = knows or Known()
    keep_freed_memory()
    found = rescue(
        image.source(),
        assumed=knows.fields,
        like=knows.header,
        can_grow=not image.is_device,
        progress=progress,
    )
    if image.generation() != before:
        raise AmbiguousCorruption("the image changed while it was looked at", "stop its writer")
    return Preview(PreviewImage(image, found.plan, before), found)
