"""Measures each row beside its peer in one run, in turns; prints medians and ratios, writes JSON.

On a shared machine an absolute time says little; a ratio of two commands that took turns does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from instarfs.image import Image
from planner.check import check_image

INSTARFS = [sys.executable, "-m", "instarfs"]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: two things that take turns."""

    work: str
    peer_name: str
    ours: Callable[[], object]
    peer: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Result:
    """Medians in seconds; ``ratio`` is ours by the peer's."""

    work: str
    peer: str
    ours_seconds: float
    peer_seconds: float
    ratio: float


def command(*words: str) -> Callable[[], object]:
    """A process, run to its end; its output is dropped, a failure is not."""
    return lambda: subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def checked_in_process(path: Path) -> Callable[[], object]:
    """The check as a running mount does it: nothing to load, the image's pages warm."""

    def run() -> None:
        with Image.open(str(path)) as image:
            check_image(image.source())

    return run


def make_images(folder: Path) -> dict[str, Path]:
    """The images that the rows are about."""
    images = {}
    for name, size in (("64m", "64M"), ("1t", "1T")):
        images[name] = folder / f"{name}.qcow2"
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata"]
        subprocess.run([*create, str(images[name]), size], check=True)
    return images


def make_rows(images: dict[str, Path]) -> list[Row]:
    """The table, from the largest to the smallest."""

    def qemu(name: str) -> Callable[[], object]:
        return command("qemu-img", "check", str(images[name]))

    def whole(name: str) -> Callable[[], object]:
        return command(*INSTARFS, "check", str(images[name]))

    return [
        Row("check, 1 TiB, in a process", "qemu-img", checked_in_process(images["1t"]), qemu("1t")),
        Row("check, 1 TiB, whole process", "qemu-img", whole("1t"), qemu("1t")),
        Row(
            "check, 64 MiB, whole process",
            "import numpy",
            whole("64m"),
            command(sys.executable, "-c", "import numpy"),
        ),
    ]


def measure(row: Row, times: int) -> Result:
    """Let both take turns; the first turn only warms the caches."""
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    for turn in range(times + 1):
        for who, run in (("ours", row.ours), ("peer", row.peer)):
            begin = time.perf_counter()
            run()
            if turn:
                seconds[who].append(time.perf_counter() - begin)
    ours, peer = statistics.median(seconds["ours"]), statistics.median(seconds["peer"])
    return Result(row.work, row.peer_name, ours, peer, ours / peer)


def main() -> None:
    """Measure all rows."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--times", type=int, default=5, help="turns of each (default: 5)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="instarfs-bench-") as folder:
        images = make_images(Path(folder))
        print(f"{'work':<34}{'ours':>9}{'peer':>9}  {'peer is':<14}{'ours / peer':>12}")
        results = []
        for row in make_rows(images):
            result = measure(row, arguments.times)
            results.append(asdict(result))
            print(
                f"{result.work:<34}{result.ours_seconds:>8.3f}s{result.peer_seconds:>8.3f}s"
                f"  {result.peer:<14}{result.ratio:>12.2f}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=4) + "\n")


if __name__ == "__main__":
    main()
