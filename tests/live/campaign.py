"""Checks of an image beside a machine that writes it: healthy, and damaged before it started.

A session is one start of a machine. `qemu-img check -U` and `instarfs check -U` take turns; at the
end the machine has closed its image, and `qemu-img check` says what it was all the time.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.images.builder import GIB, MIB
from tests.images.random_damage import KINDS
from tests.live.asked import Answer, ask_ours, ask_qemu
from tests.live.machine import QmpError, Shape, end, running
from tests.live.quiet import DAMAGED, inflict, is_damaged
from tests.live.writer import BUSY, CALM, Habits, Writer
from tests.mount.mounts import INSTARFS, Mount, environment, mounted, run

SESSION_CHECKS = 25
"""After so many the machine is started anew, with an image of its own."""

SHAPES = {
    "64k": Shape(size=4 * GIB),
    "64k-small": Shape(size=4 * GIB, small_caches=True),
    "512": Shape(cluster_size=512, size=16 * MIB, small_caches=True),
    "4k-little": Shape(cluster_size=4096, size=16 * MIB, small_caches=True),
    "4k": Shape(cluster_size=4096, size=256 * MIB, small_caches=True),
    "4k-flush": Shape(cluster_size=4096, size=256 * MIB, small_caches=True, flushes=True),
    "4k-1bit": Shape(cluster_size=4096, size=128 * MIB, refcount_bits=1, small_caches=True),
    "4k-64bit": Shape(cluster_size=4096, size=128 * MIB, refcount_bits=64, small_caches=True),
    "2m": Shape(cluster_size=2 * MIB, size=16 * GIB),
    "extended": Shape(size=4 * GIB, extended_l2=True, small_caches=True),
    "lazy": Shape(cluster_size=4096, size=128 * MIB, lazy_refcounts=True, small_caches=True),
}

NOT_OPENED = "not opened by QEMU"
DID_NOT_GO = "no such damage in this part"


@dataclass
class Session:
    """What was said while one machine ran, and afterwards."""

    seed: int
    shape: str
    damage: str = ""
    qemu: list[Answer] = field(default_factory=list)
    ours: list[Answer] = field(default_factory=list)
    offline: list[Answer] = field(default_factory=list)
    rate: float = 0.0
    done: dict[str, int] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    after: Answer | None = None
    """What `qemu-img check` says once the machine has gone."""
    skipped: str = ""
    stayed: bool = False
    """Whether the damage was there to the end."""


def session(
    name: str,
    seed: int,
    checks: int,
    habits: Habits = BUSY,
    damage: str = "",
    *,
    quiet: bool = True,
) -> Session:
    """Start a machine with an image of the shape *name*, and check that while it runs."""
    shape, found = SHAPES[name], Session(seed, name)
    with tempfile.TemporaryDirectory(prefix="instarfs-live-") as folder:
        image = Path(folder) / "image.qcow2"
        shape.create(image)
        if damage:
            furnish(image, shape)
            written = int(shape.size * habits.written)
            rng = random.Random(f"damage {seed} {damage}")
            what = inflict(image, written, rng, damage, in_quiet=quiet)
            if what is None:
                found.skipped = DID_NOT_GO
                return found
            found.damage = what
        try:
            with running(image, shape) as machine, Writer(machine, shape, habits, seed) as writer:
                for _ in range(checks):
                    if not writer.is_at_it():
                        break
                    if not damage:
                        found.qemu.append(ask_qemu(image, "-U"))
                    found.ours.append(ask_ours(image, "-U"))
                writer.stop()
                found.rate, found.done, found.refused = writer.rate, writer.done, writer.refused
        except QmpError as error:
            found.skipped = f"{NOT_OPENED}: {error}"
            return found
        found.after = ask_qemu(image)
        found.stayed = bool(damage) and is_damaged(image)
        found.offline = [] if damage else [ask_ours(image) for _ in range(3)]
    return found


def furnish(image: Path, shape: Shape) -> None:
    """A snapshot and a bitmap, where the image can have them: so that these can be damaged too."""
    run("qemu-img", "bitmap", "--add", "-f", "qcow2", image, "first")
    if shape.refcount_bits > 1:
        run("qemu-img", "snapshot", "-c", "first", image)


def sessions(name: str, seed: int, checks: int) -> Iterator[Session]:
    """Healthy ones, until there were so many checks."""
    for number, begun in enumerate(range(0, checks, SESSION_CHECKS)):
        yield session(name, 1000 * seed + number, min(SESSION_CHECKS, checks - begun))


def damaged_sessions(name: str, seed: int, checks: int, *, quiet: bool) -> Iterator[Session]:
    """One for each kind of damage, with so many checks each. Snapshots change what is quiet."""
    for number, damage in enumerate(KINDS):
        habits = CALM if quiet else BUSY
        yield session(name, 1000 * seed + number, checks, habits, damage, quiet=quiet)


def faults(found: Session) -> list[str]:
    """What must not have been said, a line each."""
    if found.skipped:
        return []
    where = f"{found.shape}, session {found.seed}"
    wrong = []
    if not found.damage:
        wrong += [
            f"{where}: a corruption that is none: {answer.said[:2000]}"
            for answer in found.ours
            if answer.code == 2 or answer.corruptions
        ]
        if found.after is not None and (found.after.corruptions or found.after.code == 2):
            wrong.append(f"{where}: the image is corrupt, says qemu-img: {found.after.said[:500]}")
    elif found.stayed:
        wrong += [
            f"{where}: {found.damage}: called clean: {answer.said[:2000]}"
            for answer in found.ours
            if answer.code == 0 or answer.verdict == "clean"
        ]
    return wrong


def missed(found: Session) -> list[str]:
    """Checks that did not find damage of a quiet part, a line each."""
    if found.skipped or not found.stayed:
        return []
    return [
        f"{found.shape}, session {found.seed}: {found.damage}: {answer.verdict},"
        f" {answer.in_motion} in motion"
        for answer in found.ours
        if answer.verdict not in DAMAGED
    ]


# ---- what it costs -------------------------------------------------------------------------------


@contextmanager
def checking(image: Path, *command: str) -> Iterator[Callable[[], int]]:
    """Somebody who checks *image*, again and again, as fast as that goes; how often so far."""
    loop = 'while :; do "$@" >/dev/null 2>&1; echo; done'
    with tempfile.TemporaryFile() as count:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", "sh", "-c", loop, "sh", *command, str(image)],
            env=environment(),
            stdout=count,
            start_new_session=True,
            text=True,
        )
        try:
            yield lambda: os.fstat(count.fileno()).st_size
        finally:
            end(process)


OURS = (*INSTARFS, "check", "-U")


def throughput(name: str, seed: int, seconds: float, rounds: int) -> dict[str, float]:
    """Allocating writes a second of a guest that writes as fast as it goes; by who checks."""
    shape = SHAPES[name]
    who = {
        "nobody": (),
        "instarfs check -U": OURS,
        "qemu-img check -U": ("qemu-img", "check", "-U"),
    }
    found: dict[str, list[float]] = {key: [] for key in who}
    with tempfile.TemporaryDirectory(prefix="instarfs-live-") as folder:
        image = Path(folder) / "image.qcow2"
        shape.create(image)
        habits = Habits(rate=0, snapshot=0, resize=0, bitmap=0)
        with running(image, shape) as machine, Writer(machine, shape, habits, seed) as writer:
            for _ in range(rounds):
                for key, command in who.items():
                    if command:
                        with checking(image, *command):
                            found[key].append(_rate(writer, seconds))
                    else:
                        found[key].append(_rate(writer, seconds))
    return {key: statistics.median(rates) for key, rates in found.items()}


def _rate(writer: Writer, seconds: float) -> float:
    before, began = writer.done.get("allocate", 0), time.monotonic()
    time.sleep(seconds)
    return (writer.done["allocate"] - before) / (time.monotonic() - began)


@dataclass
class BesideMount:
    """Machines that started while a mount of their image was checking.

    ``waited``: how often one could not start during a check; ``failed``: what one said that could
    not after it; ``verdicts``: of the mount, while a machine ran.
    """

    waited: int = 0
    failed: list[str] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)


def starts_beside_a_mount(name: str, count: int) -> BesideMount:
    """Start so many, each while the mount looks at an image that has just changed."""
    shape, found = SHAPES[name], BesideMount()
    with tempfile.TemporaryDirectory(prefix="instarfs-live-") as folder:
        image, point = Path(folder) / "image.qcow2", Path(folder) / "mount"
        shape.create(image)
        with mounted([*INSTARFS, "mount", "-f", image, point], image, point) as mount:
            for _ in range(count):
                os.utime(image)
                reader = threading.Thread(target=mount.read, args=["check/result.json"])
                reader.start()
                _start_beside(reader, image, mount, found)
                reader.join()
    return found


def _start_beside(reader: threading.Thread, image: Path, mount: Mount, found: BesideMount) -> None:
    is_over = False
    while not is_over:
        is_over = not reader.is_alive()
        try:
            with running(image, Shape()):
                value = json.loads(mount.read("check/result.json"))
                found.verdicts.append(value["verdict"])
                return
        except QmpError as error:
            if is_over:
                found.failed.append(str(error))
            else:
                found.waited += 1


def starts(name: str, checks: int) -> tuple[int, list[str]]:
    """Start machines while their image is checked so often; how many, and what those said that
    could not start.
    """
    shape = SHAPES[name]
    started, failed = 0, []
    with tempfile.TemporaryDirectory(prefix="instarfs-live-") as folder:
        image = Path(folder) / "image.qcow2"
        shape.create(image)
        with checking(image, *OURS) as done:
            while done() < checks:
                try:
                    with running(image, shape):
                        started += 1
                except QmpError as error:
                    failed.append(str(error))
    return started, failed
