"""Every row of the matrix, clean and then damaged under the mount: all of it can be read."""

import json
import random
import subprocess
from pathlib import Path

import pytest

from instarfs.image.file import Image
from planner.check.check import check_image
from tests.images.matrix import MATRIX, Row, build, describe
from tests.images.random_damage import inflict_some
from tests.mount.mounts import MakeMount, Mount
from tests.oracle.scene import Scene, dissect


def read_all(mount: Mount) -> dict[str, bytes]:
    """Every file of the tree but disks, which may be large, by its path."""
    found = subprocess.run(
        ["find", mount.path, "-type", "f", "-not", "-name", "*.raw", "-printf", r"%P\n"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    return {name: (mount / name).read_bytes() for name in found}


def assert_shown(mount: Mount, image: Path) -> None:
    """The check's files say what the check says, and every JSON file is JSON."""
    files = read_all(mount)
    with Image.open(str(image)) as opened:
        report = check_image(opened.source())
    result = json.loads(files["check/result.json"])
    assert result["verdict"] == report.verdict
    assert result["exit-code"] == report.exit_code
    assert result["corruptions"] == report.counters.corruptions
    assert result["leaks"] == report.counters.leaks
    assert len(files["check/result.bin"]) == 80
    for name, content in files.items():
        if name.endswith(".json"):
            json.loads(content)
    findings = [json.loads(line) for line in files["check/findings.jsonl"].splitlines()]
    assert {each["kind"] for each in findings} == {kind.label for kind in report.counts()}


@pytest.mark.parametrize("row", MATRIX, ids=describe)
def test_a_row_mounts_clean_and_damaged(row: Row, mount: MakeMount, tmp_path: Path) -> None:
    image = build(row, tmp_path, f"mounted {row.name}")
    it = mount(image)
    assert_shown(it, image)
    with Scene(image, dissect(image)) as scene:
        assert inflict_some(scene, random.Random(row.name))
    assert_shown(it, image)
