"""The check that an inspector has made, in a thread.

When it is made, and what becomes of it where the image changed meanwhile, is
`instarfs.inspect.inspector`'s business. It is apart from `instarfs.inspect.work`, for it loads a
fifth of that, and is what most who mount an image ask for first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

from instarfs.image.file import FileSource, Generation, Image, missing
from instarfs.image.rwlock import Sharing
from instarfs.inspect.shared_value import while_wanted
from instarfs.inspect.stages import Stages
from instarfs.inspect.values import Check, Checkup
from instarfs.repair.checking import LiveCheck, run_check
from planner.check.check import check_image

log = logging.getLogger(__name__)


class Checker:
    """It tells *stages* how far it is, and keeps a repair of this process out by *sharing*."""

    def __init__(
        self,
        stages: Stages,
        sharing: Sharing,
        check: Check | None,
        bound: Callable[[FileSource], None],
    ) -> None:
        """*check*: in place of `check_image`. *bound*: as for an inspector."""
        self._stages, self._sharing = stages, sharing
        self._check, self._bound = check or check_image, bound

    def check(self, image: Image) -> tuple[Generation, Checkup]:
        """A check, and what the image was before it."""
        gone = image.gone()
        if gone is not None:
            log.warning("%s", missing(image))
        with self._stages.running("opening"), self._sharing.reading(image) as is_kept:
            self._bound(image.source())  # anew: it may have grown since
            checked = run_check(
                image,
                partial(self._check, progress=while_wanted(self._stages.tell)),
                is_written=lambda: not is_kept,
                live=LiveCheck(again=partial(check_image, progress=while_wanted()), pause=_pause),
            )
        return checked.before, Checkup(checked.report, pending=checked.pending, gone=gone)


def _pause(seconds: float) -> None:
    while_wanted()("", 0, 0)
    time.sleep(seconds)
