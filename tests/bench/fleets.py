"""Scans of very many small images, beside a `qemu-img check` in a process for each.

They are copies of a few, some of them damaged, so that what a scan must say of each is known.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import instarfs
from instarfs.scan.run import Scan, Wanted
from instarfs.scan.state import State
from instarfs.scan.values import Candidate, Limits, Outcome, Row, Run
from instarfs.scan.workers import Lister, Nursery, Stopped
from planner.check.report import Report
from planner.qcow2.header import MAGIC
from tests.bench import race
from tests.bench.checks import command
from tests.bench.race import Race, Side
from tests.bench.samples import Samples
from tests.images.builder import GIB, MIB, Image, ImageBuilder
from tests.images.damage import DAMAGES, CannotDamageError
from tests.mount.mounts import INSTARFS

IMAGES = 20_000
MODELS = 50
DAMAGED = 50
"""One image of so many."""

OLD = 1e9
"""When all were written: long before they are looked at."""

SCAN, AGAIN = "instarfs scan", "a second scan"
QEMU = "find | xargs -P2 qemu-img check"


def models(folder: Path) -> list[bytes]:
    """Images of small disks: of four one is empty, as `qemu-img` makes it, the others hold data."""
    empty = folder / "empty.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", empty, "10G"], check=True)
    made = [empty.read_bytes()] * (MODELS // 4)
    return made + [built(random.Random(seed)) for seed in range(MODELS - len(made))]


def built(rng: random.Random) -> bytes:
    """An image with clusters of 4 KiB: some data, half of them with a snapshot under it."""
    builder = ImageBuilder(cluster_bits=12, size=rng.choice((8 * MIB, 64 * MIB, GIB)))
    for half in range(2):
        for cluster in sorted(rng.sample(range(2 * builder.geometry.l2_entries), 8)):
            builder.write(cluster, rng.randbytes(builder.geometry.cluster_size))
        if half == 0 and rng.random() < 0.5:
            builder.take_snapshot("before")
    builder.skip(3)
    return bytes(builder.build().data)


def damaged(model: bytes, rng: random.Random) -> bytes:
    """A model, broken in one of the ways that it can be."""
    names = list(DAMAGES)
    rng.shuffle(names)
    for name in names:
        made = Image(bytearray(model))
        try:
            DAMAGES[name](made, rng)
        except CannotDamageError:
            continue
        return bytes(made.data)
    raise AssertionError("it cannot be damaged")


def fill(folder: Path, count: int) -> dict[bytes, Report]:
    """So many images below *folder*; by path, what a check says of each."""
    rng, healthy = random.Random(1), models(folder.parent)
    broken = [damaged(healthy[-1 - number], rng) for number in range(MODELS // 2)]
    reports = {content: check(folder.parent, content) for content in (*healthy, *broken)}
    expected = {}
    for number in range(count):
        source = broken if number % DAMAGED == 0 else healthy
        content = source[number // DAMAGED % len(source) if source is broken else number % MODELS]
        path = folder / f"{number // 500}" / f"disk{number}.qcow2"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        os.utime(path, (OLD, OLD))
        expected[os.fsencode(path)] = reports[content]
    return expected


def check(folder: Path, content: bytes) -> Report:
    """What `instarfs check` says of an image."""
    path = folder / "model.qcow2"
    path.write_bytes(content)
    return instarfs.check(str(path))


@contextmanager
def enter(samples: Samples) -> Iterator[Mapping[str, Side]]:
    """The first scan begins without a state; the second, right after it, goes by what it left."""
    folder, state = samples.folder / "fleet", samples.folder / "fleet.state"
    folder.mkdir()
    expected = fill(folder, IMAGES)

    def forget() -> None:
        for left in samples.folder.glob(f"{state.name}*"):
            left.unlink()

    yield {
        SCAN: Side(lambda: scan(state, folder), forget),
        AGAIN: Side(lambda: scan(state, folder)),
        QEMU: Side(lambda: subprocess.run(["sh", "-c", _QEMU, "sh", folder], check=False)),
    }
    require_same(state, expected)


_QEMU = 'find "$1" -type f -print0 | xargs -0 -P2 -n1 qemu-img check -f qcow2 >/dev/null 2>&1'


def scan(state: Path, folder: Path) -> None:
    """A whole process; it ends with the worst of what it has found."""
    subprocess.run([*INSTARFS, "scan", "-q", "--jobs=2", "--state", state, folder], check=False)


def require_same(state: Path, expected: Mapping[bytes, Report]) -> None:
    """Every row is that of a check, and none is missing."""
    with State.read(str(state)) as known:
        rows = {row.path: row for verdict in known.counts() for row in known.rows(verdict)}
    assert rows.keys() == expected.keys()
    for path, row in rows.items():
        said = expected[path]
        assert (row.verdict, row.counters) == (said.verdict, said.counters), path


# ---- 100,000 images, of which only the listing and the state are real ----

SIMULATED = 100_000
ROW_BYTES = 400
"""Of the state for an image, at most."""

LOOKING = "find -type f -size +0"


class Believing:
    """An engine that takes each for a clean image, and stops after so many."""

    def __init__(self, most: int) -> None:
        self._most = most

    def run(self, candidates: Iterator[Candidate]) -> Iterator[Outcome]:
        for candidate in islice(candidates, self._most):
            yield Row(
                candidate.path,
                candidate.device,
                candidate.stamp,
                bytes(32),
                "clean",
                0,
                as_of=time.time(),
                lasts=True,
            )
        if next(candidates, None) is not None:
            raise Stopped


def record(folder: Path, state_path: Path, most: int) -> Run:
    """A scan of *folder* that is stopped after so many images: what it says of itself."""
    wanted = Wanted([os.fsencode(folder)], version("instarfs"))
    with Nursery(1, Limits(60)) as nursery, State.open(str(state_path)) as state:
        lister = Lister(nursery, lambda: False)
        Scan(wanted, state, lister, lambda *_: None, lambda: False).run(Believing(most))
        run = state.last_run()
    assert run is not None
    return run


@contextmanager
def enter_simulated(samples: Samples) -> Iterator[Mapping[str, Side]]:
    """Half of them are recorded by a scan that is stopped, the others by the one that goes on."""
    folder, state = samples.folder / "many", samples.folder / "many.state"
    for number in range(SIMULATED):
        path = folder / f"{number // 1000}" / f"disk{number}.qcow2"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(MAGIC.to_bytes(4, "big"))
            file.truncate(100 * GIB)
        os.utime(path, (OLD, OLD))
    half = record(folder, state, SIMULATED // 2)
    rest = record(folder, state, SIMULATED)
    assert (half.checked, half.complete, rest.checked, rest.complete) == (
        *(SIMULATED // 2, False),
        *(SIMULATED // 2, True),
    )
    assert rest.unchanged == SIMULATED // 2
    assert state.stat().st_size < SIMULATED * ROW_BYTES
    yield {
        AGAIN: Side(lambda: scan(state, folder)),
        LOOKING: Side(command("find", folder, "-type", "f", "-size", "+0")),
    }


RACES = (
    Race(
        "scan",
        enter,
        (
            race.Row(f"check of {IMAGES} small images", SCAN, QEMU, 1),
            race.Row("the same again, unchanged", AGAIN, QEMU, 0.05),
        ),
        warm=False,
    ),
    Race(
        "scan-simulated",
        enter_simulated,
        (race.Row(f"scan of {SIMULATED} images, unchanged", AGAIN, LOOKING),),
    ),
)
