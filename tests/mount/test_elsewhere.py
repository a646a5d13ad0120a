"""A mount by an instarfs that lies in a folder of its own with all it needs, as packages do."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.mount.mounts import DEADLINE, PROJECT

LAUNCHER = """
import sys
sys.path.insert(0, {library!r})
from instarfs.cli.start import main
main()
"""


def test_its_daemon_still_imports_what_it_needs_late(tmp_path: Path) -> None:
    # Hard links: to another folder that is not the one that a virtual environment has.
    library = tmp_path / "python"
    installed = sysconfig.get_path("purelib")
    subprocess.run(["cp", "-al", installed, library], check=True)
    for package in ("instarfs", "planner"):
        subprocess.run(["cp", "-a", PROJECT / package, library], check=True)
    image, mount = tmp_path / "image", tmp_path / "mnt"
    # With a cluster of two owners: numpy loads a package to compare them.
    make: list[str | Path] = [
        sys.executable,
        PROJECT / "examples/make_image.py",
        "--damage",
        "shared-cluster",
        image,
    ]
    subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
    mount.mkdir()
    program = LAUNCHER.format(library=str(library))
    call = [sys.executable, "-IS", "-c", program]
    subprocess.run([*call, "mount", image, mount], check=True, timeout=DEADLINE)
    try:
        assert "multiple-owners" in (mount / "check/findings.jsonl").read_text()
    finally:
        subprocess.run([*call, "umount", mount], check=True, timeout=DEADLINE)
