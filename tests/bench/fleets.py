"""Scans of very many small images, beside a `qemu-img check` in a process for each.

They are copies of a few, some of them damaged, so that what a scan must say of each is known.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import instarfs
from instarfs.scan.state import State
from planner.check.report import Report
from tests.bench.race import Race, Row, Side
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
        QEMU: Side(lambda: subprocess.run(["sh", "-c", _QEMU, "sh", folder], check=False), turns=1),
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


RACES = (
    Race(
        "scan",
        enter,
        (
            Row(f"check of {IMAGES} small images", SCAN, QEMU, 1),
            Row("the same again, unchanged", AGAIN, QEMU, 0.05),
        ),
        warm=False,
    ),
)
