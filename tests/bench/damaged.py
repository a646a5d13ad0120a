"""A badly damaged image: 200 GiB with all its metadata, a bit changed in 5 % of its L2 entries.

What is shown of it, in a mount, stands beside a check of it, on which everything builds; its repair
beside that of qemu-img.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.bench.checks import command, served
from tests.bench.race import Enter, Race, Row, Side, process_cpu
from tests.bench.repairs import restorer, run_repair
from tests.bench.samples import Samples, flip_bits, preallocate
from tests.mount.mounts import INSTARFS, Mount, settle

CHECK = "instarfs check"
REPORT, FINDINGS = "check/report.txt", "check/findings.jsonl"
REPAIR, QEMU = "repair/tier", "qemu-img check -r"

SHARE = 0.05


def damaged(samples: Samples) -> Path:
    """The image."""

    def make(path: Path) -> None:
        preallocate(path, "200G")
        flip_bits(path, SHARE)

    return samples.get("flipped", make)


def read(mount: Mount, name: str) -> None:
    """A file from beginning to end."""
    with (mount / name).open("rb", buffering=0) as file:
        while file.read(1 << 20):
            pass


def shown(name: str, after: tuple[str, ...]) -> Enter:
    """The sides *name*, when *after* have been read, and a check as a whole process."""

    @contextmanager
    def enter(samples: Samples) -> Iterator[Mapping[str, Side]]:
        image = damaged(samples)
        with served(image, samples) as mount:

            def prepare() -> None:
                os.utime(image)
                settle(image)
                for each in after:
                    read(mount, each)

            yield {
                name: Side(
                    lambda: read(mount, name), prepare, lambda: process_cpu(mount.process.pid)
                ),
                CHECK: Side(_failing(image)),
            }

    return enter


def _failing(image: Path) -> Callable[[], object]:
    return command("sh", "-c", '"$@"; [ $? = 2 ]', "-", *INSTARFS, "check", image)


@contextmanager
def repaired(samples: Samples) -> Iterator[Mapping[str, Side]]:
    """`all`, undo file and proof and journal included; each turn in a mount of its own."""
    work = samples.folder / "work.qcow2"
    restore = restorer(damaged(samples), work)
    with ExitStack() as stack:
        current: list[Mount] = []

        def mount() -> None:
            stack.close()
            restore()
            settle(work)
            current[:] = [stack.enter_context(served(work, samples))]

        def repair() -> None:
            try:
                (current[0] / "repair/tier").write_text("all\n")
            except OSError as error:  # not everything can be mended
                if error.errno != errno.EUCLEAN:
                    raise

        yield {
            REPAIR: Side(repair, mount, lambda: process_cpu(current[0].process.pid)),
            QEMU: Side(
                lambda: run_repair("sh", "-c", '"$@"; [ $? = 2 ]', "-", *_QEMU, work), restore
            ),
        }


_QEMU = ("qemu-img", "check", "-r", "all")

RACES = (
    Race(
        "damaged-report",
        shown(REPORT, ()),
        (Row("report.txt, 5 % of 200 GiB's entries damaged", REPORT, CHECK, 4.5),),
    ),
    Race(
        "damaged-findings",
        shown(FINDINGS, ("check/result.json",)),
        (Row("findings.jsonl of it, once checked", FINDINGS, CHECK, 6),),
    ),
    Race(
        "damaged-repair",
        repaired,
        (Row("all, in a mount", REPAIR, QEMU, 1.3),),
    ),
)
