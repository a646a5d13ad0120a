"""What a mount costs before anybody reads: time until it answers, and memory of both processes.

Beside the import of what every mount has to load, and of libqcow's `qcowmount`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.bench.checks import command
from tests.bench.race import Race, Row, Side, Unavailable, process_cpu
from tests.bench.samples import Samples
from tests.mount.mounts import INSTARFS, mounted, until

OURS, IMPORTS, QCOWMOUNT = "instarfs mount", "import numpy, pyfuse3", "qcowmount"

NAME = "idle"
ALLOWED_KIB = 25 << 10
"""Of memory, both processes together; what they share with each other counts once."""

_REST_SECONDS = 1.0
"""Longer than a mount waits before it loads the rest of what it may need."""


@contextmanager
def answering(samples: Samples) -> Iterator[Mapping[str, Side]]:
    """Each turn mounts a small image, and the one before is taken off again."""
    if shutil.which("qcowmount") is None:
        raise Unavailable("no qcowmount (Debian: libqcow-utils)")
    image = samples.preallocated("64M")
    directory, other = samples.folder / "mnt", samples.folder / "qcow"
    for each in (directory, other):
        each.mkdir(exist_ok=True)

    def take_off(where: Path) -> None:
        if where.is_mount():
            subprocess.run(["fusermount3", "-u", "-z", where], check=True)

    try:
        yield {
            OURS: Side(command(*INSTARFS, "mount", image, directory), partial(take_off, directory)),
            IMPORTS: Side(command(sys.executable, "-c", "import numpy, pyfuse3")),
            QCOWMOUNT: Side(command("qcowmount", image, other), partial(take_off, other)),
        }
    finally:
        take_off(directory)
        take_off(other)


def memory(samples: Samples) -> int:
    """KiB of memory (PSS) that an idle mount takes, its broker's included."""
    image, directory = samples.preallocated("64M"), samples.folder / "mnt"
    with mounted([*INSTARFS, "mount", "-f", image, directory], image, directory) as mount:
        (mount / "README.txt").read_bytes()
        daemon = mount.process.pid
        _wait_for_rest(daemon)
        children = Path(f"/proc/{daemon}/task/{daemon}/children").read_text().split()
        return sum(map(_pss, [str(daemon), *children]))


def _wait_for_rest(pid: int) -> None:
    """Until it has done nothing for a while: by then what it loads once it answers is there."""
    used, since = process_cpu(pid), time.monotonic()

    def is_at_rest() -> bool:
        nonlocal used, since
        if (now := process_cpu(pid)) != used:
            used, since = now, time.monotonic()
        return time.monotonic() - since > _REST_SECONDS

    until(is_at_rest, "the mount rests")


def _pss(pid: str) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def line(kib: int) -> str:
    """What to print of it."""
    mark = "ok" if kib <= ALLOWED_KIB else "MISS"
    allowed = f"{ALLOWED_KIB / 1024:.0f} MiB"
    return f"{'a mount, idle, both processes':<36}{kib / 1024:>12.1f} MiB{allowed:>12}{mark:>6}"


RACES = (
    Race(
        "mount-answers",
        answering,
        (
            Row("mount, until it answers", OURS, IMPORTS, 1),
            Row("mount, until it answers", OURS, QCOWMOUNT),
        ),
    ),
)
