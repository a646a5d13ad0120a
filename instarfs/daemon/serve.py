"""One image, mounted: puts the image, its inspector, the tree and the daemon together.

Everything about the order in which a mount comes about lives here, and nothing else.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from instarfs import render
from instarfs.daemon import process as daemon
from instarfs.daemon.confinement import Confinement
from instarfs.errors import ImageNotQcow2, ImageUnreadable
from instarfs.guest import unpack  # noqa: F401 - by shared libraries: too late once confined
from instarfs.guest.follow import Follow
from instarfs.image import locks, memory
from instarfs.image.file import Image, end_readers
from instarfs.inspect.inspector import inspecting
from instarfs.inspect.stages import IDLE
from instarfs.mount import mountpoint, tree
from instarfs.mount.operations import Operations, Ownership
from instarfs.mount.options import MountOptions
from instarfs.repair.interrupted import pending
from instarfs.repair.known import Known
from planner.errors import HeaderCutOff, ImageError, NotQcow2
from planner.progress import Progress
from planner.qcow2.layout import Layout
from planner.repair.plan import RescueTier

if TYPE_CHECKING:
    from instarfs.image.preview import PreviewImage
    from instarfs.inspect.repair_queue import MakeRepairer
    from instarfs.inspect.values import Check
    from instarfs.render.rescue import Rescued
    from instarfs.repair.run import Repairer

log = logging.getLogger(__name__)

_CHECKS = ("instarfs.inspect.checker", f"{render.__name__}.check")
_READS = ("planner.guest.allocation", "instarfs.guest.guest", "planner.qcow2.contents")
_LATE = (
    "instarfs.inspect.work",
    "instarfs.inspect.repair_queue",
    "instarfs.inspect.leaked_tables",
    "instarfs.repair.run",
    "planner.check.wire",
    *(f"{render.__name__}.{name}" for name in render.__all__),
)
"""What checks, what reads the disk, then what else computes and shows: once the mount answers, or
by who is faster, and not when it is first used. By then the package may have been replaced, and no
two versions are to meet.
"""

_SOON_SECONDS, _PATIENCE_SECONDS, _POLL_SECONDS = 0.2, 5.0, 0.01
"""After the answer: by then who mounted for a check has asked for it, and that comes first."""

_SWITCH_SECONDS = 0.0005
"""By default a thread that computes lets another one go on after ten times as long."""


def serve(
    image: Image,
    directory: str,
    options: MountOptions,
    ready: Callable[[], None],
    *,
    follow: Follow | None = None,
    check: Check | None = None,
    make_repairer: MakeRepairer | None = None,
    keeps_undo: bool = True,
    preview: str | None = None,
    knows: Known | None = None,
) -> int:
    """Mount *image* on *directory* and serve it until the end: the exit code.

    What the image needs of its directory from then on must come from an `instarfs.daemon.broker`:
    this process may no longer. *keeps_undo*: whether what *make_repairer* makes does, which by
    default is a `Repairer`. *preview*: what is laid over it: a tier, or a rescue by what somebody
    *knows*. *ready* is called once the mount answers. Raises before that, with nothing mounted,
    when the image is not qcow2, or cannot be read, or the tier refuses, or mounting fails.
    """
    plan, rescued = None, None
    if preview != RescueTier.RESCUE:
        _require_qcow2(image)
    if preview is not None:
        image, rescued = _previewed(image, preview, knows or Known())
        plan = image.plan
    followed = follow.directories if follow else ()
    confinement = Confinement.of_daemon(image, followed)

    # Here, for an image that may not answer is asked in a thread by all that comes after.
    interrupted = pending(image)
    if interrupted is not None:
        log.warning("%s: %s", image.path, interrupted.sentence)

    def confine() -> None:
        end_readers()
        memory.limit(image.source(), for_good=True)
        memory.limit_address_space()
        confinement.enforce()

    @asynccontextmanager
    async def make_service() -> AsyncIterator[daemon.Service]:
        async with inspecting(
            image,
            follow=follow,
            check=check,
            bound=memory.limit,
            make_repairer=make_repairer or partial(_repairer, keep_undo=keeps_undo),
        ) as inspector:
            root = tree.build_tree(
                inspector,
                read_only=options.read_only,
                keeps_undo=keeps_undo,
                mountpoint=str(Path(directory).absolute()),
                preview=plan,
                rescued=rescued,
            )
            operations = Operations(
                root,
                partial(tree.facts, inspector.subject),
                Ownership(os.getuid(), os.getgid(), for_others=options.for_others),
                {mountpoint.DAEMON_ATTRIBUTE: mountpoint.identity()},
            )
            load = partial(load_late, lambda: inspector.progress() == IDLE)
            yield daemon.Service(operations, inspector.cancel, confine, load)

    return daemon.run(make_service, directory, options.for_fuse(image.path), ready=ready)


def load_late(is_idle: Callable[[], bool] = lambda: True) -> None:
    """In a thread beside the event loop, which is to wait for it no longer than it must.

    Nor is who waits for a value; but for so long that the package is replaced nobody is waited for.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS

    def load(*names: str) -> None:
        for name in names:
            while not is_idle() and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
            importlib.import_module(name)

    for name in _CHECKS:
        importlib.import_module(name)
    load(*_READS)
    time.sleep(_SOON_SECONDS)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        load(*_LATE)
    finally:
        sys.setswitchinterval(interval)
    gc.freeze()  # never to be looked through for garbage


def _repairer(image: Image, *, progress: Progress, keep_undo: bool) -> Repairer:
    from instarfs.repair.run import Repairer  # noqa: PLC0415

    return Repairer(image, progress=progress, keep_undo=keep_undo)


def _previewed(image: Image, word: str, knows: Known) -> tuple[PreviewImage, Rescued | None]:
    """*image* as it would be, and what there is to say of a rescue.

    Raises as `preview_of` does, and `ImageInUse`.
    """
    from instarfs.render.rescue import Asked, Rescued  # noqa: PLC0415
    from instarfs.repair.preview import preview_of  # noqa: PLC0415

    with memory.limited(image), locks.held(image.fileno(), image.path):
        preview = preview_of(image, word, knows=knows)
    # Not what it was found by, which is as large as the image's tables, many times.
    found, previewed = preview.rescue, preview.image
    rescued = None if found is None else Rescued.of(found, Asked(image.path, knows))
    del preview, found
    memory.give_back()
    return previewed, rescued


def _require_qcow2(image: Image) -> None:
    """Refuse what is no qcow2 image at all. One that is damaged is what a mount is for.

    So is one of which the header was about to be brought back, or taken away again.
    """
    try:
        Layout.read(image.source())
    except NotQcow2 as error:
        if pending(image) is not None:
            return
        raise ImageNotQcow2(image.path, str(error)) from error
    except HeaderCutOff as error:
        raise ImageUnreadable(image.path, str(error)) from error
    except ImageError:
        pass  # shown in the mount
