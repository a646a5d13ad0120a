"""Repairs beside ``qemu-img check -r``, undo file, proof and journal included.

Each turn repairs a copy of the damaged image, made before the clock runs.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.bench.race import Race, Row, Side
from tests.bench.samples import Samples, copy, preallocate, zero_l1, zero_reftable
from tests.mount.mounts import INSTARFS, instarfs

REPAIR = "instarfs check -r"
TRIMMED = "instarfs check -r, then trim"
QEMU = "qemu-img check -r"


def run_repair(*words: str | Path) -> None:
    """Run a repair; its output is dropped, a failure is not."""
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def plan_id(tier: str, image: Path) -> str:
    """The plan that somebody has reviewed."""
    plan: dict[str, str] = json.loads(instarfs("plan", tier, "--output", "json", image).stdout)
    return plan["plan-id"]


def restorer(damaged: Path, work: Path) -> Callable[[], None]:
    """Makes *work* a copy of *damaged*, with nothing beside it."""

    def restore() -> None:
        for old in work.parent.glob(f"{work.name}*"):
            old.unlink()
        copy(damaged, work)

    return restore


@contextmanager
def leaks(samples: Samples) -> Iterator[Mapping[str, Side]]:
    """64 GiB whose L1 table was zeroed: 1,048,704 clusters are leaked."""

    def make(path: Path) -> None:
        preallocate(path, "64G")
        zero_l1(path)

    damaged = samples.get("leaked", make)
    work = samples.folder / "work.qcow2"
    restore = restorer(damaged, work)
    restore()
    quote = ["--plan", plan_id("leaks", work)]

    def repair() -> None:
        run_repair(*INSTARFS, "check", "-r", "leaks", *quote, work)

    def repair_and_trim() -> None:
        repair()
        run_repair(*INSTARFS, "trim", work)

    yield {
        REPAIR: Side(repair, restore),
        TRIMMED: Side(repair_and_trim, restore),
        QEMU: Side(lambda: run_repair("qemu-img", "check", "-r", "leaks", work), restore),
    }


@contextmanager
def rebuild(samples: Samples) -> Iterator[Mapping[str, Side]]:
    """1 TiB whose refcount table was zeroed."""

    def make(path: Path) -> None:
        preallocate(path, "1T")
        zero_reftable(path)

    damaged = samples.get("uncounted", make)
    work = samples.folder / "work.qcow2"
    restore = restorer(damaged, work)
    yield {
        REPAIR: Side(lambda: run_repair(*INSTARFS, "check", "-r", "all", work), restore),
        QEMU: Side(lambda: run_repair("qemu-img", "check", "-r", "all", work), restore),
    }


RACES = (
    Race(
        "repair-leaks",
        leaks,
        (
            Row("leaks, 1,048,704 leaked clusters", REPAIR, QEMU, 1 / 50),
            Row("leaks and trim, 1,048,704 leaked clusters", TRIMMED, QEMU, 1 / 20),
        ),
        warm=False,
    ),
    Race(
        "repair-rebuild",
        rebuild,
        (Row("all, 1 TiB, the refcounts rebuilt", REPAIR, QEMU, 1 / 4),),
        warm=False,
    ),
)
