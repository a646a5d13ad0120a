"""A rescue of an image whose header and L1 table are gone, beside one read of its file.

Both begin with nothing cached. The file is full of data, a file system with large files, and as
large as fits on a small machine; both take as long as the file is.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.bench.checks import DISK, command, forget
from tests.bench.disks import CLUSTER, GIB
from tests.bench.race import Race, Row, Side
from tests.bench.reads import MIB
from tests.bench.samples import Samples, zero_l1
from tests.mount.mounts import INSTARFS, settle

OURS, READ = "instarfs rescue", "cat"

FILES = 8
"""Of a GiB each."""


def make(folder: Path, files: int = FILES) -> Path:
    """The image."""
    tree, raw, image = folder / "tree", folder / "raw", folder / "image.qcow2"
    tree.mkdir()
    block = random.Random(3).randbytes(64 * MIB)
    for number in range(files):
        with (tree / f"file {number}").open("wb") as file:
            for at in range(GIB // len(block)):
                file.write(block[at + number :] + block[: at + number])
    with raw.open("wb") as file:
        file.truncate((files + 1) * GIB)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, raw], check=True)
    shutil.rmtree(tree)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image], check=True)
    raw.unlink()
    zero_l1(image)
    with image.open("r+b") as written:
        written.write(bytes(CLUSTER))
    settle(image)
    return image


@contextmanager
def enter(_samples: Samples) -> Iterator[Mapping[str, Side]]:
    """Both, of the same file."""
    with tempfile.TemporaryDirectory("-instarfs-rescue", dir=DISK) as name:
        image = make(Path(name))
        prepare = partial(forget, image)
        yield {
            OURS: Side(partial(_rescue, image), prepare),
            READ: Side(command("cat", image), prepare),
        }


def _rescue(image: Path) -> None:
    done = subprocess.run([*INSTARFS, "rescue", image], check=False, capture_output=True, text=True)
    assert "header" in done.stdout, done.stderr


RACES = (
    Race(
        "rescue",
        enter,
        (Row(f"rescue, {FILES} GiB, header and L1 table gone", OURS, READ, 1.5),),
        warm=False,
    ),
)
