"""A mount whose repairs wait after each flush until a test lets them go on:
gated_repair.py IMAGE DIR FOLDER

In FOLDER a repair adds a line to `count` with each flush, and then waits for `gate` to appear, or
until it is cancelled.
"""

import sys
import time
from contextlib import suppress
from pathlib import Path

from instarfs.daemon import broker
from instarfs.daemon import serve as session
from instarfs.daemon.background import nobody_waits
from instarfs.daemon.logs import log_to_stderr
from instarfs.image.file import Image
from instarfs.mount.options import MountOptions
from instarfs.repair.execute import FileDevice
from instarfs.repair.run import Repairer
from planner.errors import Cancelled
from planner.progress import Progress

IMAGE, DIRECTORY, FOLDER = sys.argv[1], sys.argv[2], Path(sys.argv[3])
COUNT = (FOLDER / "count").open("a")  # which the daemon may not open later


class GatedDevice(FileDevice):
    """A file that is held up whenever it has been flushed."""

    def __init__(self, fd: int, name: str, progress: Progress) -> None:
        super().__init__(fd, name)
        self._progress = progress

    def flush(self) -> None:
        super().flush()
        print("flush", file=COUNT, flush=True)
        with suppress(Cancelled):  # which the repair hears of, too
            while not (FOLDER / "gate").exists():
                self._progress("writing", 0, 1)
                time.sleep(0.005)


def make_repairer(image: Image, *, progress: Progress) -> Repairer:
    def device(fd: int, name: str) -> GatedDevice:
        return GatedDevice(fd, name, progress)

    return Repairer(image, progress=progress, device=device)


log_to_stderr()
image = Image.open(IMAGE)
with broker.separated(image):
    code = session.serve(
        image, DIRECTORY, MountOptions(), nobody_waits, make_repairer=make_repairer
    )
sys.exit(code)
