"""How far QEMU's repair and ours get with one damaged image, and whether the guest lost by it.

Counted is a repair of QEMU's after which it finds nothing, and every disk reads as before: one that
could not be read, as in the undamaged base. Ours is what a person gets who quotes the plans' ids:
the tier, and after `all` what `leaks` then frees; and what more who chooses. Nothing here says what
a repair must do.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from planner.check.check import check_image
from planner.check.report import Report
from planner.errors import RepairError
from planner.findings.kinds import KINDS
from planner.repair.overlay import Overlay
from planner.repair.plan import DETERMINED, RepairTier
from planner.repair.tiers import propose
from planner.source import Source
from tests.images.guest_disks import Disk, faults_between, read_disk
from tests.images.matrix import Row, copy, repair_command
from tests.oracle.judge import ask_qemu
from tests.oracle.scene import FileSource, dissect

QEMU_REPAIR_SECONDS = 20


@dataclass(frozen=True, slots=True)
class Reach:
    """Of one tier. ``ours``: nothing where we mend it too; else what we leave, or why we refuse.

    ``chosen``: the same, when all that a person may choose has been chosen before.
    """

    tier: RepairTier
    ours: str
    chosen: str = ""

    def __str__(self) -> str:
        chosen = f"; chosen: {self.chosen or 'mended'}" if self.ours else ""
        return f"  {self.tier}: QEMU mends it; we: {self.ours or 'mend it too'}{chosen}"


def reaches(row: Row, base: Path, image: Path) -> Iterator[Reach]:
    """Both tiers, of those that QEMU mends without loss; *base* is *image* before its damage."""
    if ask_qemu(row, image).exit_code == 0:
        return
    disks: dict[str | None, Disk] = {}
    for tier in DETERMINED:
        by_qemu = image.with_name("reached-by-qemu.qcow2")
        copy(image, by_qemu)
        if not _is_mended(row, by_qemu, tier):
            continue
        if not disks:
            disks = _disks(row, base, image)
        if not _loses(row, by_qemu, disks):
            ours = what_we_leave(image, tuple(dict.fromkeys((tier, RepairTier.LEAKS))))
            chosen = what_we_leave(image, _BY_CHOICE) if ours else ""
            yield Reach(tier, ours, chosen)


def _is_mended(row: Row, image: Path, tier: RepairTier) -> bool:
    try:
        subprocess.run(
            repair_command(row, image, tier.value),
            check=False,
            capture_output=True,
            cwd=image.parent,
            timeout=QEMU_REPAIR_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return False
    return ask_qemu(row, image).exit_code == 0


def _disks(row: Row, base: Path, image: Path) -> dict[str | None, Disk]:
    """What each disk of *base* holds, as far as it can be read from *image* from there."""
    ids = [each.id_str.decode(errors="replace") for each in dissect(base).snapshots]
    disks = {}
    for at, each in enumerate((None, *ids)):
        raw = image.with_name(f"reach{at}.raw")
        disk = read_disk(row, image, each, raw) or read_disk(row, base, each, raw)
        if disk is not None:
            disks[each] = disk
    return disks


def _loses(row: Row, image: Path, disks: dict[str | None, Disk]) -> bool:
    raw = image.with_name("reached.raw")
    return any(
        next(faults_between(before, read_disk(row, image, each, raw)), None)
        for each, before in disks.items()
    )


_BY_CHOICE = (
    RepairTier.SNAPSHOTS,
    RepairTier.BITMAPS,
    RepairTier.ALL,
    RepairTier.SPLIT,
    RepairTier.ALL,
    RepairTier.LEAKS,
)
"""What somebody does who wants the image to be clean, and has read every plan."""


def what_we_leave(image: Path, tiers: Sequence[RepairTier]) -> str:
    """Nothing where our repairs end without a counted finding; else the refusal, or the kinds.

    A tier that refuses before others is left out.
    """
    with image.open("rb") as file:
        source: Source = FileSource(file.fileno())
        report, refusal = check_image(source), ""
        for each in tiers:
            try:
                proposal = propose(source, report, each)
            except RepairError as error:
                refusal = f"refused: {error.finding or ''} {error.reason.split(':')[0]}"
                continue
            refusal = "" if each is RepairTier.ALL else refusal
            source, report = Overlay(source, proposal.plan), proposal.after
        left = ", ".join(_counted(report))
        return left and (refusal or left)


def _counted(report: Report) -> Iterator[str]:
    for kind in sorted(report.counts()):
        if KINDS[kind].counted:
            yield kind.label
