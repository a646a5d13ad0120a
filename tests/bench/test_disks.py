"""The disks that the bench writes itself: whole, and clean to us and to qemu-img."""

import json
from pathlib import Path

import pytest

from instarfs.image.file import Image
from planner.check.check import check_image
from tests.bench.disks import GIB, Disk, write_disk
from tests.mount.mounts import run


@pytest.mark.parametrize(
    "disk",
    [Disk(GIB), Disk(GIB, shuffled=True), Disk(GIB, snapshots=3), Disk(GIB, True, 2)],
    ids=["in order", "shuffled", "snapshots", "both"],
)
def test_disks_are_fully_mapped_and_clean(tmp_path: Path, disk: Disk) -> None:
    path = tmp_path / "disk.qcow2"
    write_disk(path, disk)
    with Image.open(str(path)) as image:
        report = check_image(image.source())
    assert report.verdict == "clean"
    assert report.counters.allocated_clusters == GIB >> 16
    counters = json.loads(run("qemu-img", "check", "--output", "json", path))
    assert counters.get("fragmented-clusters", 0) == report.counters.fragmented_clusters
    assert counters["image-end-offset"] == report.counters.image_end_offset == path.stat().st_size
