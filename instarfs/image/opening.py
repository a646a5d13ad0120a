"""One image, opened to be looked at: under which locks, and within how much memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from instarfs.image import locks
from instarfs.image.file import Image
from instarfs.image.memory import limited


@contextmanager
def opened(
    path: str,
    undo_file: str | None = None,
    *,
    access: locks.Access | None = locks.READ_ONLY,
    is_bounded: bool = True,
) -> Iterator[Image]:
    """The image at *path*, under QEMU's locks for *access*: none for a repair, which has its own.

    *is_bounded*: this process is given as much memory as work on that image takes, meanwhile.
    Raises an `InstarfsError` for what cannot be opened, `ImageInUse`, `NotEnoughMemory`.
    """
    with ExitStack() as stack:
        image = stack.enter_context(Image.open(path, undo_file))
        if is_bounded:
            stack.enter_context(limited(image))
        if access is not None:
            stack.enter_context(locks.held(image.fileno(), path, access))
        yield image
