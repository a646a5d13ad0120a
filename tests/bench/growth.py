"""How time and memory grow with the disk: whole checks of 1 to 16 TiB, all their metadata there."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tests.bench.disks import CLUSTER
from tests.bench.samples import Samples
from tests.mount.mounts import INSTARFS

NAME = "growth"
TEBIBYTES = (1, 2, 4, 8, 16)
TURNS = 3

MIB = 1 << 20
BASE_MEMORY = 72 * MIB
MEMORY_PER_CLUSTER = 1
"""What a check may take at its peak: this for each host cluster in use, beside `BASE_MEMORY`."""

# A small process of its own: what a child is said to have used at its peak begins with what its
# parent uses, and this one has had arrays of its own.
_MEASURE = """
import json, os, sys, time
begin = time.perf_counter()
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[
    (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)])
_, status, used = os.wait4(pid, 0)
print(json.dumps([status, time.perf_counter() - begin, used.ru_utime + used.ru_stime,
                  used.ru_maxrss << 10]))
"""


@dataclass(frozen=True, slots=True)
class Size:
    """One size, measured: medians in seconds, the highest peak in bytes and what it may be."""

    tebibytes: int
    wall: float
    cpu: float
    peak: int
    allowed: int

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)


HEADLINE = f"{'whole check':<16}{'wall':>10}{'cpu':>10}{'peak':>12}{'allowed':>12}{'':>6}"


def line(size: Size) -> str:
    """One line of the second table."""
    mark = "ok" if size.peak <= size.allowed else "MISS"
    return (
        f"{size.tebibytes:>3} TiB{'':<9}{size.wall:>8.3f} s{size.cpu:>8.3f} s"
        f"{size.peak / MIB:>8.0f} MiB{size.allowed / MIB:>8.0f} MiB{mark:>6}"
    )


def measure(samples: Samples) -> Iterator[Size]:
    """One size after the other, as far as the file system can hold a file so long."""
    for tebibytes in TEBIBYTES:
        try:
            image = samples.preallocated(f"{tebibytes}T")
        except subprocess.CalledProcessError:
            print(f"{tebibytes:>3} TiB: {samples.folder} cannot hold a file so long", flush=True)
            return
        turns = [_measure(*INSTARFS, "check", str(image)) for _ in range(TURNS)]
        clusters = image.stat().st_size // CLUSTER
        yield Size(
            tebibytes,
            statistics.median(wall for wall, _, _ in turns),
            statistics.median(cpu for _, cpu, _ in turns),
            max(peak for _, _, peak in turns),
            BASE_MEMORY + MEMORY_PER_CLUSTER * clusters,
        )
        image.unlink()


def _measure(*command: str) -> tuple[float, float, int]:
    """Wall and processor seconds, and peak memory in bytes, of a command that must succeed."""
    words = [sys.executable, "-S", "-E", "-c", _MEASURE, *command]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    status, wall, cpu, peak = json.loads(done.stdout)
    if status:
        raise subprocess.CalledProcessError(status, command, stderr=done.stderr)
    return wall, cpu, peak
