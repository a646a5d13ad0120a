"""Bitmaps that QEMU made and wrote: the same names, flags and granularity, and what is dirty."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from instarfs.image import Image
from instarfs.render.bitmaps import bitmaps_json
from planner.dirty import read_bitmap_states
from tests.mount.mounts import run

DISK = 96 << 20


@pytest.mark.parametrize("granularity", [512, 4096, 65536, 1 << 20])
def test_what_was_written_is_dirty(granularity: int, tmp_path: Path) -> None:
    path, rng = tmp_path / "image.qcow2", random.Random(granularity)
    run("qemu-img", "create", "-q", "-f", "qcow2", path, str(DISK))
    run("qemu-img", "bitmap", "--add", "-g", str(granularity), path, "written")
    run("qemu-img", "bitmap", "--add", "--disable", path, "disabled")
    dirty: set[int] = set()
    commands: list[str | Path] = []
    for _ in range(12):
        offset = rng.randrange(DISK // 512) * 512
        length = min(rng.choice([512, 4096, 70_144, 3 << 20]), DISK - offset)
        commands += ["-c", f"write -q {offset} {length}"]
        dirty |= set(range(offset // granularity, (offset + length - 1) // granularity + 1))
    run("qemu-io", "-f", "qcow2", *commands, path)
    with Image.open(str(path)) as image:
        states = read_bitmap_states(image.source(), lambda _: None)
    ours = {b["name"]: b for b in json.loads(bitmaps_json(states, is_written=False))["bitmaps"]}
    info = json.loads(run("qemu-img", "info", "--output=json", path))
    theirs = {b["name"]: b for b in info["format-specific"]["data"]["bitmaps"]}
    assert ours.keys() == theirs.keys()
    for name, bitmap in theirs.items():
        assert ours[name]["granularity"] == bitmap["granularity"]
        assert sorted(ours[name]["flags"]) == sorted(bitmap["flags"])
        assert not ours[name]["errors"]
        assert not ours[name]["inconsistent"]
    assert ours["written"]["dirty-bytes"] == sum(
        min(granularity, DISK - bit * granularity) for bit in dirty
    )
    assert ours["disabled"]["dirty-bytes"] == 0
