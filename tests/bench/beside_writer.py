"""A check while a program writes, beside one of the same disk at rest.

The program is a real one, `qemu-storage-daemon`, whose guest allocates and discards clusters.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.bench.checks import DISK
from tests.bench.disks import GIB
from tests.bench.race import Race, Row, Side, Unavailable
from tests.bench.samples import Samples, copy, preallocate
from tests.live.machine import QmpError, Shape, running
from tests.live.writer import Habits, Writer
from tests.mount.mounts import INSTARFS

BESIDE, AT_REST = "instarfs check -U", "instarfs check"

SETTLE = "120"
"""Seconds that it may look for a moment between the writes; a busy machine gives it few."""

SETTLED = (0, 3)
"""Exit codes of a verdict on a healthy image: leaks are in the program's caches."""


@contextmanager
def beside_a_writer(_samples: Samples) -> Iterator[Mapping[str, Side]]:
    """64 GiB with all their metadata, of which a thirty-second is written to."""
    with tempfile.TemporaryDirectory("-instarfs-live", dir=DISK) as name:
        image, still, shape = Path(name) / "image", Path(name) / "still", Shape(size=64 * GIB)
        preallocate(image, "64G")
        copy(image, still)
        habits = Habits(snapshot=0, resize=0, bitmap=0, written=1 / 32)
        try:
            with running(image, shape) as machine, Writer(machine, shape, habits, 1):
                yield {
                    BESIDE: Side(_check("check", "-U", "--settle", SETTLE, image)),
                    AT_REST: Side(_check("check", still)),
                }
        except QmpError as error:
            raise Unavailable(f"qemu-storage-daemon does not open it: {error}") from error


def _check(*words: str | Path) -> Callable[[], object]:
    def run() -> None:
        command = [*INSTARFS, *words]
        code = subprocess.run(
            command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ).returncode
        if code not in SETTLED:
            raise subprocess.CalledProcessError(code, command)

    return run


RACES = (
    Race(
        "check-live",
        beside_a_writer,
        (Row("check -U, 64 GiB, beside a program that writes", BESIDE, AT_REST, 3),),
    ),
)
