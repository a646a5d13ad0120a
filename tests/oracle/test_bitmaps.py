"""Bitmaps that QEMU made and wrote: the same names, flags and granularity, and what is dirty."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest

from instarfs.image.file import Image
from instarfs.render.bitmaps import bitmaps_json
from planner.qcow2.bitmaps import AUTO, IN_USE
from planner.qcow2.layout import Layout
from planner.views.bitmap_state import read_bitmap_states, unsaved_bitmaps
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
        states = read_bitmap_states(image.source())
    ours = {
        b["name"]: b
        for b in json.loads(b"".join(bitmaps_json(states, is_written=False)))["bitmaps"]
    }
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


def test_one_that_was_never_saved_is_what_qemu_takes_for_inconsistent(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
    for name in ("unsaved", "sound"):
        run("qemu-img", "bitmap", "--add", path, name)
    with Image.open(str(path)) as image:
        states = read_bitmap_states(image.source())
    with path.open("r+b") as file:
        file.seek(states.bitmaps[0].bitmap.offset + 12)
        file.write((IN_USE | AUTO).to_bytes(4, "big"))
    for change in ("--add", "--enable", "--clear"):
        command = ["qemu-img", "bitmap", change, path, "unsaved"]
        assert subprocess.run(command, check=False, capture_output=True).returncode == 1
    with Image.open(str(path)) as image:
        states = read_bitmap_states(image.source())
        unsaved = unsaved_bitmaps(image.source(), Layout.read(image.source()))
    shown = json.loads(b"".join(bitmaps_json(states, is_written=False)))["bitmaps"]
    assert [bitmap["inconsistent"] for bitmap in shown] == [True, False]
    assert [bitmap.name for bitmap in unsaved] == [b"unsaved"]
    run("qemu-img", "bitmap", "--remove", path, "unsaved")
