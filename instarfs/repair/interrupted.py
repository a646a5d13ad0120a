"""Whether a repair of an image was interrupted: asked before every check, mostly answered by no.

What reads undo files is loaded only where there is one: a check alone has no other use for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from instarfs.errors import UndoFileDamaged
from instarfs.image import locks
from instarfs.image.file import Image
from instarfs.repair.undo_place import UndoPlace
from instarfs.text import shell_path

if TYPE_CHECKING:
    from instarfs.repair.outcome import Pending


def pending(image: Image) -> Pending | None:
    """The interrupted repair of *image*, if there is one. Changes nothing.

    None while somebody writes to the image: then a repair may be under way, of which the undo file
    says the same as of one that was interrupted.
    """
    if locks.is_written(image.fileno(), image.path):
        return None
    found = _look(image)
    # One may have begun since, or have begun and ended.
    is_over = found is None or locks.is_written(image.fileno(), image.path) or _look(image) != found
    return None if is_over else found


def _look(image: Image) -> Pending | None:
    try:
        place = UndoPlace.of(image)
    except OSError:
        return None
    if place is None:
        return None
    with place:
        return _pending_in(place, image.path) if place.is_taken() else None


def _pending_in(place: UndoPlace, path: str) -> Pending | None:
    from instarfs.repair.journal import State, read_summary  # noqa: PLC0415
    from instarfs.repair.outcome import Pending  # noqa: PLC0415

    try:
        summary = read_summary(place)
    except UndoFileDamaged as error:
        return Pending(str(error), error.undo_file)
    if summary is None or summary.status.state is not State.APPLYING:
        return None
    sentence = (
        f"a repair (tier {summary.tier}, plan {summary.plan_id}) was interrupted; the next repair"
        f" takes it back first, and so does: instarfs undo{place.option} {shell_path(path)}"
    )
    return Pending(sentence, place.file, summary.tier, summary.plan_id)
