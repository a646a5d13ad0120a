"""Real block devices for the tests: loop devices on files, which only root can attach."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

LOOP_CONTROL = Path("/dev/loop-control")


def require_loop_devices() -> None:
    """Skip where nobody could attach one. Where they are expected to work, a failure is one."""
    if "CI" in os.environ or (os.geteuid() == 0 and LOOP_CONTROL.exists()):
        return
    why = "only root can attach one" if LOOP_CONTROL.exists() else "the kernel has none here"
    pytest.skip(f"no loop device: {why}")


@contextlib.contextmanager
def attached(file: Path) -> Iterator[Path]:
    """The block device that *file* is."""
    find = ["losetup", "--find", "--show", str(file)]
    device = subprocess.run(find, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield Path(device)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
