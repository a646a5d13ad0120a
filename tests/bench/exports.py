"""A guest's disk copied out, beside `qemu-img convert -O raw`: what is there, packed, and nothing.

The image is warm, and neither flushes what it wrote; the copy of the turn before is gone.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.bench.checks import DISK
from tests.bench.race import Enter, Race, Row, Side
from tests.bench.reads import convert, warm, write_plain, write_text
from tests.bench.samples import Samples, preallocate
from tests.mount.mounts import INSTARFS

OURS, QEMU = "instarfs export", "qemu-img convert"

Make = Callable[[Path], Path]


def make_sparse(folder: Path) -> Path:
    """64 GiB of disk, 4 MiB on it."""
    image = folder / "image.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "64G"], check=True)
    subprocess.run(["qemu-io", "-c", "write -q -P 65 0 4M", image], check=True)
    return image


def make_full(folder: Path) -> Path:
    """64 GiB of which every cluster is there, and nothing was written to any."""
    image = folder / "image.qcow2"
    preallocate(image, "64G")
    return image


def side_by_side(make: Make) -> Enter:
    """Both, of the image that *make* makes in a folder."""

    @contextmanager
    def enter(_samples: Samples) -> Iterator[Mapping[str, Side]]:
        with tempfile.TemporaryDirectory("-instarfs-exports", dir=DISK) as name:
            folder = Path(name)
            image, raw = make(folder), folder / "raw"

            def prepare() -> None:
                for left in (raw, folder / "raw.map"):
                    left.unlink(missing_ok=True)
                os.sync()
                warm(image)

            commands = {
                OURS: [*INSTARFS, "export", "-q", image, raw],
                QEMU: ["qemu-img", "convert", "-O", "raw", image, raw],
            }
            yield {
                side: Side(partial(subprocess.run, command, check=True), prepare)
                for side, command in commands.items()
            }

    return enter


def _of(write: Callable[[Path], None], *options: str) -> Make:
    return lambda folder: convert(folder, write, *options)


RACES = (
    Race(
        "export-plain",
        side_by_side(_of(write_plain)),
        (Row("export, 2 GiB of data", OURS, QEMU, 1),),
    ),
    Race(
        "export-packed",
        side_by_side(_of(write_text, "-c")),
        (Row("export of a compressed image, 512 MiB", OURS, QEMU, 1),),
    ),
    Race(
        "export-sparse",
        side_by_side(make_sparse),
        (Row("export, 4 MiB on 64 GiB", OURS, QEMU, 0.9),),
    ),
    Race(
        "export-full",
        side_by_side(make_full),
        (Row("export, 64 GiB of clusters in holes", OURS, QEMU, 0.9),),
    ),
)
