"""A mount whose check waits until a test lets it go on: gated.py IMAGE DIR FOLDER

In FOLDER the check adds a line to `count` when it begins, and waits for `gate` to appear. Then it
ends with an I/O error if there is a file `fail`, with a bug if there is a `crash`, and else checks.
What explains a byte of the image does the same, and then explains it.
"""

import os
import sys
import time
from pathlib import Path

from instarfs.daemon import broker
from instarfs.daemon import serve as session
from instarfs.daemon.background import nobody_waits
from instarfs.daemon.logs import log_to_stderr
from instarfs.errors import ImageReadFailed
from instarfs.image.file import Image
from instarfs.inspect import work
from instarfs.mount.options import MountOptions
from planner.arrays import HostOffset
from planner.check.check import check_image
from planner.check.report import Report
from planner.progress import Progress
from planner.source import Source
from planner.views.explain import HostExplanation, explain_host

IMAGE, DIRECTORY, FOLDER = sys.argv[1], sys.argv[2], Path(sys.argv[3])
COUNT = (FOLDER / "count").open("a")  # which the daemon may not open later


def check(source: Source, *, progress: Progress) -> Report:
    """`check_image`, held up."""
    print("check", file=COUNT, flush=True)
    progress("census", 43, 100)
    while not (FOLDER / "gate").exists():
        progress("census", 43, 100)
        time.sleep(0.005)
    if (FOLDER / "fail").exists():
        raise ImageReadFailed(IMAGE, 65536, os.strerror(5))
    if (FOLDER / "crash").exists():
        raise ZeroDivisionError("a bug")
    return check_image(source, progress=progress)


def explain(source: Source, offset: HostOffset, progress: Progress) -> HostExplanation:
    """`explain_host`, held up."""
    print("explain", file=COUNT, flush=True)
    while not (FOLDER / "gate").exists():
        progress("owners", 0, 1)
        time.sleep(0.005)
    return explain_host(source, offset, progress)


vars(work)["explain_host"] = explain
log_to_stderr()
image = Image.open(IMAGE)
with broker.separated(image):
    code = session.serve(image, DIRECTORY, MountOptions(), nobody_waits, check=check)
sys.exit(code)
